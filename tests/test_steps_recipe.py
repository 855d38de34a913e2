"""The tasks of the bench model: drawn by seed, and their answers are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes" / "steps"))

import stepwise


@pytest.mark.parametrize("task", stepwise.TASKS)
def test_a_task_is_drawn_by_its_seed(task):
    some, more = stepwise.make(task, 20, 5), stepwise.make(task, 30, 5)
    assert some == more[:20] and some != stepwise.make(task, 20, 6)


def test_answers_are_right():
    for made in stepwise.make("walk", 30, 0):
        at, table = made.prompt.removeprefix("Walk from ").split(": ")
        leads = dict(zip(table[::3], table[1::3], strict=True))
        walked = []
        while at in leads:
            walked.append(at := leads[at])
        assert made.answer.split() == walked and len(walked) == len(leads)
    for made in [*stepwise.make("automaton", 30, 0), *stepwise.make("rules", 30, 0)]:
        asked, first = made.prompt.split("\n")
        rule, row = int(asked.split()[1]), first[1:]
        lines = made.answer.split("\n")
        assert "".join(line[0] for line in [first, *lines]) == stepwise.LETTERS[: len(lines) + 1]
        assert asked.endswith(f"to {lines[-1][0]}:")
        for line in lines:
            wide = f"0{row}0"
            row = "".join(str(rule >> int(wide[i : i + 3], 2) & 1) for i in range(len(row)))
            assert line[1:] == row
    for made in stepwise.make("sums", 30, 0):
        so_far, found = 0, []
        for asked in made.prompt.removeprefix("Sums: ").split():
            so_far += int(asked[1:])
            found.append(f"{asked[0]}{so_far % 100:02d}")
        assert made.answer.split() == found
    for made in stepwise.make("progression", 30, 0):
        asked, first = made.prompt.split(": ")
        at, distance, terms = int(first[1:]), int(asked.split()[1]), made.answer.split()
        expected = [f"{stepwise.LETTERS[i]}{(at + i * distance) % 100:02d}" for i in range(1, 26)]
        assert terms == expected[: len(terms)] and asked.endswith(f"to {terms[-1][0]}")
    for made in [*stepwise.make("fibonacci", 30, 0), *stepwise.make("series", 30, 0)]:
        asked, first = made.prompt.split(": ")
        terms = [*first.split(), *made.answer.split()]
        assert "".join(term[0] for term in terms) in stepwise.LETTERS
        assert made.task == "series" or first[0] == "a"
        for before, between, term in zip(terms, terms[1:], terms[2:], strict=False):
            assert (int(before[1:]) + int(between[1:])) % 10 == int(term[1:])
        assert asked.endswith(f"to {terms[-1][0]}")
    for made in stepwise.make("records", 30, 0):
        told = made.prompt.removeprefix("Records: ")
        people = [json.loads(line) for line in made.answer.split("\n")]
        assert told == " ".join(f"{p['name']} from {p['city']} is {p['age']}." for p in people)
