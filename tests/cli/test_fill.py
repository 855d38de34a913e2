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
    assert slot["text"] == "14 15 16" and set(slot["lengths"]) == set("23456789")
    assert found["positions"] > 8 * 64


def test_a_template_from_a_file_or_from_stdin_keeps_its_bytes(tmp_path):
    file = tmp_path / "page.md"
    file.write_bytes("a\\n\r\n\t{{gap:1}}é\n".encode())
    for done in (
        invoke("--file", str(file), "--seed", "1"),
        invoke("-", "--seed", "1", input=file.read_bytes()),
    ):
        assert done.stdout_bytes.startswith(b"a\\n\r\n\t"), done.output
        assert done.stdout_bytes.endswith("é\n".encode())


def test_a_template_that_is_typed_has_line_breaks():
    done = invoke(r"a\n{{gap:1}}\tb", "--seed", "1")
    assert done.stdout.startswith("a\n") and done.stdout.endswith("\tb")


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
        (["{{match: a^b}}"], "no text of this checkpoint's tokens matches it"),
        (["{{gap}}", "--prompt", ""], "the prompt is empty"),
        (["{{gap}}", "--canvas-length", "65"], "canvas_length 65 is longer"),
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
