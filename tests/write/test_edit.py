"""Editing: selections, what stays byte for byte, diffs and files."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from typer.testing import CliRunner

import mlx_diffgemma
from mlx_diffgemma import GenerationSettings, Selection, edit
from mlx_diffgemma.cli.edit import _name_in_diff
from mlx_diffgemma.cli.edit import edit as edit_command
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import TemplateError
from mlx_diffgemma.language.prompt import encode_text
from mlx_diffgemma.write.edit import Edited
from mlx_diffgemma.write.fill import FillTask
from tests.sampled import first

TEXT = "one\ntwo thrée\r\nfour\n"


@functools.cache
def bundled():
    return mlx_diffgemma.load(mlx_diffgemma.bundled_model())


@pytest.mark.parametrize(
    ("places", "part"),
    [
        ("1:1-1:4", "one"),
        ("2:5-2:10", "thrée"),
        ("1:4-2:1", "\n"),
        ("2:1-3:3", "two thrée\r\nfo"),
        ("4:1-4:1", ""),
        ("1:1-4:1", TEXT),
        ("2-2", "two thrée"),
        ("2", "two thrée"),
        ("1-2", "one\ntwo thrée"),
        ("1 - 3", "one\ntwo thrée\r\nfour"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_selection_by_lines_and_columns(places, part, mark):
    text = mark + TEXT
    selection = Selection.of_places(text, places)
    assert text[selection.start : selection.stop] == part


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ("12:3", "is not line:column-line:column"),
        ("a:1-2:2", "is not line:column-line:column"),
        ("1:1-2", "and not whole lines, such as 12-14"),
        ("1-", "and not whole lines, such as 12-14"),
        ("-1", "and not whole lines, such as 12-14"),
        ("3-2", "ends before it begins"),
        ("1-5", "outside of the file: it has 3 lines"),
        ("4-4", "outside of the file: it has 3 lines"),
        ("0-1", "outside of the file"),
        ("5:1-5:2", "outside of the file: it has 3 lines"),
        ("0:1-1:1", "outside of the file"),
        ("1:5-1:6", "line 1 has 3 characters"),
        ("2:3-1:2", "ends before it begins"),
    ],
)
def test_a_selection_that_is_none(places, message):
    with pytest.raises(TemplateError, match=re.escape(message)):
        Selection.of_places(TEXT, places)


def test_a_selection_by_its_text():
    assert Selection.of_match("a bc d", "bc") == Selection(2, 4)
    for part, message in (("x", "is not in"), ("a", "occurs 2 times"), ("", "is empty")):
        with pytest.raises(TemplateError, match=message):
            Selection.of_match("a ba", part)


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert Selection.of_match("\ufeffab", "ab") == Selection(1, 3)
    assert Selection.of_match("\ufeffab", "\ufeffab") == Selection(1, 3)
    with pytest.raises(TemplateError, match="is empty"):
        Selection.of_match("\ufeffab", "\ufeff")


@pytest.mark.parametrize("selection", first(1, [Selection(0, 5), Selection(1, 5)]))
def test_a_byte_order_mark_stays_and_the_model_does_not_see_it(selection):
    text = "12 13 14"
    chosen = {"settings": GenerationSettings(seed=1), "gap_tokens": (5, 5)}
    marked = edit(*bundled(), "\ufeff" + text, selection, "Count.", **chosen)
    plain = edit(*bundled(), text, Selection(0, 4), "Count.", **chosen)
    assert marked.text == "\ufeff" + plain.text and marked.replacement == plain.replacement
    assert marked.filled.prompt_tokens == plain.filled.prompt_tokens
    assert b"\n-\xef\xbb\xbf12 13" in marked.diff("f").encode()


def test_everything_around_the_selection_stays():
    document = "12 13 14 15 16 17\r\n\tend \u2028 é"
    selection = Selection.of_match(document, "14 15")
    done = edit(*bundled(), document, selection, "Count.", settings=GenerationSettings(seed=1))
    assert done.text == document[: selection.start] + done.replacement + document[selection.stop :]
    assert 2 <= len(done.filled.slots["selection"].tokens) <= 18


@pytest.mark.parametrize("gap_tokens", [(5, 5), (4, 7)])
def test_an_edit_can_begin_from_the_text_that_stands(gap_tokens):
    document, chosen = "12 13 14 15 16 17\r\n\tend", {"gap_tokens": gap_tokens}
    selection = Selection.of_match(document, "14 15")
    starts, stands = [], []

    def noted(*arguments, start=None, **more):
        starts.append(start)
        stands.append(more.get("stands"))
        return Row(*arguments, start=start, **more)

    # So low a share keeps whatever is no longer or shorter.
    settings = GenerationSettings(seed=1, warm_start=1e-30)
    with patch("mlx_diffgemma.write.writer.Row", noted):
        done = edit(*bundled(), document, selection, "Count.", settings=settings, **chosen)
    assert done.text == document[: selection.start] + done.replacement + document[selection.stop :]
    if gap_tokens == (5, 5):  # no search: the text's own first look keeps
        assert starts[-1] is None and stands[-1].found is not None
        kept = stands[-1].found
    else:
        assert stands[-1] is None
        kept = starts[-1]
    text = bundled()[1].decode(kept[kept >= 0].tolist())
    assert "14 15"[:4] in text or "4 15" in text


def test_a_cold_edit_keeps_nothing():
    settings = GenerationSettings(seed=1)
    document = "12 13 14 15 16 17"
    with patch("mlx_diffgemma.denoise.warm.keep") as keep:
        edit(*bundled(), document, Selection(6, 11), "Count.", settings=settings)
    keep.assert_not_called()


def edited(before: str, after: str) -> Edited:
    return Edited(after, before, Selection(0, 0), None)


@pytest.mark.parametrize(
    ("before", "after"),
    [("a\nb\nc\n", "a\nx\nc\n"), ("a", "a\n"), ("", "a"), ("a\u2028b\r\nc", "a\u2028x\r\nc")],
)
@pytest.mark.parametrize("command", [["git", "apply", "diff"], ["patch", "-p1", "-i", "diff"]])
@pytest.mark.parametrize(
    "name",
    ["f", "a b.md", "d/é 日.md", 'q"u\\o', "t\ta\nb", "b\udce9d", "x 2026-01-01 00:00:00 +0000"],
)
def test_patch_makes_the_new_document_of_the_old_one(before, after, name, command, tmp_path):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    if command[0] == "patch" and "\n" in name:
        pytest.skip("patch takes no name with a line break")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(before.encode())
    (tmp_path / "diff").write_bytes(edited(before, after).diff(name).encode())
    subprocess.run(command, cwd=tmp_path, check=True)
    assert file.read_bytes() == after.encode()
    assert edited(before, before).diff("f") == ""


def test_a_diff_names_the_file_and_ends_without_a_line_break():
    assert edited("a\nb", "a\nc").diff("f.md") == (
        "--- a/f.md\n+++ b/f.md\n@@ -1,2 +1,2 @@\n a\n-b\n\\ No newline at end of file\n"
        "+c\n\\ No newline at end of file\n"
    )


@pytest.mark.parametrize(
    ("selection", "instruction", "message"),
    [
        (Selection(0, 99), "Do.", "lies outside of the document's 5 characters"),
        (Selection(0, 2), "  ", "the instruction is empty"),
    ],
)
def test_what_cannot_be_edited(selection, instruction, message):
    with pytest.raises(TemplateError, match=message):
        edit(*bundled(), "a b c", selection, instruction)


def test_a_selection_longer_than_a_canvas():
    with pytest.raises(TemplateError, match="has 70 tokens, more than a canvas of 64 holds"):
        edit(*bundled(), "x" * 70, Selection(0, 70), "Do.")


# The command


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mlx_diffgemma", "edit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes("é 12 13 14 15\r\nend".encode())
    path.chmod(0o640)
    return path


def test_in_place_keeps_permissions_links_and_everything_else(file, tmp_path):
    link = tmp_path / "link.md"
    link.symlink_to(file)
    options = ("--match", "13 14", "--prompt", "Count.", "--seed", "1", "--in-place")
    done = run(link, *options)
    assert (done.returncode, done.stdout) == (0, b"")
    after = file.read_bytes()
    assert after.startswith("é 12 ".encode()) and after.endswith(b" 15\r\nend")
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link.md", "notes.md"]


def test_stdout_is_the_document_and_diff_a_diff(file):
    before = file.read_bytes()
    options = ("--select", "1:6-1:11", "--prompt", "Count.", "--seed", "1")
    plain, diff = run(file, *options), run(file, *options, "--diff")
    assert plain.stdout.startswith("é 12 ".encode()) and plain.stdout.endswith(b" 15\r\nend")
    assert diff.stdout.startswith(b"--- a/notes.md\n+++ b/notes.md\n@@ -1,2 +1,")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match", "zzz"], "'zzz' is not in the document"),
        (["--select", "9:1-9:2"], "outside of the file: it has 2 lines"),
        ([], "say what to rewrite, with --select or with --match"),
        (["--select", "1:1-1:2", "--match", "é"], "say what to rewrite"),
        (["--match", "13", "--diff", "--in-place"], "choose one of the two"),
        (["--match", "13", "--diff", "--json"], "choose one of the two"),
        (["--select", "1:2-3"], "is not line:column-line:column"),
        (["--match", "13", "--gap-tokens", "9..2"], "--gap-tokens must be M..N"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(file, arguments, message):
    before = file.read_bytes()
    done = CliRunner().invoke(edit_app(), [str(file), "--prompt", "Do.", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert file.read_bytes() == before and done.stdout == ""


def test_a_document_from_stdin_and_whole_lines():
    document = "\ufeffé\n12 13 14 15\r\nend".encode()
    arguments = ["-", "--select", "2", "--prompt", "Count.", "--seed", "1", "--gap-tokens", "5"]
    done = CliRunner().invoke(edit_app(), arguments, input=document)
    assert done.exit_code == 0, done.stderr
    assert done.stdout_bytes.startswith("\ufeffé\n".encode())
    assert done.stdout_bytes.endswith(b"\r\nend") and done.stdout_bytes != document
    done = CliRunner().invoke(edit_app(), [*arguments, "--json"], input=document)
    found = json.loads(done.stdout)
    assert found["text"] == f"\ufeffé\n{found['replacement']}\r\nend"
    assert found["selection"] == {"start": 3, "stop": 14, "text": "12 13 14 15"}
    assert (found["tokens"], found["seed"], found["canvases"]) == (5, 1, 1)
    assert 0 < found["certainty"] <= 1
    done = CliRunner().invoke(edit_app(), [*arguments, "--in-place"], input=document)
    assert done.exit_code == 2 and "--in-place needs a file" in done.stderr
    done = CliRunner().invoke(edit_app(), [*arguments, "--diff"], input=document)
    assert done.stdout_bytes.startswith(b"--- a/stdin\n+++ b/stdin\n@@ -1,3 +1,")


@pytest.mark.parametrize("here", first(1, ["docs/deep", ".", "docs"]))
def test_git_applies_a_diff_where_the_user_stands(here, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    file = tmp_path / "docs" / "deep" / "é notes.md"
    file.parent.mkdir(parents=True)
    file.write_bytes("\ufeff12 13 14 15\r\nend".encode())
    monkeypatch.chdir(tmp_path / here)
    name = os.path.relpath(file)
    arguments = [name, "--match", "13 14", "--prompt", "Count.", "--seed", "1", "--gap-tokens", "5"]
    plain = CliRunner().invoke(edit_app(), arguments).stdout_bytes
    diff = CliRunner().invoke(edit_app(), [*arguments, "--diff"]).stdout_bytes
    assert f"+++ b/{name}\t\n".encode() in diff
    subprocess.run(["git", "apply"], input=diff, check=True)
    assert file.read_bytes() == plain != "\ufeff12 13 14 15\r\nend".encode()


def test_a_file_elsewhere_is_named_from_the_top_of_its_repository(tmp_path, monkeypatch):
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "repository" / "docs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _name_in_diff(Path("../repository/docs/a.md")) == "docs/a.md"
    assert _name_in_diff(Path("../b.md")) == "b.md"
    (tmp_path / "repository" / "link.md").symlink_to(tmp_path / "repository" / "docs" / "a.md")
    monkeypatch.chdir(tmp_path / "repository")
    assert _name_in_diff(Path("link.md")) == "docs/a.md"


def edit_app():
    app = typer.Typer()
    app.command()(edit_command)
    return app


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    for name, content, message in (
        ("a", b"\xff\xfe", "is not UTF-8"),
        ("b", None, "cannot be read"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        done = CliRunner().invoke(edit_app(), [str(path), "--prompt", "Do.", "--match", "x"])
        assert done.exit_code == 2 and message in done.stderr, done.stderr


def test_a_file_that_changed_meanwhile_is_left_alone(file, monkeypatch):
    reads = []

    def read(path):
        reads.append(path)
        if len(reads) == 2:
            file.write_bytes(b"somebody else's")
        return path.read_bytes()

    monkeypatch.setattr("mlx_diffgemma.cli.edit.read_file", read)
    options = ["--match", "13 14", "--prompt", "Do.", "--seed", "1", "--in-place"]
    done = CliRunner().invoke(edit_app(), [str(file), *options])
    assert done.exit_code == 2 and "has changed on disk since it was read" in done.stderr
    assert file.read_bytes() == b"somebody else's"


def test_a_selection_may_be_a_string():
    loaded = mlx_diffgemma.load(mlx_diffgemma.bundled_model())
    settings = GenerationSettings(seed=1, max_denoising_steps=2)
    told = [
        mlx_diffgemma.edit(*loaded, "1 2\n3 4\n", where, "x", gap_tokens=(3, 3), settings=settings)
        for where in ("2-2", Selection(4, 7))
    ]
    assert told[0].text == told[1].text and told[0].text.startswith("1 2\n")
    with pytest.raises(TemplateError, match="a selection is a Selection or a string such as"):
        mlx_diffgemma.edit(*loaded, "1 2", [(0, 1)], "x")
    with pytest.raises(TemplateError, match="outside of the file: it has 1 line"):
        mlx_diffgemma.edit(*loaded, "1 2", "7-7", "x")


def test_the_instruction_may_come_from_stdin(file):
    words = ["--match", "13", "--gap-tokens", "2", "--seed", "1", "--max-denoising-steps", "2"]
    told = [
        CliRunner().invoke(edit_app(), [str(file), *words, "--prompt", given], input="Say b.")
        for given in ("-", "Say b.")
    ]
    assert told[0].exit_code == 0 and told[0].stdout == told[1].stdout
    done = CliRunner().invoke(edit_app(), ["-", *words, "--prompt", "-"], input="12 13")
    assert done.exit_code == 2 and "cannot both be read from stdin" in done.stderr


@functools.cache
def long_document() -> str:
    return "".join(f"{i} is a number, é\n" for i in range(300))


@pytest.mark.parametrize("window", [None, 120, 1])
@pytest.mark.parametrize("lines", ["1", "150-151", "300"])
def test_a_long_document_is_seen_around_the_selection(window, lines):
    loaded, document = mlx_diffgemma.load(mlx_diffgemma.bundled_model()), long_document()
    settings = GenerationSettings(seed=1, max_denoising_steps=1)
    asked = []
    watched = patch(
        "mlx_diffgemma.write.edit.FillTask", lambda **k: asked.append(k) or FillTask(**k)
    )
    with watched:
        done = mlx_diffgemma.edit(
            *loaded, document, lines, "Do.", settings=settings, window_tokens=window
        )
    start, stop = done.selection.start, done.selection.stop
    assert done.text == document[:start] + done.replacement + document[stop:]
    (more,) = asked
    template = more["template"]
    at = next(i for i, part in enumerate(template.parts) if not isinstance(part, str))
    before, behind = "".join(template.parts[:at]), "".join(template.parts[at + 1 :])
    assert document[:start].endswith(before) and document[stop:].startswith(behind)
    shown = f"{before}[[[{document[start:stop]}]]]{behind}"
    assert more["prompt"].endswith(f"\n\n{shown}")
    seen = before + document[start:stop] + behind
    count = len(encode_text(loaded[1], seen))
    assert "of the document's" in done.filled.notes[0]
    if window == 1:
        assert not before and not behind
    elif window is not None:
        assert window * 0.6 < count <= window
        assert before == "" or (before[0].isdigit() and before.endswith("\n"))  # whole lines
    else:
        most = loaded[0].config.text.max_position_embeddings
        assert 0.3 * most < count < 0.5 * most
        assert 2 * count + 64 <= most


def test_a_short_document_is_seen_as_a_whole():
    loaded = mlx_diffgemma.load(mlx_diffgemma.bundled_model())
    settings = GenerationSettings(seed=1, max_denoising_steps=1)
    done = mlx_diffgemma.edit(*loaded, "1\n2\n3\n", "2", "x", settings=settings)
    assert not any("of the document's" in note for note in done.filled.notes)
    with pytest.raises(TemplateError, match="window_tokens must be at least 1, got 0"):
        mlx_diffgemma.edit(*loaded, "1", "1", "x", window_tokens=0)


def test_the_window_is_an_option(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(long_document())
    words = ["--select", "150", "--prompt", "Do.", "--seed", "1", "--max-denoising-steps", "1"]
    done = CliRunner().invoke(edit_app(), [str(file), *words, "--window-tokens", "90"])
    assert done.exit_code == 0 and done.stdout.startswith("0 is a number, é\n1 is")
    assert re.search(r"the model saw \d\d of the document's [\d,]+ characters", done.stderr)
    done = CliRunner().invoke(edit_app(), [str(file), *words, "--window-tokens", "0"])
    assert done.exit_code == 2
