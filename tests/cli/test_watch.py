"""The canvas in colour: what a terminal of any size shows, and what is written where there is
none."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_diffgemma import bundled_model, load_tokenizer
from mlx_diffgemma.cli.generate import generate
from mlx_diffgemma.cli.render_watch import (
    BAND_STYLES,
    Frame,
    StepNumbers,
    WatchView,
    canvas_text,
    plain_draft,
)
from mlx_diffgemma.events import StepDone
from mlx_diffgemma.language.prompt import special_tokens
from mlx_diffgemma.language.text import CanvasToken, Spellings, canvas_tokens
from tests.cli.test_cli import ROOT, TABLE, TABLE_ANSWER, assert_one_line, invoke
from tests.cli.test_render import ESCAPE, run_in_terminal

TOKENIZER = load_tokenizer(bundled_model())
NUMBERS = StepNumbers(canvas_index=0, step=2, accepted_tokens=25, tokens=32, mean_entropy=0.1234)
CAPTION = "canvas 1, step 3: 25 of 32 accepted, mean entropy 0.123 nats"


def word(text: str, *, accepted: bool = True, band: int = 4, kind="text") -> CanvasToken:
    return CanvasToken(text, kind, accepted, band)


def drawn(frame: Frame, width: int, height: int = 20, **options) -> list[str]:
    """The lines that a terminal of this size gets, with their escapes."""
    console = Console(width=width, height=height, force_terminal=True, record=False, **options)
    with console.capture() as capture:
        console.print(frame, end="")
    return capture.get().splitlines()


def plain(lines: list[str]) -> list[str]:
    return [ESCAPE.sub(b"", line.encode()).decode().rstrip() for line in lines]


# --- what a token looks like ---


def test_a_draft_becomes_tokens_with_their_kind_decision_and_band():
    special = special_tokens(TOKENIZER)
    draft = [special["<pad>"], special["<eos>"], special["<|channel>"], *TOKENIZER.encode("a")[-1:]]
    certainty = [0.0, 0.25, 0.9499, 0.95]
    event = StepDone(
        0,
        0,
        mx.array([draft]),
        mx.array([[True, False, True, False]]),
        mx.zeros((1, 4)),
        mx.array([certainty]),
    )
    assert canvas_tokens(Spellings(TOKENIZER), event, [special["<eos>"]], special["<pad>"]) == [
        word("<pad>", kind="pad", band=0),
        word("<eos>", kind="end", band=1, accepted=False),
        word("<|channel>", kind="control", band=3),
        word("a", band=4, accepted=False),
    ]


def test_bytes_and_ids_without_a_spelling_are_shown_by_name():
    half = TOKENIZER.convert_tokens_to_ids("<0xE2>")
    spellings = Spellings(TOKENIZER)
    assert spellings[half] == "<0xE2>"
    assert spellings[5000] == "<5000>"


def test_ends_padding_breaks_and_control_characters_are_signs():
    tokens = [word("a\x1b[2J\n"), word("<pad>", kind="pad"), word("<eos>", kind="end"), word("b")]
    assert canvas_text(tokens).plain == "a·[2J⏎\n·∎b"
    assert plain_draft(tokens) == "a·[2J⏎·"


# --- the picture ---


@pytest.mark.parametrize("width", [60, 200])
def test_a_picture_keeps_to_the_width_and_shows_canvas_numbers_and_legend(width):
    frame = Frame("before ", [word("token ", band=i % 5) for i in range(60)], NUMBERS)
    lines = plain(drawn(frame, width))
    assert max(map(len, lines)) == width
    text = " ".join(" ".join(lines).split())
    assert text.startswith("before token token")
    assert text.count("token") == 60
    assert CAPTION in text
    legend = "certainty 0-25% 25-50% 50-75% 75-95% 95-100% | renoised, else accepted"
    assert f"{legend} | ∎ end · padding ⏎ line break" in text


def test_certainty_is_a_colour_and_renoised_is_underlined():
    tokens = [word(f"w{i}", band=i, accepted=i != 2) for i in range(len(BAND_STYLES))]
    first = drawn(Frame("", tokens, NUMBERS), 60, color_system="standard")[0]
    codes = {"red": 31, "magenta": 35, "yellow": 33, "cyan": 36, "green": 32}
    for i, style in enumerate(BAND_STYLES):
        lined = "4;" if i == 2 else ""
        assert f"\x1b[{lined}{codes[style]}mw{i}" in first


def test_without_colour_the_decision_can_still_be_seen():
    tokens = [word("kept"), word("anew", accepted=False)]
    first = drawn(Frame("", tokens, NUMBERS), 60, no_color=True)[0]
    assert first == "kept\x1b[4manew\x1b[0m"


@pytest.mark.parametrize("height", [3, 5, 8, 20])
def test_a_low_terminal_cuts_the_text_and_keeps_the_numbers(height):
    frame = Frame("long ago\n" * 30, [word(f"line {i}\n") for i in range(30)], NUMBERS)
    lines = plain(drawn(frame, 80, height))
    assert len(lines) == height
    assert CAPTION in lines
    if height >= 8:
        assert lines[1] == "line 0⏎" or lines[0] == "line 0⏎"
        assert any(re.fullmatch(r"\(\d+ more lines\)", line) for line in lines)
        assert any(line.startswith("certainty 0-25%") for line in lines)


def test_of_the_text_before_a_short_canvas_the_end_is_shown():
    frame = Frame("".join(f"old {i}\n" for i in range(30)), [word("new")], NUMBERS)
    lines = plain(drawn(frame, 120, 8))
    assert lines[:6] == ["old 26", "old 27", "old 28", "old 29", "new", "─" * 120]


def test_given_text_is_dim_and_the_legend_says_so():
    given = CanvasToken("given ", "text", True, 4, pinned=True)
    numbers = StepNumbers(0, 0, 1, 1, 0.5, "one of 8 lengths (n 2)")
    lines = drawn(Frame("", [given, word("own")], numbers), 200, color_system="standard")
    assert lines[0] == "\x1b[2mgiven \x1b[0m\x1b[32mown\x1b[0m"
    assert plain(lines)[2].startswith("canvas 1, one of 8 lengths (n 2), step 1: 1 of 1 ")
    assert "renoised, else accepted | given text | ∎ end" in plain(lines)[3]
    assert "given text" not in "".join(plain(drawn(Frame("", [word("own")], NUMBERS), 200)))


def test_a_drawn_picture_follows_a_new_size():
    frame = Frame("", [word("token ") for _ in range(60)], NUMBERS)
    assert len(drawn(frame, 40)) > len(drawn(frame, 200))


# --- on a terminal, and without one ---


def test_on_a_terminal_the_picture_comes_and_goes_and_the_answer_stays():
    seen, _ = run_in_terminal(*TABLE[:2], "--seed", "3", "--watch", stdout_too=True)
    enter, leave = seen.index(b"\x1b[?1049h"), seen.rindex(b"\x1b[?1049l")
    shown = ESCAPE.sub(b"", seen[enter:leave]).decode()
    assert "canvas 1, step 1: " in shown and "mean entropy" in shown and "75-95%" in shown
    after = ESCAPE.sub(b"", seen[leave:]).replace(b"\r", b"").decode()
    assert TABLE_ANSWER in after and "tokens/forward" in after
    assert TABLE_ANSWER not in shown.replace("\r", "")


def test_a_pipe_gets_the_answer_while_the_terminal_shows_the_picture():
    seen, piped = run_in_terminal(*TABLE, "--watch", stdout_too=False)
    assert piped.decode() == TABLE_ANSWER
    assert b"\x1b[?1049h" in seen and b"|2|4|\n" not in seen[seen.rindex(b"\x1b[?1049l") :]


def test_without_a_terminal_each_step_is_one_line_on_stderr():
    result = invoke(generate, *TABLE, "--watch")
    assert (result.exit_code, result.stdout) == (0, TABLE_ANSWER)
    _, *lines = result.stderr.splitlines()
    form = r"canvas 1, step (\d+): \d+ of 64 accepted, mean entropy \d+\.\d{3} nats, draft: .*"
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), lines
    assert [int(match[1]) for match in found] == list(range(1, len(lines) + 1))
    assert lines[-1].endswith("draft: " + TABLE_ANSWER.rstrip("\n").replace("\n", "⏎"))


def test_what_waits_for_the_screen_keeps_its_order(capfdbinary, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    view = WatchView()
    view.is_live, view._shares_terminal = True, True
    view._console = Console(file=io.StringIO(), force_terminal=True)
    view.watch([word("draft")], NUMBERS)
    view.thought("I think.\n")
    view.answer("one ")
    view.watch([word("draft")], NUMBERS)
    view.answer("two\n")
    assert capfdbinary.readouterr().out == b""
    view.close()
    assert capfdbinary.readouterr().out == b"one two\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("--json",), "--json"), (("--verbose", "False"), "--verbose False")],
)
def test_watch_is_refused_where_nothing_is_to_be_shown(arguments, expected):
    result = invoke(generate, "--prompt", "x", "--model", "./none", "--watch", *arguments)
    assert_one_line(result, f"--watch shows what {expected} is to leave out")


def test_the_picture_follows_the_terminal_when_its_size_changes():
    """A rule as wide as the terminal stands under the canvas."""
    fcntl = pytest.importorskip("fcntl", reason="no pseudo-terminals on this system")
    termios = pytest.importorskip("termios")
    master, slave = os.openpty()

    def resize(rows: int, columns: int) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    resize(16, 60)
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, "--prompt", "Count from 12 to 36.", "--seed", "1"],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )
    os.close(slave)
    seen, sizes = b"", [(16, 200), (8, 40)]
    try:
        while chunk := os.read(master, 65536):
            seen += chunk
            if sizes and seen.count(b"accepted, mean") >= 2 * (3 - len(sizes)):
                resize(*sizes.pop(0))
    except OSError:  # Linux ends a closed terminal so
        pass
    assert process.wait() == 0, seen
    rules = [len(rule) for rule in re.findall("─+", seen.decode())]
    assert {60, 200, 40} == set(rules)
    assert "12 13 14 15" in ESCAPE.sub(b"", seen[seen.rindex(b"\x1b[?1049l") :]).decode()


# Between its steps no event comes, and the picture follows all the same.
SLOW_STEPS = """
import sys, time
from mlx_diffgemma.cli import generate, render_watch
watch = render_watch.WatchView.watch
def slow(self, *event):
    watch(self, *event)
    time.sleep(0.3)
render_watch.WatchView.watch = slow
sys.argv += ["--watch", "--max-denoising-steps", "4"]
generate.main()
"""
