"""Tasks whose answers must be computed one part after another, drawn by seed: what the bench model
learns and is asked.

    python recipes/steps/stepwise.py --task walk --count 3 --seed 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Draw = np.random.Generator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
RULES, OTHER_RULES = (30, 110), (54, 73)
CELLS, CITIES = 15, ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Quito", "Berlin", "Dakar")
NAMES = ("Ann", "Bob", "Eve", "Ida", "Max", "Tom", "Rosa", "Omar", "Lena", "Hugo", "Felix", "Maria")


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt and its answer."""

    task: str
    prompt: str
    answer: str


def walk(rng: Draw) -> tuple[str, str]:
    """The way through a table of letters: where it leads from one is seen only once that one is
    known."""
    letters = [LETTERS[i] for i in rng.permutation(26)[: rng.integers(14, 25)]]
    pairs = list(pairwise(letters))
    table = " ".join(pairs[i][0] + pairs[i][1] for i in rng.permutation(len(pairs)))
    return f"Walk from {letters[0]}: {table}", " ".join(letters[1:])


def automaton(rng: Draw, rules: Sequence[int] = RULES) -> tuple[str, str]:
    """Rows of an elementary cellular automaton, each from the one above; nothing lives outside.
    Each row begins with its letter, and the prompt names the last one."""
    rule, rows = rules[rng.integers(len(rules))], int(rng.integers(6, 14))
    row = rng.integers(0, 2, CELLS)
    lines = ["a" + _digits(row)]
    for letter in LETTERS[1 : rows + 1]:
        wide = np.pad(row, 1)
        row = (rule >> (4 * wide[:-2] + 2 * row + wide[2:])) & 1
        lines.append(letter + _digits(row))
    return f"Rule {rule} to {lines[-1][0]}:\n{lines[0]}", "\n".join(lines[1:])


def _digits(row: np.ndarray) -> str:
    return "".join(map(str, row))


def sums(rng: Draw) -> tuple[str, str]:
    """Running sums, the last two digits of each; a letter before each says which it is."""
    added = rng.integers(0, 10, rng.integers(12, 27))
    so_far = np.cumsum(added) % 100
    asked = " ".join(f"{letter}{n}" for letter, n in zip(LETTERS, added, strict=False))
    return "Sums: " + asked, " ".join(
        f"{letter}{n:02d}" for letter, n in zip(LETTERS, so_far, strict=False)
    )


def progression(rng: Draw) -> tuple[str, str]:
    """A number and those that follow at one distance, the last two digits of each."""
    start, step, count = (int(rng.integers(*ends)) for ends in ((0, 100), (2, 20), (12, 27)))
    told = [f"{LETTERS[i]}{(start + i * step) % 100:02d}" for i in range(count)]
    return f"By {step:02d} to {told[-1][0]}: {told[0]}", " ".join(told[1:])


def fibonacci(rng: Draw) -> tuple[str, str]:
    """Two digits and those that follow, each the last digit of the sum of the two before."""
    digits = [int(rng.integers(10)), int(rng.integers(1, 10))]
    for _ in range(int(rng.integers(10, 25))):
        digits.append((digits[-1] + digits[-2]) % 10)
    told = [f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=False)]
    return f"Add two to {told[-1][0]}: {told[0]} {told[1]}", " ".join(told[2:])


def records(rng: Draw) -> tuple[str, str]:
    """Records in JSON from sentences; where one begins depends on the lengths of those before."""
    people = []
    for place in rng.permutation(len(NAMES))[: rng.integers(2, 5)]:
        city = CITIES[rng.integers(len(CITIES))]
        people.append({"name": NAMES[place], "age": int(rng.integers(10, 100)), "city": city})
    told = " ".join(f"{p['name']} from {p['city']} is {p['age']}." for p in people)
    lines = [json.dumps(person, separators=(",", ":")) for person in people]
    return f"Records: {told}", "\n".join(lines)


def rules(rng: Draw) -> tuple[str, str]:
    """As `automaton`, by other rules."""
    return automaton(rng, OTHER_RULES)


def series(rng: Draw) -> tuple[str, str]:
    """As `fibonacci`, from any letter on."""
    digits = [int(rng.integers(10)), int(rng.integers(1, 10))]
    for _ in range(int(rng.integers(8, 23))):
        digits.append((digits[-1] + digits[-2]) % 10)
    begin = int(rng.integers(26 - len(digits) + 1))
    told = [f"{letter}{digit}" for letter, digit in zip(LETTERS[begin:], digits, strict=False)]
    return f"Add two to {told[-1][0]}: {told[0]} {told[1]}", " ".join(told[2:])


TASKS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "walk": walk,
    "automaton": automaton,
    "sums": sums,
    "records": records,
    "progression": progression,
    "fibonacci": fibonacci,
    "rules": rules,
    "series": series,
}
ASKED = ("automaton", "rules", "records")  # the others are learned from alone


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
