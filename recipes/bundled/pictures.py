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
Box = tuple[float, float, float, float]

SMALLEST, LARGEST = 120, 260  # pixels of a picture's side; they are square
NUMBERS = ("one", "two", "three")
KINDS = ("circle", "square", "triangle")  # in the order in which they are told
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


def read4(rng: Draw) -> tuple[Any, str, str]:
    """A Sudoku of four rows, to be written down. Dark on light or light on dark, digits in the
    lines' colour or another; size and place vary."""
    text = tasks.sudoku4(rng)[0].split("\n", 1)[1]
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    paper, ink = _between(rng, 190, 256), _between(rng, 0, 90)
    pen = ink if rng.random() < 0.6 else _near(rng, PENS[rng.integers(len(PENS))])
    if rng.random() < 0.3:
        paper, ink = ink, paper
        pen = ink
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    width = side * rng.uniform(0.84, 0.98)
    left, top = rng.uniform(0.01 * side, 0.99 * side - width, 2)
    cell, thin = width / 4, max(1, round(side / 120))
    for i in range(5):
        at, line = i * cell, thin if i % 2 else 2 * thin
        draw.line([(left + at, top), (left + at, top + width)], fill=ink, width=line)
        draw.line([(left, top + at), (left + width, top + at)], fill=ink, width=line)
    font = ImageFont.load_default(size=cell * rng.uniform(0.6, 0.85))
    for row, digits in enumerate(text.split("\n")):
        for column, digit in enumerate(digits):
            x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.06, 0.06, 2)) * cell
            if digit != ".":
                draw.text((left + x, top + y), digit, fill=pen, font=font, anchor="mm")
    return image, "Read the Sudoku.", text


def shapes(rng: Draw) -> tuple[Any, str, str]:
    """One to three shapes of a kind and colour, and perhaps of another kind too, to be told."""
    kinds = sorted(rng.permutation(len(KINDS))[: rng.integers(1, 3)])
    groups = [(int(rng.integers(1, 4)), list(COLOURS)[rng.integers(4)], KINDS[k]) for k in kinds]
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    paper = _between(rng, 215, 256) if rng.random() < 0.7 else _between(rng, 0, 40)
    image = Image.new("RGB", (4 * side, 4 * side), paper)  # made smaller, for smooth edges
    draw = ImageDraw.Draw(image)
    cell, places = 4 * side / 3, [divmod(int(place), 3) for place in rng.permutation(9)]
    for number, colour, kind in groups:
        for _ in range(number):
            row, column = places.pop()
            radius = cell * rng.uniform(0.28, 0.44)
            free = cell / 2 - radius
            x, y = (np.array([column, row]) + 0.5) * cell + rng.uniform(-free, free, 2)
            _shape(draw, kind, float(x), float(y), radius, _near(rng, COLOURS[colour]))
    image = image.resize((side, side), Image.Resampling.BOX)
    told = " and ".join(
        f"{NUMBERS[number - 1]} {colour} {kind}{'s' * (number > 1)}"
        for number, colour, kind in groups
    )
    return image, "What do you see?", told


def _shape(draw: Any, kind: str, x: float, y: float, radius: float, fill: Colour) -> None:
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "square":
        half = 0.88 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        foot, half = y + 0.8 * radius, 0.95 * radius
        draw.polygon([(x, y - radius), (x - half, foot), (x + half, foot)], fill=fill)


TASKS: dict[str, Callable[[Draw], tuple[Any, str, str]]] = {"read4": read4, "shapes": shapes}


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
