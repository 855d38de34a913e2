"""Draw docs/settling.svg: one canvas of the bundled model, step by step, from a real run.

    python docs/picture.py            # prints the picture
    python docs/picture.py --write    # writes docs/settling.svg

The run has default settings and a fixed seed. A test checks that it draws the same bytes again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from mlx_diffgemma import GenerationSettings, SeededNoise, bundled_model, load, stream_generate
from mlx_diffgemma.events import StepDone
from mlx_diffgemma.language.text import CERTAINTY_BANDS, Spellings, canvas_tokens

FILE = Path(__file__).parent / "settling.svg"
# A puzzle that the model was not trained on, and a seed whose certainties all lie 0.01 or more from
# the border of a colour, so that another machine's rounding draws the same picture.
PUZZLE = ("..426.", "..3.1.", "...42.", "241356", "3.264.", ".65.32")
SEED = 2
ROWS, COLUMNS = 6, 6

WIDTH, MARGIN, TOP = 800, 20, 52
CELL_WIDTH, CELL_HEIGHT = 15, 21
PANEL_STRIDE = 112
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# By certainty, from unsure to sure: the cell's colour in light mode and in dark mode.
BANDS = (
    ("#ff9c8f", "#a33a2c"),
    ("#ffb877", "#96561a"),
    ("#ffd98a", "#7d6514"),
    ("#e4ec9f", "#586a1c"),
    ("#d5efd8", "#1f4a2b"),
)
STYLE = """\
  .card { fill: #ffffff; stroke: #d0d7de }
  text { fill: #1f2328; font-size: 15px; text-anchor: middle }
  .title { font-size: 13px; font-weight: 600 }
  .note { font-size: 12px; fill: #59636e }
  .legend { text-anchor: start }
  .plain { fill: #eff2f5 }
  .renoised { fill: none; stroke: #1f2328; stroke-width: 1.5; stroke-dasharray: 3 2 }
"""
DARK = """\
    .card { fill: #0d1117; stroke: #3d444d }
    text { fill: #f0f6fc }
    .note { fill: #9198a1 }
    .plain { fill: #212830 }
    .renoised { stroke: #f0f6fc }
"""


@dataclass(frozen=True)
class Cell:
    """One position of the canvas."""

    text: str
    colour: str  # the name of its class
    renoised: bool = False


@dataclass(frozen=True)
class Panel:
    """The grid at one moment."""

    title: str
    note: str
    cells: list[Cell]  # row by row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into {FILE.name}")
    options = parser.parse_args()
    picture = draw(panels())
    if options.write:
        FILE.write_text(picture, encoding="utf-8")
    else:
        print(picture, end="")


def panels() -> list[Panel]:
    """Run the model and return what the picture shows: prompt, first noise, and every step."""
    model, tokenizer = load(bundled_model())
    spellings, vocab_size = Spellings(tokenizer), model.config.text.vocab_size
    settings = GenerationSettings(seed=SEED)
    resolved = settings.resolve(model.config)
    noise = SeededNoise(SEED).start(0, (1, resolved.canvas_length), vocab_size)
    given = [Cell("" if letter == "." else letter, "plain") for row in PUZZLE for letter in row]
    start = [Cell(_glyph(spellings[token]), "plain") for token in np.array(noise[0]).tolist()]
    found = [Panel("prompt", "a 6x6 Sudoku", given), Panel("start", "noise", _grid(start))]
    prompt = "\n".join(("Sudoku:", *PUZZLE))
    for event in stream_generate(model, tokenizer, prompt, settings=settings):
        if isinstance(event, StepDone):
            tokens = canvas_tokens(spellings, event, resolved.eos_token_ids, resolved.pad_token_id)
            cells = [Cell(_glyph(t.text), f"band{t.band}", not t.accepted) for t in tokens]
            accepted = sum(token.accepted for token in tokens)
            found.append(
                Panel(f"step {event.step + 1}", f"{accepted} of {len(tokens)}", _grid(cells))
            )
    return found


def draw(shown: list[Panel]) -> str:
    """Return the picture as SVG."""
    height = TOP + ROWS * CELL_HEIGHT + 78
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" font-family="{FONT}">',
        "<title>A canvas settles: from noise to a solved Sudoku</title>",
        f"<style>\n{STYLE}{_band_rules(0)}"
        f"  @media (prefers-color-scheme: dark) {{\n{DARK}{_band_rules(1)}  }}\n</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]
    for index, panel in enumerate(shown):
        lines += _panel(panel, MARGIN + index * PANEL_STRIDE)
    return "\n".join([*lines, *_legend(height - 24), "</svg>", ""])


def _grid(cells: list[Cell]) -> list[Cell]:
    """The rows of the answer, without the line break behind each."""
    return [cell for i, cell in enumerate(cells[: ROWS * (COLUMNS + 1)]) if (i + 1) % (COLUMNS + 1)]


def _glyph(text: str) -> str:
    """A token in one column; a box for control tokens, bytes and blanks."""
    return text if len(text) == 1 and text.isprintable() and not text.isspace() else "▫"


def _band_rules(mode: int) -> str:
    return "".join(f"  .band{i} {{ fill: {pair[mode]} }}\n" for i, pair in enumerate(BANDS))


def _panel(panel: Panel, left: int) -> Iterator[str]:
    middle = left + COLUMNS * CELL_WIDTH // 2
    yield _text(middle, TOP - 26, panel.title, "title")
    yield _text(middle, TOP - 10, panel.note, "note")
    for index, cell in enumerate(panel.cells):
        row, column = divmod(index, COLUMNS)
        x, y = left + column * CELL_WIDTH, TOP + row * CELL_HEIGHT
        yield _box(x, y, cell.colour)
        if cell.renoised:
            yield _frame(x, y)
        if cell.text:
            yield _text(x + CELL_WIDTH / 2, y + 15, cell.text)


def _legend(y: int) -> Iterator[str]:
    """What the colours and frames mean."""
    about = "Colour: probability of the token. 54 of 64: accepted positions of the canvas."
    yield _text(MARGIN, y - 26, about, "note legend")
    low, x = 0.0, MARGIN
    for band, high in enumerate((*CERTAINTY_BANDS, 1.0)):
        yield _box(x, y - 14, f"band{band}")
        yield _text(x + 20, y, f"{low * 100:.0f}-{high * 100:.0f}%", "note legend")
        low, x = high, x + 86
    yield _box(x + 24, y - 14, "plain")
    yield _frame(x + 24, y - 14)
    yield _text(x + 44, y, "not accepted: noise again", "note legend")


def _box(x: float, y: float, colour: str) -> str:
    return (
        f'<rect class="{colour}" x="{x:g}" y="{y:g}" width="{CELL_WIDTH - 1}" '
        f'height="{CELL_HEIGHT - 1}" rx="2"/>'
    )


def _frame(x: float, y: float) -> str:
    return (
        f'<rect class="renoised" x="{x + 1:g}" y="{y + 1:g}" width="{CELL_WIDTH - 3}" '
        f'height="{CELL_HEIGHT - 3}" rx="2"/>'
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f'<text{attribute} x="{x:g}" y="{y:g}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
