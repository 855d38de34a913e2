"""Which of many cases run for every change; `make long` runs the others too. Not a test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def one_in(every: int, cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters; of so many only the first runs for every change."""
    return [_long(case) if i % every else case for i, case in enumerate(cases)]


def first(count: int, cases: Sequence[Any]) -> list[Any]:
    """The cases as parameters; only the first ones run for every change."""
    return [*cases[:count], *map(_long, cases[count:])]


def _long(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.long)
