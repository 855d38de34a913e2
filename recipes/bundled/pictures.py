"""Tasks with a picture each, drawn by seed: what the bundled model learns to see.

python recipes/bundled/pictures.py --count 6 --sheet sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tasks
from PIL import Image, ImageDraw, ImageFont

Draw = np.random.Generator
Colour = tuple[int, int, int]

SMALLEST, LARGEST = 120, 260  # pixels of a picture's side; they are square
KINDS = ("circle", "square", "triangle")
COLOURS: dict[str, Colour] = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (230, 190, 30),
}
PENS: tuple[Colour, ...] = ((200, 40, 40), (40, 70, 200), (40, 140, 60))


@dataclass(frozen=True, slots=True)
class Seen:
    """One picture with its question and answer."""

    task: str
    image: Any  # Pillow's, RGB
    prompt: str
    answer: str


def _near(rng: Draw, colour: Colour) -> Colour:
    """A colour that a viewer would call the same."""
    red, green, blue = (int(np.clip(v + rng.integers(-20, 21), 0, 255)) for v in colour)
    return red, green, blue


def _between(rng: Draw, least: int, most: int) -> Colour:
    red, green, blue = (int(v) for v in rng.integers(least, most, 3))
    return red, green, blue


def tiles(rng: Draw) -> tuple[Any, str, str]:
    """A square of four by four tiles, coloured or empty: the first letters of their colours."""
    square = _Square(rng)
    names = [*COLOURS, ""]
    rows = []
    for row in range(4):
        chosen = [names[rng.choice(5, p=(0.2, 0.2, 0.2, 0.2, 0.2))] for _ in range(4)]
        for column, name in enumerate(chosen):
            if name:
                square.fill(row, column, _near(rng, COLOURS[name]))
        rows.append("".join(name[:1] or "." for name in chosen))
    square.lines()
    return square.image, "Name the tiles.", "\n".join(rows)


def read4(rng: Draw) -> tuple[Any, str, str]:
    """A Sudoku of four rows, to be written down. The model did not learn it, and is not asked: it
    was in two phases of its training."""
    text = tasks.sudoku4(rng)[0].split("\n", 1)[1]
    square = _Square(rng)
    square.lines()
    font = ImageFont.load_default(size=square.cell * rng.uniform(0.6, 0.85))
    for row, digits in enumerate(text.split("\n")):
        for column, digit in enumerate(digits):
            if digit != ".":
                square.write(row, column, digit, font)
    return square.image, "Read the Sudoku.", text


def shapes(rng: Draw) -> tuple[Any, str, str]:
    """Up to six circles, squares and triangles, none overlapping: how many there are of each
    colour."""
    numbers = [0, 0, 0, 0]
    for colour in rng.integers(0, 4, rng.integers(1, 7)):
        if numbers[colour] < 3:
            numbers[colour] += 1
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    paper = _between(rng, 215, 256) if rng.random() < 0.7 else _between(rng, 0, 40)
    image = Image.new("RGB", (4 * side, 4 * side), paper)  # made smaller, for smooth edges
    draw = ImageDraw.Draw(image)
    cell, places = 4 * side / 3, [divmod(int(place), 3) for place in rng.permutation(9)]
    for number, colour in zip(numbers, COLOURS, strict=True):
        for _ in range(number):
            row, column = places.pop()
            radius = cell * rng.uniform(0.3, 0.44)
            free = cell / 2 - radius
            x, y = (np.array([column, row]) + 0.5) * cell + rng.uniform(-free, free, 2)
            kind = KINDS[rng.integers(len(KINDS))]
            _shape(draw, kind, float(x), float(y), radius, _near(rng, COLOURS[colour]))
    image = image.resize((side, side), Image.Resampling.BOX)
    told = ", ".join(f"{colour} {n}" for colour, n in zip(COLOURS, numbers, strict=True))
    return image, "Count the colours.", told


class _Square:
    """A picture of four by four cells. Dark on light or light on dark; size and place vary."""

    def __init__(self, rng: Draw):
        self._rng = rng
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        paper, self.ink = _between(rng, 190, 256), _between(rng, 0, 90)
        self.pen = self.ink if rng.random() < 0.6 else _near(rng, PENS[rng.integers(len(PENS))])
        if rng.random() < 0.3:
            paper, self.ink = self.ink, paper
            self.pen = self.ink
        self.image = Image.new("RGB", (side, side), paper)
        self.draw = ImageDraw.Draw(self.image)
        width = side * rng.uniform(0.84, 0.98)
        self.left, self.top = (float(x) for x in rng.uniform(0.01 * side, 0.99 * side - width, 2))
        self.cell, self.thin = width / 4, max(1, round(side / 120))

    def lines(self) -> None:
        """The lines between cells, thick around each four."""
        left, top, width = self.left, self.top, 4 * self.cell
        for i in range(5):
            at, line = i * self.cell, self.thin if i % 2 else 2 * self.thin
            for ends in (
                [(left + at, top), (left + at, top + width)],
                [(left, top + at), (left + width, top + at)],
            ):
                self.draw.line(ends, fill=self.ink, width=line)

    def fill(self, row: int, column: int, colour: Colour) -> None:
        x, y = self.left + column * self.cell, self.top + row * self.cell
        self.draw.rectangle((x, y, x + self.cell, y + self.cell), fill=colour)

    def write(self, row: int, column: int, digit: str, font: Any) -> None:
        """Write a digit, about in the middle of a cell."""
        x, y = (np.array([column, row]) + 0.5 + self._rng.uniform(-0.06, 0.06, 2)) * self.cell
        at = (self.left + float(x), self.top + float(y))
        self.draw.text(at, digit, fill=self.pen, font=font, anchor="mm")


def _shape(draw: Any, kind: str, x: float, y: float, radius: float, fill: Colour) -> None:
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "square":
        half = 0.88 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        foot, half = y + 0.8 * radius, 0.95 * radius
        draw.polygon([(x, y - radius), (x - half, foot), (x + half, foot)], fill=fill)


TASKS: dict[str, Callable[[Draw], tuple[Any, str, str]]] = {
    "tiles": tiles,
    "read4": read4,
    "shapes": shapes,
}
ASKED = ("tiles", "shapes")


def make(task: str, place: int, seed: int) -> Seen:
    """A picture of one kind, by its place in the list that the seed gives."""
    rng = np.random.default_rng([seed, len(tasks.TASKS) + list(TASKS).index(task), place])
    return Seen(task, *TASKS[task](rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable; all")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="a picture of all of them")
    options = parser.parse_args()
    chosen = options.task or list(TASKS)
    tile = LARGEST + 10
    sheet = Image.new("RGB", (options.count * tile, len(chosen) * tile), (128, 128, 128))
    for row, task in enumerate(chosen):
        for column in range(options.count):
            seen = make(task, column, options.seed)
            sheet.paste(seen.image, (column * tile, row * tile))
            print(f"{seen.task}\n{seen.prompt}\n-> {seen.answer}\n")
    if options.sheet:
        sheet.save(options.sheet)


if __name__ == "__main__":
    main()
