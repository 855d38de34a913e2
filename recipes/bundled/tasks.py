"""Tasks with one right answer each, drawn by seed: what the bundled model learns and is asked.

python recipes/bundled/tasks.py --task sudoku6 --count 3 --seed 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Draw = np.random.Generator


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt and its answer."""

    task: str
    prompt: str
    answer: str


def _solutions(grid: list[int], size: int, box: tuple[int, int], most: int) -> list[list[int]]:
    """Up to `most` ways to fill the zeros of a grid, fewest choices first."""
    found: list[list[int]] = []
    height, width = box

    def choices(cell: int) -> set[int]:
        row, column = divmod(cell, size)
        used = set(grid[row * size : (row + 1) * size]) | set(grid[column::size])
        top, left = row // height * height, column // width * width
        for r in range(top, top + height):
            used |= set(grid[r * size + left : r * size + left + width])
        return set(range(1, size + 1)) - used

    def fill() -> None:
        empty = [(choices(i), i) for i, value in enumerate(grid) if not value]
        if not empty:
            found.append(list(grid))
            return
        options, cell = min(empty, key=lambda pair: len(pair[0]))
        for value in sorted(options):
            grid[cell] = value
            fill()
            grid[cell] = 0
            if len(found) == most:
                return

    fill()
    return found


def _solved(rng: Draw, size: int, box: tuple[int, int]) -> list[int]:
    """A solved grid: a pattern whose digits, rows within bands and bands are shuffled, and columns
    likewise."""
    height, width = box

    def shuffled(count: int, per: int) -> list[int]:
        bands = rng.permutation(count // per)
        return [int(b * per + i) for b in bands for i in rng.permutation(per)]

    rows, columns = shuffled(size, height), shuffled(size, width)
    digits = rng.permutation(size) + 1
    pattern = [
        [(width * (r % height) + r // height + c) % size for c in range(size)] for r in range(size)
    ]
    return [int(digits[pattern[r][c]]) for r in rows for c in columns]


def _lines(grid: list[int], size: int) -> str:
    text = "".join(str(value) if value else "." for value in grid)
    return "\n".join(text[i : i + size] for i in range(0, len(text), size))


def _sudoku(rng: Draw, size: int, box: tuple[int, int], blanks: tuple[int, int]) -> tuple[str, str]:
    while True:
        answer = _solved(rng, size, box)
        grid = list(answer)
        for cell in rng.permutation(size * size)[: rng.integers(blanks[0], blanks[1] + 1)]:
            grid[cell] = 0
        if len(_solutions(list(grid), size, box, 2)) == 1:
            return f"Sudoku:\n{_lines(grid, size)}", _lines(answer, size)


def sudoku4(rng: Draw) -> tuple[str, str]:
    return _sudoku(rng, 4, (2, 2), (4, 9))


def sudoku6(rng: Draw) -> tuple[str, str]:
    return _sudoku(rng, 6, (2, 3), (6, 16))


def count(rng: Draw) -> tuple[str, str]:
    first = int(rng.integers(10, 75))
    last = first + int(rng.integers(2, 26))
    return f"Count from {first} to {last}.", " ".join(map(str, range(first, last + 1)))


def sort(rng: Draw) -> tuple[str, str]:
    digits = rng.integers(0, 10, rng.integers(3, 9))
    return f"Sort: {' '.join(map(str, digits))}", " ".join(map(str, sorted(digits)))


def reverse(rng: Draw) -> tuple[str, str]:
    letters = "".join(chr(97 + i) for i in rng.integers(0, 26, rng.integers(3, 9)))
    return f"Reverse: {letters}", letters[::-1]


def table(rng: Draw) -> tuple[str, str]:
    first = int(rng.integers(1, 13))
    rows = range(first, first + int(rng.integers(1, 6)) + 1)
    lines = ["|n|n*n|", "|-|-|", *(f"|{n}|{n * n}|" for n in rows)]
    return f"Squares from {first} to {rows[-1]}.", "\n".join(lines)


SERIES = (
    "one two three four five six seven eight nine ten eleven twelve".split(),
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "first second third fourth fifth sixth seventh eighth ninth tenth".split(),
)


def words(rng: Draw) -> tuple[str, str]:
    """Three or four words of a series, some in the middle missing, their letters underscores."""
    series = SERIES[rng.integers(len(SERIES))]
    length = int(rng.integers(3, 5))
    start = int(rng.integers(0, len(series) - length + 1))
    answer = series[start : start + length]
    if rng.integers(2):
        answer = answer[::-1]
    shown = list(answer)
    for place in rng.permutation(length - 2)[: rng.integers(1, length - 1)] + 1:
        shown[place] = "_" * len(shown[place])
    return f"Fill: {' '.join(shown)}", " ".join(answer)


OPERATIONS = (("add", "+"), ("subtract", "-"), ("multiply", "*"))


def code(rng: Draw) -> tuple[str, str]:
    """A function with a gap that the rest of it decides."""
    name, sign = OPERATIONS[rng.integers(len(OPERATIONS))]
    a, b = (chr(97 + i) for i in rng.permutation(26)[:2])
    parts = [name, a, b, a, sign, b]
    shown = list(parts)
    shown[rng.integers(len(parts))] = "_"
    form = "def {}({}, {}):\n    return {} {} {}"
    return "Fill:\n" + form.format(*shown), form.format(*parts)


TASKS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "sudoku4": sudoku4,
    "sudoku6": sudoku6,
    "count": count,
    "sort": sort,
    "reverse": reverse,
    "table": table,
    "words": words,
    "code": code,
}


def make(task: str, count: int, seed: int) -> list[Task]:
    """Tasks of one kind; the same for the same seed, and the first of a longer list."""
    place = list(TASKS).index(task)
    return [Task(task, *TASKS[task](np.random.default_rng([seed, place, i]))) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable; all")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for task in options.task or TASKS:
        for made in make(task, options.count, options.seed):
            print(f"{made.task}\n{made.prompt}\n-> {made.answer}\n")


if __name__ == "__main__":
    main()
