"""Tasks as jobs. A job asks for rows and reacts to their events, whoever steps them: `run_jobs`
here, or an engine that steps the rows of many jobs together."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..checkpoint.memory import generation_limits
from ..denoise.loop import RowFailed, Rows, check_thread
from ..denoise.row import Row
from ..denoise.store import Store
from ..errors import ConfigError
from ..events import LoopEvent
from ..model import DiffusionGemma

E = TypeVar("E")  # what a job says of itself: events, and perhaps its result


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Rows that a job wants to have run."""

    rows: Sequence[Row]


# Yields what it has to say, rows that it asks for, and None to wait for the next event of its rows.
Job = Generator[E | Ask | None, LoopEvent | None, None]


class Task(Protocol):
    """What can be asked of a model."""

    def job(self, model: DiffusionGemma, tokenizer: Any) -> Job[Any]:
        """Check the task and return its job, of which nothing has run yet.

        Raises:
          DiffGemmaError: if the task cannot be done.
        """


def refuse_other(name: str, value: Any, kind: type, made: str) -> None:
    """Refuse an argument of another type.

    Args:
      name: of the argument.
      value: what was given.
      kind: what it must be.
      made: how to make one.

    Raises:
      ConfigError: if the value is no `kind`.
    """
    if not isinstance(value, kind):
        raise ConfigError(
            f"{name} must be a {kind.__name__}, such as {made}, got {type(value).__name__}"
        )


class Running:
    """A job under way. Its owner runs the rows that it asks for, and gives it their events."""

    def __init__(self, job: Job[Any]) -> None:
        self._job = job
        self.asked: list[Row] = []  # not yet taken by the owner
        self.is_done = False

    def begin(self) -> Iterator[Any]:
        """Yield what the job says before it waits."""
        return self._go_on(None)

    def take(self, event: LoopEvent | RowFailed) -> Iterator[Any]:
        """Yield what the job says to an event of its rows."""
        return self._go_on(event)

    def close(self) -> None:
        """End the job early."""
        self.is_done = True
        self._job.close()

    def _go_on(self, event: LoopEvent | RowFailed | None) -> Iterator[Any]:
        try:
            if isinstance(event, RowFailed):
                said = self._job.throw(event.error)
            else:
                said = self._job.send(event)
            while said is not None:
                if isinstance(said, Ask):
                    self.asked.extend(said.rows)
                else:
                    yield said
                said = self._job.send(None)
        except StopIteration:
            self.is_done = True


def run_jobs(
    model: DiffusionGemma, jobs: Sequence[Job[Any]], store: Store | None = None
) -> Generator[tuple[int, Any], None, None]:
    """Run jobs together to their ends; yield what they say, with the number of the job.

    Contexts are found and kept in the store, if there is one. Closing the generator stops the run.
    It must be advanced by one thread: MLX's streams belong to a thread.
    """
    rows, thread = Rows(model, store), threading.get_ident()
    running = [Running(job) for job in jobs]
    owners: dict[Row, int] = {}

    def saying(number: int, words: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        for said in words:
            yield number, said
            check_thread(thread)
        for row in running[number].asked:
            rows.add(row)
            owners[row] = number
        running[number].asked = []

    with generation_limits(), _closing(running):
        for number, each in enumerate(running):
            yield from saying(number, each.begin())
        while rows.rows:
            for row, event in rows.advance():
                number = owners[row]
                yield from saying(number, running[number].take(event))


@contextmanager
def _closing(running: Sequence[Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for each in running:
            each.close()
