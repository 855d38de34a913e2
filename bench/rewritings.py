"""Rewriting tasks: a prompt, its one right answer, and a text that stands there already: the answer
to a prompt that differs a little, or the right one with mistakes. Drawn by seed.

For the bundled model and the first tiny one:
- sudoku4: a solved grid with 1 to 3 wrong cells;
- count: the numbers between other bounds, each up to 3 away, so that text moves;
- sort, reverse: of a list or a word with one item put in, left out or changed;
- table: one row more or less, at the beginning or at the end.

For the bench model (recipes/steps):
- automaton, rules: 1 to 3 wrong cells, or the last one or two rows not there yet;
- records: an age or a city was another, or one record is not there yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path[:0] = [str(RECIPES / "bundled"), str(RECIPES / "steps")]

import stepwise  # noqa: E402
import tasks  # noqa: E402

Draw = np.random.Generator


class Rewriting(NamedTuple):
    prompt: str
    stands: str
    answer: str


def sudoku4(rng: Draw, _: int) -> Rewriting:
    prompt, answer = tasks.sudoku4(rng)
    cells = [i for i, cell in enumerate(answer) if cell != "\n"]
    stands = list(answer)
    for cell in rng.permutation(cells)[: rng.integers(1, 4)]:
        stands[cell] = str(rng.choice([digit for digit in "1234" if digit != answer[cell]]))
    return Rewriting(prompt, "".join(stands), answer)


def count(rng: Draw, _: int) -> Rewriting:
    first = int(rng.integers(14, 70))
    last = first + int(rng.integers(8, 22))
    moved = [0, 0]
    while not any(moved):
        moved = rng.integers(-3, 4, 2).tolist()

    def numbers(first: int, last: int) -> str:
        return " ".join(map(str, range(first, last + 1)))

    stands = numbers(first + moved[0], last + moved[1])
    return Rewriting(f"Count from {first} to {last}.", stands, numbers(first, last))


def changed(rng: Draw, items: Sequence[Any], new: Callable[[], Any]) -> list[Any]:
    """Items with one more, one less or another one."""
    while True:
        other, at = list(items), int(rng.integers(len(items)))
        way = rng.integers(3)
        if way == 0:
            other[at] = new()
        elif way == 1:
            other.insert(at, new())
        else:
            del other[at]
        if other != list(items) and 3 <= len(other) <= 8:
            return other


def sort(rng: Draw, _: int) -> Rewriting:
    def joined(digits: Sequence[int]) -> str:
        return " ".join(map(str, digits))

    while True:
        digits = rng.integers(0, 10, rng.integers(4, 9)).tolist()
        other = changed(rng, digits, lambda: int(rng.integers(10)))
        stands, answer = joined(sorted(other)), joined(sorted(digits))
        if stands != answer:
            return Rewriting(f"Sort: {joined(digits)}", stands, answer)


def reverse(rng: Draw, _: int) -> Rewriting:
    def letter() -> str:
        return chr(97 + int(rng.integers(26)))

    letters = [letter() for _ in range(rng.integers(4, 9))]
    stands = "".join(changed(rng, letters, letter))[::-1]
    return Rewriting(f"Reverse: {''.join(letters)}", stands, "".join(letters)[::-1])


def table(rng: Draw, digits: int) -> Rewriting:
    first = int(rng.integers(2, 11))
    last = first + int(rng.integers(2, 5))
    more, less = [(1, 0), (-1, 0), (0, 1), (0, -1)][rng.integers(4)]

    def lines(first: int, last: int) -> str:
        rows = (f"|{n}|{n * n}|" for n in range(first, last + 1))
        return "\n".join(["|n|n*n|", "|-|-|", *rows])

    prompt = f"Squares from {first} to {last:0{digits}d}."
    return Rewriting(prompt, lines(first + more, last + less), lines(first, last))


def rows(task: str) -> Callable[[Draw, int], Rewriting]:
    """A task whose answer has a row of cells per line, each behind its letter."""

    def drawn(rng: Draw, _: int) -> Rewriting:
        prompt, answer = stepwise.TASKS[task](rng)
        lines = answer.split("\n")
        if rng.integers(2):
            return Rewriting(prompt, "\n".join(lines[: -int(rng.integers(1, 3))]), answer)
        wrong = list(map(list, lines))
        for place in rng.permutation(len(lines))[: rng.integers(1, 4)]:
            at = int(rng.integers(1, len(wrong[place])))
            wrong[place][at] = "10"[int(wrong[place][at])]
        return Rewriting(prompt, "\n".join(map("".join, wrong)), answer)

    return drawn


def records(rng: Draw, _: int) -> Rewriting:
    prompt, answer = stepwise.records(rng)
    lines = answer.split("\n")
    at, way = int(rng.integers(len(lines))), rng.integers(3)
    person = json.loads(lines[at])
    if way == 0:
        person["age"] = 10 + (person["age"] - 10 + int(rng.integers(1, 90))) % 90
    elif way == 1:
        person["city"] = str(rng.choice([c for c in stepwise.CITIES if c != person["city"]]))
    other = [json.dumps(person, separators=(",", ":"))] if way < 2 else []
    return Rewriting(prompt, "\n".join([*lines[:at], *other, *lines[at + 1 :]]), answer)


Kinds = dict[str, Callable[[Draw, int], Rewriting]]
SMALL: Kinds = {
    "sudoku4": sudoku4,
    "count": count,
    "sort": sort,
    "reverse": reverse,
    "table": table,
}
STEPS: Kinds = {
    "automaton": rows("automaton"),
    "rules": rows("rules"),
    "records": records,
}
TASKS: dict[str, Kinds] = {"small": SMALL, "steps": STEPS}


def drawn(kinds: Kinds, kind: str, count: int, seed: int, digits: int) -> list[Rewriting]:
    """Tasks of a kind; the same for the same seed, and the first of a longer list. `digits` is how
    many a table's last number has, at least."""
    place = list(kinds).index(kind)
    return [kinds[kind](np.random.default_rng([seed, place, i]), digits) for i in range(count)]
