"""The display of many answers under way: on a terminal a bar with the time that is left, elsewhere
a line now and then. Answers of decisions in words."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ..write.questions import Answer

_SECONDS_BETWEEN_LINES = 30
_MOST_SHOWN = 5


class BatchProgress:
    """The progress of lines on stderr."""

    def __init__(self, total: int, done: int, failed: int, *, verbose: bool) -> None:
        """Begin with `done` of `total` lines, which an earlier run has answered."""
        console = Console(stderr=True)
        self._verbose = verbose
        self._is_live = verbose and console.is_terminal and not console.is_dumb_terminal
        console.width -= 2  # room for ^C
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers, time left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._total, self._from, self.done, self.failed = total, done, done, failed
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, *, is_error: bool) -> None:
        """Count a line."""
        self.done += 1
        self.failed += is_error
        note = f"{self.failed} failed" if self.failed else ""
        self._bar.update(self._task, advance=1, description=note)
        now = time.monotonic()
        if self._verbose and not self._is_live and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        left = (now - self._started) / (self.done - self._from) * (self._total - self.done)
        minutes, seconds = divmod(round(left), 60)
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done:,} of {self._total:,} answers{failed}, {minutes}:{seconds:02} left"

    def summary(self) -> str:
        """Return what was done, in one line."""
        seconds = time.monotonic() - self._started
        failed = f", {self.failed} of them failed" if self.failed else ""
        before = f" ({self._from:,} by an earlier run)" if self._from else ""
        return f"{self.done:,} answers{before}{failed}, {seconds:.1f} s"


def answer_value(answer: Answer) -> str:
    """Return an answer for stdout: the likeliest option, or a score's expected value."""
    if answer.score is not None:
        return f"{answer.score:.2f}"
    value = answer.value
    return str(value).lower() if isinstance(value, bool) else value


def answer_line(answer: Answer) -> str:
    """Return the probabilities of an answer in one line."""
    options = zip(answer.question.options, answer.probabilities, strict=True)
    ordered = list(options)
    if answer.question.kind != "score":  # levels stay in their order
        ordered.sort(key=lambda pair: -pair[1])
    shown = [f"{_spelled(o.value)} {p:.1%}" for o, p in ordered[:_MOST_SHOWN]]
    if more := len(ordered) - _MOST_SHOWN:
        shown += [f"{more} more"] if more > 0 else []
    asked = " ".join((answer.question.name or answer.question.instructions).split())
    return f"{asked}  {', '.join(shown)}; confidence {answer.confidence:.1%}"


def _spelled(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else " ".join(value.split())
