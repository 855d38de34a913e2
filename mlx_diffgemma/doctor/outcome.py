"""One check of a computation, and what came out of it. Placeholder: the other branch's replaces
it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """A computation whose result is known."""

    name: str
    part: str
    tolerance: float
    looks_for: str
    avoid: str
    measure: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The difference that a check found."""

    check: Check
    difference: float
    seconds: float
    error: str | None

    @property
    def passed(self) -> bool:
        return self.error is None and self.difference <= self.check.tolerance


def run_check(check: Check) -> Outcome:
    """Run a check; an error of MLX is an outcome too."""
    started, difference, error = time.perf_counter(), float("nan"), None
    try:
        difference = check.measure()
    except RuntimeError as found:
        error = str(found)
    return Outcome(check, difference, time.perf_counter() - started, error)
