"""What may be shared of a result: names, no paths, and no claims that the source does not make."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.origin import repository, without_paths
from mlx_diffgemma.convert.verify import verify
from mlx_diffgemma.errors import SourceError
from tests.convert.cases import SIDE_FILES, official, sums

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path):
    return official(tmp_path / "secret-place/my-tune")


def text_of(folder) -> str:
    return "".join(p.read_text() for p in folder.iterdir() if p.suffix != ".safetensors")


def card_of(folder):
    """As the Hub's own library reads it."""
    return ModelCard((folder / "README.md").read_text())


def snapshot(tmp_path, repo: str):
    """A repository in the Hub's cache, as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
    official(folder)
    return folder


def test_a_result_holds_the_name_of_its_source_and_no_path(source, tmp_path, monkeypatch):
    config = json.loads((source / "config.json").read_text())
    config |= {"_name_or_path": str(source)}
    config["text_config"]["_name_or_path"] = "~/secret-place/my-tune"
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": "../secret-place/my-tune", "eos_token": "<eos>"})
    )
    monkeypatch.chdir(source.parent)
    out = tmp_path / "out"
    for name in (str(source), "my-tune", "../secret-place/my-tune/."):
        convert(name, out)  # the same source, however it is named
        assert "secret-place" not in text_of(out)
        record = json.loads((out / "conversion.json").read_text())
        assert record["source"]["name"] == "my-tune"
        assert "`my-tune`" in (out / "README.md").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "<eos>"}
    assert "_name_or_path" not in (out / "config.json").read_text()
    monkeypatch.chdir(source)
    assert convert(".", out).was_there


def test_names_that_are_no_paths_and_other_files_come_along_byte_for_byte(source, tmp_path):
    config = '{"name_or_path":  "google/diffusiongemma-26B-A4B-it", "x": "/a/b"}'
    (source / "tokenizer_config.json").write_text(config)
    (source / "preprocessor_config.json").write_text("{ damaged: /home/me")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").read_text() == config
    for name in ("preprocessor_config.json", *SIDE_FILES):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/x",
        "~/x",
        "./x",
        "../x",
        ".",
        r"C:\Users\me\x",
        "a/b/c",
        "a/b/",
        "file:///x",
        "a b",
    ],
)
def test_a_path_is_told_from_a_name(path):
    nested = {"a": [{"_name_or_path": path, "name_or_path": path, "kept": path}]}
    assert without_paths(nested) == {"a": [{"kept": path}]}


@pytest.mark.parametrize("name", ["google/gemma", "gpt2", "", "a.b-c_d/e", None, 3])
def test_a_name_is_told_from_a_path(name):
    assert without_paths({"_name_or_path": name}) == {"_name_or_path": name}


def test_a_hub_repository_is_named_with_its_commit_however_it_was_given(tmp_path):
    source, out = snapshot(tmp_path, "google/diffusiongemma-26B-A4B-it"), tmp_path / "out"
    convert(source, out)
    record = json.loads((out / "conversion.json").read_text())
    name = "google/diffusiongemma-26B-A4B-it"
    assert record["source"] == {"name": name, "revision": COMMIT, "layout": "bf16"}
    assert card_of(out).data.base_model == name and card_of(out).data.license == "apache-2.0"
    assert f"`{name}` at revision {COMMIT}" in (out / "README.md").read_text()
    assert str(tmp_path) not in text_of(out)
    os.utime(source / "config.json")  # downloaded again
    assert convert(source, out).was_there


def test_only_folders_of_the_hubs_cache_are_repositories(tmp_path):
    for name in ("snapshots/x", "models--a--b/x", "models--a--b/other/x", "a--b/snapshots/x", "/"):
        assert repository(tmp_path / name) is None
    assert repository(tmp_path / "models--a--b/snapshots/x/../x") == ("a/b", "x")
    assert repository(tmp_path / "models--gpt2/snapshots/x") == ("gpt2", "x")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nbase_model: a/b\n---\n", {"base_model": "a/b"}),
        ("---\r\nbase_model: a/b\r\n---\r\n", {"base_model": "a/b"}),
        ("\ufeff---\nbase_model:\n- a/b\n- c/d\n---", {"base_model": ["a/b", "c/d"]}),
        (
            "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "x", "license_link": "LICENSE"},
        ),
        ("---\nbase_model: /home/me/secret-place\n---\n", {}),
        ("---\nbase_model: [../secret-place/x, {}]\nlicense: [mit]\n---\n", {}),
        ("# no front matter\n---\nbase_model: a/b\n---\n", {}),
        ("---\nbase_model: [\n---\n", {}),
        ("---\n- a/b\n---\n", {}),
        ("", {}),
    ],
)
def test_a_card_claims_what_the_sources_card_says(source, tmp_path, card, expected):
    (source / "README.md").write_text(card, "utf-8", newline="")
    convert(source, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    said = card_of(tmp_path / "out").data.to_dict()
    keys = ("base_model", "license", "license_name", "license_link")
    assert {key: said[key] for key in keys if key in said} == expected
    assert "secret-place" not in text and "google/" not in text
    assert ("names its base model" in text) == ("base_model" not in expected)
    assert said["library_name"] == "mlx" and said["tags"] == ["mlx", "diffusion"]


def test_another_repository_is_the_base_of_its_conversion_and_its_terms_are_not_guessed(tmp_path):
    convert(snapshot(tmp_path, "somebody/tune"), tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert front["base_model"] == "somebody/tune" and "license" not in front


def test_a_source_that_is_not_the_recorded_one_is_told_apart_by_its_files(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out)
    before = sums(out)
    same_name = official(tmp_path / "elsewhere/my-tune", seed=1)
    with pytest.raises(SourceError, match="its source is another one or has changed since"):
        convert(same_name, out)
    with pytest.raises(SourceError, match="it has other settings or versions"):
        convert(source, out, quantize=True)
    assert sums(out) == before
    moved = shutil.copytree(source, tmp_path / "third/my-tune")  # with its times, as `cp -a`
    assert convert(moved, out).was_there


def test_the_cache_alone_knows_the_path(source, tmp_path, cache_of_sources):
    convert(source, tmp_path / "out")
    digest = json.loads((tmp_path / "out/conversion.json").read_text())["digest"]
    assert (cache_of_sources / digest).read_text() == str(source)
    assert verify(tmp_path / "out").errors
    (cache_of_sources / digest).unlink()
    assert "the source, my-tune, was not found" in verify(tmp_path / "out").notes[0]
