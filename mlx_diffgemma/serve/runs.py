"""From a checked request to runs in the engine, and from their events to one answer or a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from ..config.generation import GenerationSettings
from ..constraint.constraint import Constraint
from ..engine.run import Run
from ..errors import DiffGemmaError
from ..events import BrokenToolCall, Finished, PrefillDone, Text, ToolCall
from ..language.given import Prompt
from ..language.prompt import PromptOptions
from ..write.generate import Request
from ..write.job import Task
from .errors import ApiError, busy, from_error
from .pieces import Answer, Draft, Expired, Failed, OnStep, Outbox, Piece, Shortened
from .state import Served, State

SEEDS = 2**63
_LONG = 86_400.0  # seconds
T = TypeVar("T")
FinishReason = Literal["stop", "length", "tool_calls"]


class Asking(Protocol):
    """What `start` starts: a checked request, of a chat or of another kind.

    Attributes:
      model: its name; None for the default one.
      count: answers, as rows.
      drafts: whether the pieces have a Draft for each step.
      one_call: drop tool calls behind the first one.
      param: the field that names the prompt, for errors.
      compiles: whether making a task lifts a constraint to tokens, which may take long.
    """

    @property
    def model(self) -> str | None: ...
    @property
    def count(self) -> int: ...
    @property
    def drafts(self) -> bool: ...
    @property
    def one_call(self) -> bool: ...
    @property
    def param(self) -> str: ...
    @property
    def compiles(self) -> bool: ...

    def task(self, number: int, on_step: OnStep) -> Task:
        """Return the task of answer `number`, whose job says pieces."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A checked request for an answer to a prompt.

    Attributes:
      model: its name; None for the default one.
      prompt: messages, text or ids, as `Request.prompt`.
      options: how they become tokens: tools, thinking.
      settings: how to denoise; see `settings_of`.
      stop: strings that end the answer.
      constraint: what the answer must be.
      standing: what it is likely to be for the most part; for the setting `warm_start` alone.
      count: answers, as rows; answer i is drawn under the seed + i.
      drafts: whether the pieces have a Draft for each step.
      one_call: drop tool calls behind the first one.
      param: the field that names the prompt, for errors.
    """

    prompt: Prompt
    model: str | None = None
    options: PromptOptions = PromptOptions()
    settings: GenerationSettings = GenerationSettings()
    stop: Sequence[str] = ()
    constraint: Constraint | None = None
    standing: str | None = None
    count: int = 1
    drafts: bool = False
    one_call: bool = False
    param: str = "messages"

    @property
    def compiles(self) -> bool:
        return self.constraint is not None

    def task(self, number: int, on_step: OnStep) -> Task:
        settings = seeded(self.settings, number)
        stop = tuple(self.stop)
        request = Request(self.prompt, settings, self.options, stop, self.constraint, self.standing)
        return Answer(request, self.drafts, on_step)


def seeded(settings: GenerationSettings, number: int) -> GenerationSettings:
    """Return the settings of answer `number` to a request."""
    if settings.seed is None:
        return settings
    return replace(settings, seed=(settings.seed + number) % SEEDS)


@dataclass(slots=True)
class Usage:
    """What was read and written, over all answers of a request."""

    prompt_tokens: int = 0  # of one answer: all share it
    cached_tokens: int = 0
    completion_tokens: int = 0
    thought_tokens: int = 0  # of them, those of thoughts
    steps: int = 0
    canvases: int = 0
    prefill_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def observe(self, piece: Piece) -> None:
        """Count a piece."""
        self.seconds = time.perf_counter() - self.started
        if isinstance(piece, PrefillDone):
            if not self.prompt_tokens:
                self.prompt_tokens, self.cached_tokens = piece.prompt_tokens, piece.cached_tokens
            self.prefill_seconds = max(self.prefill_seconds, piece.seconds)
        elif isinstance(piece, Finished):
            self.completion_tokens += piece.new_tokens
            self.thought_tokens += piece.thought_tokens
            self.steps += piece.steps
            self.canvases += piece.canvases

    def diffusion(self) -> dict[str, float]:
        """Return the numbers of this kind of model, for the extension object `diffusion`."""
        return {
            "steps": self.steps,
            "canvases": self.canvases,
            "tokens_per_step": round(self.completion_tokens / self.steps, 3) if self.steps else 0.0,
            "prefill_ms": round(1e3 * self.prefill_seconds, 1),
            "total_ms": round(1e3 * self.seconds, 1),
        }


@dataclass(slots=True)
class Written:
    """A whole answer."""

    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    broken: list[BrokenToolCall] = field(default_factory=list)
    finished: Finished | None = None
    draft: str = ""  # where drafts are asked for
    is_shortened: bool = False  # whether the model was shown only a part of the request

    def observe(self, piece: Piece) -> None:
        """Add a piece."""
        if isinstance(piece, Draft):
            self.draft = piece.answer
        elif isinstance(piece, Shortened):
            self.is_shortened = True
        if isinstance(piece, Text) and piece.channel == "answer":
            self.text += piece.piece
        elif isinstance(piece, Text):
            self.thought += piece.piece
        elif isinstance(piece, ToolCall):
            self.calls.append(piece)
        elif isinstance(piece, BrokenToolCall):
            self.broken.append(piece)
        elif isinstance(piece, Finished):
            self.finished = piece

    def as_it_is(self) -> Written:
        """Return it with its last draft as its text, if it is not finished."""
        if self.finished is None and self.draft:
            self.text = self.draft
        return self

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended. A limit counts more than calls, since one may be missing."""
        if self.finished is None or self.finished.reason == "length":
            return "length"
        return "tool_calls" if self.calls else "stop"


class Answers:
    """The answers to a request under way. Iterate over `pieces`, or wait for `whole`."""

    def __init__(self, state: State, served: Served, asked: Asking, runs: Sequence[Run]) -> None:
        self.served, self.asked = served, asked
        self.usage = Usage()
        self._state, self._runs = state, list(runs)
        self._outbox = Outbox()
        self._open = set(range(len(runs)))
        self._called: set[int] = set()
        self._pumps = [asyncio.create_task(self._pump(i, run)) for i, run in enumerate(runs)]
        self._stay = state.when_ending(self._end)
        if state.is_ending:  # since it was submitted
            self._end()

    async def pieces(self, patience: Callable[[], float]) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Yield (index of the answer, piece) as they come, until all answers are finished; an empty
        list where none came.

        Args:
          patience: returns the seconds to wait for the next piece.

        Raises:
          ApiError: if an answer fails; the others are cancelled.
        """
        try:
            while self._open:
                taken, kept = await self._outbox.take(patience()), []
                try:
                    for index, piece in taken:
                        if self._observe(index, piece):
                            kept.append((index, piece))
                except ApiError:
                    if kept:
                        yield kept
                    raise
                if kept or not taken:
                    yield kept
        finally:
            self.cancel()

    async def whole(
        self, *, read_seconds: float | None = None, write_seconds: float | None = None
    ) -> list[Written]:
        """Return the answers once they are finished, or what there is when their time is over: the
        text of an answer that is not finished is its last draft.

        Args:
          read_seconds: in which the prompt must be read.
          write_seconds: in which the answers must be written, once the first one's prompt is read.

        Raises:
          ApiError: as `pieces`.
        """
        written = [Written() for _ in self._runs]
        timer, is_read = self._expire_after(read_seconds), False
        try:
            async for some in self.pieces(lambda: _LONG):
                for index, piece in some:
                    if isinstance(piece, Expired):
                        return [each.as_it_is() for each in written]
                    if isinstance(piece, PrefillDone) and not is_read:
                        timer.cancel()
                        timer, is_read = self._expire_after(write_seconds), True
                    written[index].observe(piece)
        finally:
            timer.cancel()
        return written

    def _expire_after(self, seconds: float | None) -> asyncio.TimerHandle:
        """Let the answers end after a time, or practically never for None."""
        loop = asyncio.get_running_loop()
        wait = _LONG if seconds is None else seconds
        return loop.call_later(wait, lambda: self._outbox.put(0, Expired()))

    def cancel(self) -> None:
        """End what still runs within a step. May be called at any time."""
        self._stay()
        if self._open and not self._state.is_ending:
            self._state.metrics.add("cancelled_total", len(self._open))
        self._open.clear()
        for run, pump in zip(self._runs, self._pumps, strict=True):
            run.cancel()
            pump.cancel()

    def _observe(self, index: int, piece: Piece) -> bool:
        """Count a piece; return whether the client is told of it."""
        if isinstance(piece, Failed):
            self._open.discard(index)
            raise from_error(piece.error, self.asked.param) from piece.error
        if isinstance(piece, ToolCall) and self.asked.one_call:
            if index in self._called:
                return False
            self._called.add(index)
        if isinstance(piece, Expired):
            self._open.clear()
            return True
        before = self.usage.prompt_tokens
        self.usage.observe(piece)
        metrics = self._state.metrics
        if isinstance(piece, PrefillDone) and not before:
            metrics.add("prompt_tokens_total", piece.prompt_tokens)
            metrics.add("cached_tokens_total", piece.cached_tokens)
        elif isinstance(piece, Finished):
            self._open.discard(index)
            metrics.add("completion_tokens_total", piece.new_tokens)
            metrics.add("canvases_total", piece.canvases)
        return True

    async def _pump(self, index: int, run: Run) -> None:
        """Take a run's words as they come, so that they wait in the outbox only."""
        finished = False
        try:
            async for said in run:
                self._outbox.put(index, said)
                finished |= isinstance(said, Finished)
            if not finished:  # it was cancelled by somebody else
                self._outbox.put(index, Failed(busy("the answer was cancelled")))
        except Exception as error:  # whatever ends the run is the client's news
            self._outbox.put(index, Failed(error))

    def _end(self) -> None:
        """Say that the server ends."""
        for index in list(self._open):
            self._outbox.put(index, Failed(busy("the server ends")))


async def beside(
    state: State, work: Callable[[], T], param: str | None = None, *, compiles: bool = False
) -> T:
    """Return what a function returns in a thread beside the event loop and the engine's. Few run at
    a time, and those that compile constraints do not hold up the others.

    Args:
      state: of the server.
      work: encodes a prompt, or compiles.
      param: the field that it is about, for errors.
      compiles: whether it compiles a constraint, or lifts one.

    Raises:
      ApiError: for a DiffGemmaError; 429 if too many wait.
    """
    threads = state.compilers if compiles else state.encoders
    try:
        return await threads.run(work)
    except DiffGemmaError as error:
        raise from_error(error, param) from error


async def start(state: State, asked: Asking) -> Answers:
    """Submit a request's rows to its model's engine.

    Raises:
      ApiError: with the status for the client; nothing runs then.
    """
    served = state.model(asked.model)

    def on_step(seconds: float) -> None:
        state.metrics.add("steps_total", 1)
        state.metrics.add("step_seconds_total", seconds)

    def submit() -> list[Run]:
        runs: list[Run] = []
        try:
            for number in range(asked.count):
                runs.append(served.engine.submit(asked.task(number, on_step)))
        except BaseException:
            for run in runs:
                run.cancel()
            raise
        return runs

    runs = await beside(state, submit, asked.param, compiles=asked.compiles)
    return Answers(state, served, asked, runs)


def settings_of(
    state: State,
    *,
    max_tokens: int | None,
    temperature: float | None = None,
    seed: int | None = None,
    more: dict[str, Any] | None = None,
) -> GenerationSettings:
    """Return the server's settings with a request's own.

    Raises:
      ApiError: if they cannot be used together.
    """
    own: dict[str, Any] = {"max_new_tokens": max_tokens or state.limits.max_answer_tokens}
    if temperature is not None:
        own["temperature"] = float(temperature)
    if seed is not None:
        own["seed"] = seed % SEEDS
    try:
        return replace(state.settings, **own, **(more or {}))
    except DiffGemmaError as error:
        raise from_error(error) from error
