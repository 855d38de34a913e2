"""What is left of a terminal when a run is stopped: always the screen, and a cursor."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys

import pytest

from tests.cli.test_render import ESCAPE, ROOT

fcntl = pytest.importorskip("fcntl", reason="no pseudo-terminals on this system")
termios = pytest.importorskip("termios", reason="no pseudo-terminals on this system")

# A canvas longer than the terminal, and time to press keys between steps.
SLOW = """
import sys, time
from mlx_diffgemma.cli import generate, render, render_watch
seconds = float(sys.argv.pop(1))
draft, watch = render.View.draft, render_watch.WatchView.watch
def slow_draft(self, pieces, caption):
    draft(self, [("word ", True)] * 500, caption)
    time.sleep(seconds)
def slow_watch(self, tokens, numbers):
    watch(self, list(tokens) * 8, numbers)
    time.sleep(seconds)
render.View.draft, render_watch.WatchView.watch = slow_draft, slow_watch
sys.argv += ["--prompt", "Count from 12 to 18.", "--seed", "1"]
generate.main()
"""
SHOW, HIDE, ENTER, LEAVE = b"\x1b[?25h", b"\x1b[?25l", b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    def __init__(self, *arguments: str, rows: int = 8, columns: int = 40) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
            process_group=0,
        )
        os.close(slave)
        self.seen = b""

    def read_until(self, words: bytes) -> None:
        while words not in self.seen:
            self.seen += os.read(self.master, 65536)

    def end(self) -> int:
        """Read to the end; the exit code."""
        try:
            while chunk := os.read(self.master, 65536):
                self.seen += chunk
        except OSError:  # Linux ends a closed terminal so
            pass
        return self.process.wait()

    @property
    def is_restored(self) -> bool:
        """The cursor is shown, and the first screen is back."""
        return self.seen.rfind(SHOW) > self.seen.rfind(HIDE) and (
            self.seen.rfind(LEAVE) > self.seen.rfind(ENTER) or ENTER not in self.seen
        )


@pytest.mark.parametrize(
    ("number", "view"),
    [(signal.SIGTERM, ()), (signal.SIGTERM, ("--watch",)), (signal.SIGHUP, ("--watch",))],
)
def test_a_signal_to_end_restores_the_terminal(number, view):
    terminal = Terminal("60", *view)
    terminal.read_until(b"step 1")
    assert not terminal.is_restored and (ENTER in terminal.seen) == bool(view)
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    assert terminal.is_restored and b"Traceback" not in terminal.seen


def test_a_terminal_that_is_gone_is_no_other_error():
    terminal = Terminal("2", "--watch")
    terminal.read_until(b"step 1")
    os.close(terminal.master)
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.process.wait() == 128 + signal.SIGHUP


@pytest.mark.parametrize("view", [("--watch",), pytest.param((), marks=pytest.mark.long)])
def test_ctrl_z_gives_the_terminal_back_until_the_run_goes_on(view):
    terminal = Terminal("3", *view)
    terminal.read_until(b"step 1")
    terminal.process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    terminal.read_until(SHOW)
    assert terminal.is_restored
    terminal.process.send_signal(signal.SIGCONT)
    assert terminal.end() == 0
    assert terminal.is_restored and terminal.seen.count(ENTER) == 2 * len(view)
    last = ESCAPE.sub(b"", terminal.seen[terminal.seen.rfind(SHOW) :])
    assert b"12 13 14 15 16 17 18" in ESCAPE.sub(b"", terminal.seen) and b"tokens/forward" in last


@pytest.mark.parametrize(("rows", "columns"), [(5, 80), (8, 40), (2, 20)])
def test_a_canvas_taller_than_the_terminal_scrolls_nothing_away(rows, columns):
    """A terminal's line breaks at its last line are the only way into its history."""
    terminal = Terminal("0", rows=rows, columns=columns)
    assert terminal.end() == 0
    pictures = [part.partition(SHOW)[0] for part in terminal.seen.split(HIDE)[1:]]
    assert any(b"step 1" in picture for picture in pictures)
    for picture in pictures:
        row = highest = 0
        for piece in re.findall(rb"\n|\x1b\[1A", picture):
            row += 1 if piece == b"\n" else -1
            highest = max(highest, row)
        assert highest <= rows - 1
