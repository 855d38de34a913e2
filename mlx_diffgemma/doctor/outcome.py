"""One check of the device, and its outcome. Knows no kernel."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DiffGemmaError

# What MLX and NumPy raise where a kernel is missing, refuses its operands or runs out of memory.
_RAISED = (
    DiffGemmaError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    OSError,
    MemoryError,
)
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s'\":,;)\]]+")


@dataclass(frozen=True, slots=True)
class Check:
    """A computation of the device whose right result is known from elsewhere."""

    name: str  # unique, and the same on every machine
    part: str  # the heading that it belongs to
    tolerance: float  # the largest difference that rounding explains
    looks_for: str  # the known bug that it looks for, with its source
    avoid: str  # what not to use if it fails
    measure: Callable[[], float]  # the difference found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found on this machine."""

    check: Check
    difference: float  # NaN where the check raised an error, or the device computed NaN
    seconds: float
    error: str | None  # one line without paths, where the check raised an error

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        return self.error is None and self.difference <= self.check.tolerance


def run_check(check: Check) -> Outcome:
    """Run a check. An error of the device is an outcome too."""
    started, error = time.perf_counter(), None
    try:
        difference = float(check.measure())
    except _RAISED as raised:
        difference, error = math.nan, _line(raised)
    return Outcome(check, difference, time.perf_counter() - started, error)


def _line(raised: BaseException) -> str:
    """Return an error's message as one line. Paths are private, so they are left out."""
    message = " ".join(str(raised).split()) or "no message"
    return f"{type(raised).__name__}: {_PATH.sub('(a path)', message)}"
