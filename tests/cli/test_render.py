"""What a terminal shows: a pseudo-terminal of our own reads it back."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text as Styled

from mlx_diffgemma.cli.render import Fitted, View
from mlx_diffgemma.cli.render_watch import WatchView

ROOT = Path(__file__).parents[2]
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def run_in_terminal(
    *arguments: str, stdout_too: bool, columns: int = 80, code: int = 0
) -> tuple[bytes, bytes]:
    """What the terminal received, and what a pipe on stdout did where stdout is no terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_diffgemma", "generate", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave if stdout_too else subprocess.PIPE,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 65536):
            seen += chunk
    except OSError:  # Linux ends a closed terminal so
        pass
    piped = process.stdout.read() if process.stdout else b""
    assert process.wait() == code, seen
    return seen, piped


def test_a_terminal_sees_the_canvas_settle_then_the_answer_and_one_line_of_numbers():
    seen, _ = run_in_terminal("--prompt", "Squares from 2 to 3.", "--seed", "1", stdout_too=True)
    plain = ESCAPE.sub(b"", seen).replace(b"\r", b"")
    assert b"canvas 1, step 1" in plain
    assert b"|n|n*n|\n|-|-|\n|2|4|\n|3|9|\n" in plain
    last = plain.rpartition(b"|3|9|\n")[2].replace(b"\n", b" ")
    for fact in (
        b"tokens/s",
        b"canvas",
        b"steps",
        b"tokens/forward",
        b"ms/step",
        b"peak",
        b"end of answer",
    ):
        assert fact in last


def test_a_pipe_gets_the_bytes_of_the_answer_while_the_terminal_shows_the_canvas():
    seen, piped = run_in_terminal(
        "--prompt", "Squares from 2 to 3.", "--seed", "1", stdout_too=False
    )
    assert piped == b"|n|n*n|\n|-|-|\n|2|4|\n|3|9|\n"
    assert b"canvas 1, step 1" in ESCAPE.sub(b"", seen)


def test_at_60_columns_notes_numbers_and_errors_break_between_words():
    words = ("--prompt", "Squares from 2 to 3.", "--seed", "1")
    seen, _ = run_in_terminal(*words, stdout_too=True, columns=60)
    plain = ESCAPE.sub(b"", seen).replace(b"\r", b"")
    assert plain.startswith(b"loading the model ...")
    assert b"trained on \nsmall puzzles" in plain or b"trained on\nsmall puzzles" in plain
    assert all(len(line) <= 60 for line in plain.rpartition(b"|3|9|\n")[2].splitlines())
    seen, _ = run_in_terminal(*words, "--model", "./there-is-no-such-folder", stdout_too=True,
                              columns=60, code=2)  # fmt: skip
    error = ESCAPE.sub(b"", seen).replace(b"\r", b"").partition(b"error: ")[2]
    assert all(len(line) <= 60 for line in error.splitlines())
    assert b"there-is-no-such-folder" in error
    for wrong in (("--max-tokens", "many more than that"), ("--top-p", "0.5")):
        seen, _ = run_in_terminal(*words, *wrong, stdout_too=True, columns=60, code=2)
        error = ESCAPE.sub(b"", seen).replace(b"\r", b"").partition(b"Error: ")[2]
        assert len(error) > 60 and all(len(line) <= 60 for line in error.splitlines())


def test_control_characters_of_a_draft_do_not_reach_the_terminal():
    from mlx_diffgemma.cli.render import printable

    assert printable("a\x1b[2Jb\tc\nd\x9b") == "a·[2Jb·c\nd·"


def test_accepted_tokens_are_plain_and_the_others_dim(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    view = View(verbose=True)
    view.is_live, output = True, io.StringIO()
    view._console = Console(file=output, force_terminal=True, color_system="standard", width=60)
    view.thought("unfinished thought ")
    view.draft([("kept ", True), ("other", False)], "canvas 1, step 1")
    drawn = output.getvalue()
    view.close()
    assert "\x1b[2munfinished thought \x1b[0mkept \x1b[2;36mother\x1b[0m" in drawn
    assert "\x1b[2;3mcanvas 1, step 1\x1b[0m" in drawn


@pytest.mark.parametrize("height", [1, 2, 3, 5, 40])
def test_a_picture_leaves_one_line_of_the_terminal_free(height):
    console = Console(width=40, height=height, force_terminal=True)
    picture = Fitted(Styled("word " * 200), Styled("canvas 1, step 1"))
    with console.capture() as capture:
        console.print(picture, end="")
    lines = [ESCAPE.sub(b"", line.encode()).decode() for line in capture.get().splitlines()]
    assert len(lines) == min(height - 1, 26)
    if height > 1:
        assert lines[-1].rstrip() == "canvas 1, step 1"
    if 2 < height < 40:
        assert lines[-2] == f"({25 - (height - 3)} more lines)"


def test_thoughts_go_to_stderr_whole_and_do_not_touch_the_answer(capfdbinary):
    view = View(verbose=True)
    long = "a thought that is longer than a line of a terminal " * 3
    for piece in ("I think that ", "this is ", "it.\n", long, "and more"):
        view.thought(piece)
        view.draft([("draft", True)], "canvas 1, step 1")
    view.answer("The answer.")
    view.close()
    out, err = capfdbinary.readouterr()
    assert out == b"The answer.\n"
    assert err.decode() == f"I think that this is it.\n{long}and more\n"


@pytest.mark.parametrize("shares", [True, False])
def test_a_remark_stands_between_the_answer_before_and_behind_it(shares, monkeypatch):
    """On one terminal, the line before it is completed first."""
    written: list[str] = []
    view = View(verbose=True)
    monkeypatch.setattr(view, "_shares_terminal", shares)
    monkeypatch.setattr(view, "_write", lambda text: written.append(text) if text else None)
    monkeypatch.setattr(view, "note", lambda line: written.append(f"({line})"))
    view.answer("one\nso ")
    view.remark("a call\x1b[31m")
    view.answer("then")
    view.close()
    end = "\n" if shares else ""
    assert "".join(written) == f"one\nso {end}(a call·[31m)then\n"


def test_a_remark_waits_while_the_screen_is_taken(monkeypatch):
    view = WatchView()
    seen: list[str] = []
    for name in ("answer", "thought", "remark"):
        monkeypatch.setattr(View, name, lambda _, text, name=name: seen.append(f"{name} {text}"))
    monkeypatch.setattr(view, "_shares_terminal", True)
    view._is_watching = True
    view.thought("a")
    view.answer("b")
    view.remark("c")
    assert seen == []
    view.close()
    assert seen == ["thought a", "answer b", "remark c"]
    view.remark("d")
    assert seen[-1] == "remark d"
