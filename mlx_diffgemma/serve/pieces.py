"""An answer on its way out of the engine: a task that says only what clients are told, and the box
in which its words wait for the connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from ..events import (
    BrokenToolCall,
    CanvasCommitted,
    Finished,
    PrefillDone,
    StepDone,
    Text,
    ToolCall,
)
from ..language.encoded import ImageForm
from ..language.prompt import encode
from ..language.text import Drafts, TextStream
from ..language.tools import CALL_BEGIN
from ..write.generate import Request
from ..write.job import Ask, Job


@dataclass(frozen=True, slots=True)
class Draft:
    """The whole text so far, as if the step's draft were final. The next one replaces it."""

    answer: str
    thought: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An answer that ends with an error."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Expired:
    """The end of the time that a request has."""


Piece = Expired | PrefillDone | Draft | Text | ToolCall | BrokenToolCall | Finished | Failed
OnStep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A request whose job says pieces instead of steps and canvases."""

    request: Request
    drafts: bool  # say a Draft at each step
    on_step: OnStep  # told the seconds of each step

    def job(self, model: Any, tokenizer: Any) -> Job[Any]:
        """As `Request.job`."""
        request, drafts = self.request, None
        if self.drafts:
            form = ImageForm.of(model.config)
            encoded = encode(tokenizer, request.prompt, request.prompt_options, form)
            request = replace(request, prompt=encoded)
            ends = request.settings.resolve(model.config).eos_token_ids
            drafts = Drafts(TextStream(tokenizer, ends, encoded.ids, request.stop))
        return _pieces(request.job(model, tokenizer), drafts, self.on_step)


def _pieces(job: Job[Any], drafts: Drafts | None, on_step: OnStep) -> Job[Any]:
    """Pass a job's words on; make drafts of its steps, and drop the text of a call cut short."""
    with closing(job):
        said = next(job)
        held: Text | None = None  # perhaps the text of a broken call
        last = time.perf_counter()
        while True:
            event = None
            if said is None or isinstance(said, Ask):
                event = yield said
            else:
                if held is not None:
                    if not (isinstance(said, BrokenToolCall) and said.problem == "incomplete"):
                        yield held
                    held = None
                if isinstance(said, StepDone):
                    last, before = time.perf_counter(), last
                    on_step(last - before)
                    if drafts is not None:
                        yield Draft(*drafts.of(said))
                elif isinstance(said, CanvasCommitted):
                    if drafts is not None:
                        drafts.commit(said)
                elif isinstance(said, Text) and said.piece.startswith(CALL_BEGIN):
                    held = said
                else:
                    yield said
                    last = time.perf_counter()
            try:
                said = job.send(event)
            except StopIteration:
                return


class Outbox:
    """Pieces of one response that wait for its connection. A slow reader makes it hold the settled
    text, which grows to an answer at most, and the last draft of each answer; drafts are dropped
    first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Piece]] = deque()
        self._changed = asyncio.Event()

    def put(self, index: int, piece: Piece) -> None:
        """Add a piece of an answer."""
        waiting = self._waiting
        if waiting and waiting[-1][0] == index:
            last = waiting[-1][1]
            if isinstance(last, Draft):
                waiting.pop()
            elif (
                isinstance(last, Text) and isinstance(piece, Text) and last.channel == piece.channel
            ):
                waiting.pop()
                piece = Text(last.piece + piece.piece, piece.channel)
        elif isinstance(piece, Draft):
            stale = [each for each in waiting if each[0] == index and isinstance(each[1], Draft)]
            for each in stale:
                waiting.remove(each)
        waiting.append((index, piece))
        self._changed.set()

    async def take(self, seconds: float) -> list[tuple[int, Piece]]:
        """Return all that waits, with the answers' indices; nothing if none came in time."""
        if not self._waiting:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                return []
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def __len__(self) -> int:
        return len(self._waiting)
