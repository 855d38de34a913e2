"""mlx_diffgemma.fill as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from mlx_diffgemma.cli.fill import fill


def invoke(*arguments: str, **more):
    app = typer.Typer()
    app.command()(fill)
    return CliRunner().invoke(app, list(arguments), **more)


COUNT = ("12 13 {{n = gap:2..9}} 17 18", "--prompt", "Count from 12 to 18.", "--seed", "1")


def test_the_text_goes_to_stdout_and_nothing_else_does():
    command = [sys.executable, "-m", "mlx_diffgemma", "fill", *COUNT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "12 13 14 15 16 17 18")
    assert "slot n: 8 tokens" in done.stderr and "rows x steps" in done.stderr


def test_json_has_slots_lengths_and_work():
    done = invoke(*COUNT, "--json")
    found = json.loads(done.stdout)
    assert found["text"] == "12 13 14 15 16 17 18" and found["seed"] == 1
    slot = found["slots"]["n"]
    assert slot["text"] == "14 15 16" and slot["lengths"]["8"] > 0.9
    assert set(slot["lengths"]) <= set("23456789") and found["positions"] > 2 * 64


def test_a_template_from_a_file_or_from_stdin_keeps_its_bytes(tmp_path):
    file = tmp_path / "page.md"
    file.write_bytes("a\\n\r\n\t{{gap:1}}é\n".encode())
    for done in (
        invoke("--file", str(file), "--seed", "1"),
        invoke("-", "--seed", "1", input=file.read_bytes()),
    ):
        assert done.stdout_bytes.startswith(b"a\\n\r\n\t"), done.output
        assert done.stdout_bytes.endswith("é\n".encode())


def test_a_template_that_is_typed_is_kept_byte_for_byte():
    done = invoke(r"\textbf{x} {{gap:2}} C:\new", "--seed", "1", "--prompt", r"Go.\n")
    assert done.stdout.startswith(r"\textbf{x} ") and done.stdout.endswith(r" C:\new")


def test_a_byte_order_mark_is_kept(tmp_path):
    file = tmp_path / "page.md"
    file.write_bytes("\ufeff{{gap:1}}é".encode())
    for done in (
        invoke("--file", str(file), "--seed", "1"),
        invoke("-", "--seed", "1", input=file.read_bytes()),
    ):
        assert done.stdout_bytes.startswith(b"\xef\xbb\xbf"), done.output
        assert done.stdout_bytes.endswith("é".encode())


def test_drafts_are_objects_of_their_own_and_tell_what_was_given(tmp_path):
    done = invoke(*COUNT, "--json-drafts", "--trace", str(tmp_path / "run.html"))
    prefill, *events, result = map(json.loads, done.stdout.splitlines())
    assert (prefill["event"], result["event"]) == ("prefill", "result")
    steps = [event for event in events if event["event"] == "step"]
    # The length is open at first: only what stands before the slot is given.
    assert [token["pinned"] for token in steps[0]["tokens"]][:7] == [True] * 6 + [False]
    assert result["text"] == "12 13 14 15 16 17 18"
    trials = [event for event in events if event["event"] == "trial"]
    assert [trial["lengths"] for trial in trials] == [{"n": None}, {"n": 8}]
    assert [trial["final"] for trial in trials] == [False, True]
    assert events[-1]["draft"] == "12 13 14 15 16 17 18"
    tokens = events[-1]["tokens"]
    assert "".join(token["text"] for token in tokens) == events[-1]["draft"]
    given = "".join(token["text"] for token in tokens if token["pinned"])
    assert given == "12 13  17 18"
    assert all(token["certainty"] == 1 for token in tokens if token["pinned"])
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["text"]["answer"] == result["text"] and len(kept["canvases"]) == len(trials)


def test_watch_shows_the_steps_of_the_text_where_there_is_no_terminal():
    """And of the length only that it is looked for."""
    done = invoke(*COUNT, "--watch")
    assert done.stdout == "12 13 14 15 16 17 18"
    lines = [line for line in done.stderr.splitlines() if line.startswith("canvas 1")]
    assert lines[0] == "canvas 1: looking for the length of slot n"
    assert lines[1].startswith("canvas 1, final text (slot n with 8 tokens), step 1: ")
    assert all(", final text (" in line for line in lines[1:])
    assert " of 8 accepted, mean entropy" in lines[1]
    assert lines[-1].startswith("canvas 1, final text (slot n with 8 tokens), step ")
    assert lines[-1].endswith("draft: 12 13 14 15 16 17 18")
    done = invoke(*COUNT, "--watch", "--json-drafts")
    assert done.exit_code == 2 and "--watch shows what --json-drafts is to leave" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a {{gp}}"], "template, line 1, column 5: 'gp' is not a slot"),
        (["plain"], "the template has no slot"),
        ([], "give a template, or a file with --file"),
        (["{{gap}}", "--file", "x"], "one of the two"),
        (["--file", "missing.md"], "missing.md cannot be read"),
        (["{{gap}}", "--gap-tokens", "0..3"], "--gap-tokens must be M..N with 1 <= M <= N"),
        (["{{gap:99}}"], "slot 1 is to have at least 99 tokens, and a canvas holds 64"),
        (["{{match: a^b}}"], "slot 1: match: no text fits this expression"),
        ([r"{{match: [^\s\S]}}"], "slot 1: match: no text fits this expression"),
        ([r"{{match: (a)\1}}"], "back-references are not supported: \\1"),
        (['{{json: {"type": "x"}}}'], "column 3: slot 1: json: "),
        (["{{gap}}", "--prompt", ""], "the prompt is empty"),
        (["{{gap}}", "--canvas-length", "65"], "--canvas-length 65 is longer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a").write_bytes(b"{{gap}}\xff")
    done = invoke("--file", str(tmp_path / "a"))
    assert done.exit_code == 2 and "is not UTF-8" in done.stderr
