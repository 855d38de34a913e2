"""The files of the page: what is ours and what is vendored, and how the server gives them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

import mlx_diffgemma
from mlx_diffgemma.serve import page
from mlx_diffgemma.serve.security import Access
from tests.serve.cases import get, scripted, serving

FOLDER = Path(mlx_diffgemma.__file__).parent / "serve" / "page"
VENDOR = FOLDER / "vendor"
VERSIONS = json.loads((VENDOR / "versions.json").read_text())
OURS = [each for each in sorted(FOLDER.iterdir()) if each.is_file()]
FIRST_PAINT = 100_000  # bytes


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_is_vendored_is_what_was_published():
    listed = {
        VENDOR / folder / name: digest
        for folder, about in VERSIONS.items()
        for name, digest in about["files"].items()
    }
    on_disk = {each for each in VENDOR.rglob("*") if each.is_file()} - {VENDOR / "versions.json"}
    assert set(listed) == on_disk
    assert all(sha256(file) == digest for file, digest in listed.items())


def test_each_vendored_library_has_its_version_and_licence():
    for folder, about in VERSIONS.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"]) and about["package"]
        assert "LICENSE" in about["files"], folder
        assert about["licence"] in ("MIT", "BSD-3-Clause", "Apache-2.0 or MPL-2.0")
    fonts = [each for each in VENDOR.rglob("*") if each.suffix in (".woff", ".woff2", ".ttf")]
    assert fonts and all(each.suffix == ".woff2" for each in fonts)
    assert sum(each.stat().st_size for each in VENDOR.rglob("*") if each.is_file()) < 1_100_000


def test_no_file_of_ours_is_long_and_none_names_another_host():
    assert len(OURS) > 20
    for file in OURS:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, file.name
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org"}
        assert not hosts, (file.name, hosts)
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ):
            assert forbidden not in text, (file.name, forbidden)


def test_styles_and_scripts_are_files_of_their_own():
    index = (FOLDER / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", index)


def imports(name: str) -> set[str]:
    """What a module needs before it runs, itself included; not what it asks for later."""
    seen, waiting = set(), [name]
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        text = page.names()[each].read_text(encoding="utf-8")
        waiting += re.findall(r'^import (?:[^;]*? from )?"\./([^"]+)"', text, re.M)
    return seen


def test_the_first_paint_is_small():
    needed = {"index.html", "look.css", "parts.css", "icon.svg"}
    needed |= imports("app.js") | imports("chat_part.js")
    assert "turns.js" in needed and not [name for name in needed if "vendor" in name]
    assert sum(len(page.file(name).content) for name in needed) < FIRST_PAINT


def test_every_file_that_is_named_is_there():
    for file in OURS:
        text = file.read_text(encoding="utf-8")
        named = re.findall(r'(?:import\(|from |import )"\./([^"]+)"', text)
        named += re.findall(r'"/page/([^"]+)"', text)
        for name in named:
            assert name in page.names(), (file.name, name)


@pytest.fixture(scope="module")
def locked():
    with serving(access=Access("a key"), model=scripted("x")) as running:
        yield running
        assert not running.bugs


def test_the_page_needs_no_key_and_runs_under_a_strict_policy(locked):
    answer = get(locked, "/")
    assert answer.status == 200 and answer.body.startswith(b"<!DOCTYPE html>")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert policy["style-src"] == "'self'" and policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:" and policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    # Everything else does.
    for path in ("/x/settings", "/v1/models", "/x/events"):
        assert get(locked, path).status == 401


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/../page.py",
        "/page/%2e%2e/page.py",
        "/page/..%2fpage.py",
        "/page/x.js",
        "/page//etc/passwd",
        "/page/vendor",
        "/page/__init__.py",
    ],
)
def test_no_other_file_is_given(locked, path):
    assert get(locked, path).status == 404


def test_a_file_comes_with_its_type_and_a_tag_and_is_not_sent_again(locked):
    for name, kind in (
        ("app.js", "text/javascript; charset=utf-8"),
        ("look.css", "text/css; charset=utf-8"),
        ("vendor/katex/fonts/KaTeX_Main-Regular.woff2", "font/woff2"),
        ("trace_view.js", "text/javascript; charset=utf-8"),
    ):
        answer = get(locked, f"/page/{name}")
        assert (answer.status, answer.headers["content-type"]) == (200, kind)
        assert answer.headers["cache-control"] == "no-cache"
        again = get(locked, f"/page/{name}", If_None_Match=answer.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        assert get(locked, f"/page/{name}", If_None_Match='"other"').status == 200


def test_pages_of_other_hosts_get_nothing(locked):
    assert get(locked, "/", Host="evil.example").status == 403
    assert get(locked, "/page/app.js", Origin="https://evil.example").status == 403


def test_files_of_the_page_fill_no_log(locked):
    before = len(locked.lines)
    get(locked, "/page/app.js")
    assert len(locked.lines) == before
    get(locked, "/page/nothing.js")
    assert len(locked.lines) == before + 1
