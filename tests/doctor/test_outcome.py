"""What a check's difference or error becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from mlx_diffgemma.doctor.outcome import Check, Outcome, run_check
from mlx_diffgemma.errors import WeightsError


def outcome_of(measure: Callable[[], float], tolerance: float = 0.1) -> Outcome:
    return run_check(Check("name", "part", tolerance, "a bug", "a type", measure))


def raising(error: Exception) -> Callable[[], float]:
    def measure() -> float:
        raise error

    return measure


@pytest.mark.parametrize(
    ("difference", "passed"),
    [(0.0, True), (0.1, True), (0.1001, False), (math.inf, False), (math.nan, False)],
)
def test_a_difference_within_the_tolerance_passes_and_nan_never_does(difference, passed):
    assert outcome_of(lambda: difference).passed is passed


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::Device] Unable to load /Users/someone/lib/mlx.metallib\nmore"),
        ValueError("no kernel in ~/private/mlx"),
        WeightsError("C:\\Users\\someone\\model is damaged"),
        MemoryError(),
    ],
)
def test_an_error_is_an_outcome_of_one_line_without_paths(error):
    outcome = outcome_of(raising(error))
    assert not outcome.passed and math.isnan(outcome.difference)
    assert outcome.error.startswith(type(error).__name__) and "\n" not in outcome.error
    assert not re.search("someone|private", outcome.error)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        outcome_of(raising(AssertionError("ours")))
