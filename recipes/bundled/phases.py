"""The phases of the bundled model's training: how long each is, and with how many examples of each
task."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Phase:
    """A run of the trainer: how, and with how many examples of each task."""

    name: str
    seed: int  # of its examples
    counts: dict[str, int]
    pictures: dict[str, int] = field(default_factory=dict)  # examples of tasks with pictures
    short_gaps: bool = False  # one underscore for a missing word, not one for each of its letters
    is_mean: bool = False  # what it leaves is the mean of its weights and of those before it

    @property
    def model(self) -> str:
        """The checkpoint that it trains, beside the weights of the phase before."""
        return "blind" if self.pictures else "start"

    def shown(self, prompt: str) -> str:
        return re.sub("_+", "_", prompt) if self.short_gaps else prompt

    @property
    def recipe(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(yaml.safe_load(self.recipe.read_text()))

    @property
    def iters(self) -> int:
        return int(self.settings["iters"])


# Each goes on with the weights of the one before: with more of what is not known by then, and from
# the second on with less of a canvas given, since generation begins with nothing. How many letters
# a missing word has is told from the second on.
PHASES = (
    Phase(
        "first",
        0,
        {
            "sudoku4": 20000,
            "sudoku6": 22000,
            "count": 30000,
            "sort": 14000,
            "reverse": 9000,
            "table": 12000,
            "words": 9000,
            "code": 11000,
        },
        short_gaps=True,
    ),
    Phase(
        "second",
        2,
        {
            "sudoku4": 11000,
            "sudoku6": 16000,
            "count": 26000,
            "sort": 9000,
            "reverse": 3000,
            "table": 10000,
            "words": 12000,
            "code": 3000,
        },
    ),
    Phase(
        "third",
        3,
        {
            "sudoku4": 6500,
            "sudoku6": 18000,
            "count": 2000,
            "sort": 3000,
            "reverse": 1000,
            "table": 1000,
            "words": 1000,
            "code": 1000,
        },
    ),
    Phase(
        "fourth",
        4,
        {
            "sudoku4": 4500,
            "sudoku6": 26000,
            "count": 2500,
            "sort": 3000,
            "reverse": 1000,
            "table": 1000,
            "words": 1000,
            "code": 1000,
        },
    ),
    Phase(
        "fifth",
        5,
        {
            "sudoku4": 4000,
            "sudoku6": 16000,
            "count": 1200,
            "sort": 1200,
            "reverse": 700,
            "table": 700,
            "words": 1200,
            "code": 700,
        },
    ),
    Phase(
        "sixth",
        6,
        {
            "sudoku4": 400,
            "sudoku6": 1600,
            "count": 200,
            "sort": 200,
            "reverse": 100,
            "table": 100,
            "words": 200,
            "code": 100,
        },
        {"tiles": 4500, "read4": 4500, "shapes": 3500},
    ),
    Phase(
        "seventh",
        7,
        {
            "sudoku4": 500,
            "sudoku6": 2900,
            "count": 250,
            "sort": 450,
            "reverse": 150,
            "table": 150,
            "words": 250,
            "code": 150,
        },
        {"tiles": 800, "read4": 7400, "shapes": 3000},
    ),
    Phase(
        "eighth",
        8,
        {
            "sudoku4": 450,
            "sudoku6": 2700,
            "count": 450,
            "sort": 350,
            "reverse": 150,
            "table": 350,
            "words": 250,
            "code": 150,
        },
        {"tiles": 5000, "shapes": 4200},
    ),
    Phase(
        "ninth",
        9,
        {
            "sudoku4": 350,
            "sudoku6": 1900,
            "count": 300,
            "sort": 300,
            "reverse": 120,
            "table": 220,
            "words": 200,
            "code": 120,
        },
        {"tiles": 1200, "shapes": 6600},
    ),
    Phase(
        "tenth",
        10,
        {
            "sudoku4": 450,
            "sudoku6": 2600,
            "count": 350,
            "sort": 1500,
            "reverse": 250,
            "table": 400,
            "words": 1500,
            "code": 250,
        },
        {"tiles": 900, "shapes": 3000},
    ),
    Phase(
        "eleventh",
        11,
        {
            "sudoku4": 500,
            "sudoku6": 3800,
            "count": 150,
            "sort": 500,
            "reverse": 100,
            "table": 150,
            "words": 300,
            "code": 100,
        },
        {"tiles": 250, "shapes": 550},
        is_mean=True,
    ),
)
