"""Runs step by step, as the page shows them: each denoise step with its tokens and how sure they
are, beside the settled text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..config.generation import GenerationSettings
from ..events import (
    BrokenToolCall,
    CanvasCommitted,
    Finished,
    PrefillDone,
    StepDone,
    Text,
    ToolCall,
    TrialStarted,
)
from ..language.controls import THOUGHT_BEGIN, THOUGHT_END, special_tokens
from ..language.text import Spellings
from ..language.tools import CALL_BEGIN, CALL_END
from ..view.report import filled_object
from ..write.edit import Edited
from ..write.fill import Filled
from ..write.job import Ask, Job, Task
from .errors import ApiError, openai_form
from .openai_types import new_id, usage_of
from .pieces import OnStep, Passing
from .runs import Answers, Usage, seeded
from .sse import frame

THOUSANDTHS = 1000  # the precision of probabilities and nats


class Candidate(NamedTuple):
    """A likely token of a position."""

    token: int
    thousandths: int  # probability


@dataclass(frozen=True, slots=True, eq=False)
class Step(Passing):
    """One denoise step; lists have an entry per position of the canvas."""

    canvas: int
    step: int
    at: float  # when it was done, on the clock of time.perf_counter
    draft: list[int]
    kinds: str  # see Kinds
    accepted: list[int]  # 0 or 1
    certainty: list[int]  # thousandths
    entropy: list[int]  # thousandths of a nat
    pinned: list[int] | None  # 0 or 1
    trial: dict[str, Any] | None  # of a fill: {"final", "lengths"}
    candidates: list[list[Candidate]]


@dataclass(frozen=True, slots=True)
class Canvas:
    """A canvas is committed."""

    canvas: int
    steps: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Result:
    """What `fill` or `edit` returns, as an object."""

    content: dict[str, Any]


Check = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class AskedSteps:
    """A checked request for a run step by step, for `runs.start`.

    Attributes:
      make: makes the task under the settings of a row.
      settings: how to denoise, with a seed.
      model: its name; None for the default one.
      count: rows; row i is drawn under the seed + i.
      check: whether the text of a result is what was asked for; None asks for nothing.
      one_call: drop tool calls behind the first one.
      compiles: whether making a task lifts a constraint to tokens.
      param: the field that names the prompt, for errors.
    """

    make: Callable[[GenerationSettings], Task]
    settings: GenerationSettings
    model: str | None = None
    count: int = 1
    check: Check | None = None
    drafts: bool = True
    one_call: bool = False
    compiles: bool = True
    param: str = "chat"

    def task(self, number: int, on_step: OnStep) -> Task:
        return _Stepped(self, self.make(seeded(self.settings, number)), on_step)


@dataclass(frozen=True, slots=True)
class _Stepped:
    """A task whose job says steps."""

    asked: AskedSteps
    task: Task
    on_step: OnStep

    def job(self, model: Any, tokenizer: Any) -> Job[Any]:
        job = self.task.job(model, tokenizer)
        ends = self.asked.settings.resolve(model.config).eos_token_ids
        return _told(job, _Teller(Kinds(tokenizer, ends), self.asked.check, self.on_step))


def _told(job: Job[Any], teller: _Teller) -> Job[Any]:
    """Pass a job's demands on, and its events as pieces."""
    is_first = True
    with closing(job):
        said = next(job)
        while True:
            event = None
            if said is None or isinstance(said, Ask):
                if said is not None and is_first:
                    teller.kinds.begin(said.rows[0].unread)
                    is_first = False
                event = yield said
            else:
                yield from teller.pieces(said)
            try:
                said = job.send(event)
            except StopIteration:
                return


@dataclass(slots=True)
class _Teller:
    """Makes pieces of a job's events; reads the arrays of each step."""

    kinds: Kinds
    check: Check | None
    on_step: OnStep
    trial: dict[str, Any] | None = None
    pinned: list[int] | None = None
    last: float = field(default_factory=time.perf_counter)

    def pieces(self, said: Any) -> Iterator[Any]:
        """Yield what the client is told of an event."""
        if isinstance(said, StepDone):
            self.last, before = time.perf_counter(), self.last
            self.on_step(self.last - before)
            yield self._step(said)
        elif isinstance(said, TrialStarted):
            lengths = dict(zip(said.slots, said.lengths, strict=True))
            self.trial = {"final": said.is_final, "lengths": lengths}
            self.pinned = np.array(said.pinned)[0].astype(int).tolist()
        elif isinstance(said, CanvasCommitted):
            tokens = np.array(said.tokens[0]).tolist()
            self.kinds.commit(tokens)
            yield Canvas(said.canvas_index, said.steps, tokens)
        elif isinstance(said, Filled | Edited):
            filled = said.filled if isinstance(said, Edited) else said
            text = said.replacement if isinstance(said, Edited) else said.text
            content = {**filled_object(filled), "text": text}
            if self.check is not None:
                content["valid"] = self.check(text)
            yield Result(content)
            written = sum(len(slot.tokens) for slot in filled.slots.values())
            yield Finished("stop", written, filled.steps, filled.canvases, filled.positions)
        else:
            self.last = time.perf_counter()
            yield said

    def _step(self, said: StepDone) -> Step:
        draft = np.array(said.draft[0]).tolist()
        candidates: list[list[Candidate]] = []
        if said.candidates is not None:
            ids, chances = (np.array(each[0]) for each in said.candidates)
            candidates = [
                [Candidate(*pair) for pair in zip(*row, strict=True)]
                for row in zip(ids.tolist(), _thousandths(chances), strict=True)
            ]
        return Step(
            canvas=said.canvas_index,
            step=said.step,
            at=self.last,
            draft=draft,
            kinds=self.kinds.of(draft),
            accepted=np.array(said.accepted[0]).astype(int).tolist(),
            certainty=_thousandths(np.array(said.certainty[0])),
            entropy=_thousandths(np.array(said.entropy[0])),
            pinned=self.pinned[: len(draft)] if self.pinned is not None else None,
            trial=self.trial,
            candidates=candidates,
        )


def _thousandths(values: np.ndarray) -> Any:
    return (values.astype(np.float64) * THOUSANDTHS).round().astype(int).tolist()


class Kinds:
    """What each token of a row's canvases is, as one letter: `a` text of the answer, `t` of a
    thought, `c` of a tool call, `x` a control token or the name of a channel, `e` the end of the
    answer and what is behind it."""

    def __init__(self, tokenizer: Any, ends: Iterable[int]) -> None:
        specials = special_tokens(tokenizer)
        names = (THOUGHT_BEGIN, THOUGHT_END, CALL_BEGIN, CALL_END)
        self._open, self._close, self._call, self._called = map(specials.get, names)
        self._hidden = frozenset(specials.values())
        self._ends = frozenset(ends)
        self._spellings = Spellings(tokenizer)
        # Where a canvas begins: a, t, c, or n inside of a channel's name.
        self._state = "a"

    def begin(self, prompt: np.ndarray | None) -> None:
        """Go on behind a prompt, int32 [L], where the template may have left a thought open."""
        tokens = [] if prompt is None else prompt.tolist()
        markers = [i for i, token in enumerate(tokens) if token in (self._open, self._close)]
        self.commit(tokens[markers[-1] :] if markers else [])

    def of(self, draft: Sequence[int]) -> str:
        """Return the letters of a draft."""
        return self._read(draft)[0]

    def commit(self, tokens: Sequence[int]) -> None:
        """Take the tokens of a canvas: the next one goes on from there."""
        self._state = self._read(tokens)[1]

    def _read(self, tokens: Sequence[int]) -> tuple[str, str]:
        letters: list[str] = []
        state = self._state
        for token in tokens:
            if token in self._ends:
                break
            if token == self._open and state != "c":
                state, letter = "n", "x"
            elif token == self._close and state != "c":
                state, letter = "a", "x"
            elif token == self._call and state != "t":
                state, letter = "c", "x"
            elif token == self._called and state == "c":
                state, letter = "a", "x"
            elif token in self._hidden:
                letter = "x"
            elif state == "n":  # up to the line break behind it
                letter = "x"
                state = "t" if "\n" in self._spellings[token] else "n"
            else:
                letter = state
            letters.append(letter)
        return "".join(letters).ljust(len(tokens), "e"), state


class StepWire:
    """The stream of `POST /x/events`; docs/server.md lists the events."""

    def __init__(self, answers: Answers, asked: AskedSteps) -> None:
        served = answers.served
        self._model, self._asked = served.name, asked
        self._spellings = Spellings(served.engine.tokenizer)
        resolved = asked.settings.resolve(served.engine.model.config)
        self._told: set[int] = set()  # ids whose spelling the client has
        self._most_steps = resolved.max_denoising_steps
        self._started = time.perf_counter()

    def begin(self) -> Iterator[bytes]:
        yield self._frame(
            "begin",
            model=self._model,
            seed=self._asked.settings.seed,
            rows=self._asked.count,
            max_steps=self._most_steps,
        )

    def piece(self, index: int, piece: Any) -> Iterator[bytes]:
        if isinstance(piece, Step):
            yield from self._step(index, piece)
        elif isinstance(piece, Canvas):
            yield self._frame("canvas", row=index, **asdict(piece), **self._words(piece.tokens))
        elif isinstance(piece, PrefillDone):
            yield self._frame(
                "prefill",
                row=index,
                prompt_tokens=piece.prompt_tokens,
                cached_tokens=piece.cached_tokens,
                seconds=round(piece.seconds, 4),
            )
        elif isinstance(piece, Text):
            yield self._frame("text", row=index, channel=piece.channel, text=piece.piece)
        elif isinstance(piece, ToolCall):
            called = {"id": new_id("call_"), "name": piece.name, "arguments": piece.arguments}
            yield self._frame("tool_call", row=index, **called)
        elif isinstance(piece, BrokenToolCall):
            yield self._frame("broken_tool_call", row=index, **asdict(piece))
        elif isinstance(piece, Result):
            yield self._frame("result", row=index, **piece.content)
        elif isinstance(piece, Finished):
            yield self._frame(
                "finished",
                row=index,
                reason=piece.reason,
                new_tokens=piece.new_tokens,
                thought_tokens=piece.thought_tokens,
                steps=piece.steps,
                canvases=piece.canvases,
                positions=piece.positions,
                constraint=piece.constraint,
            )

    def keep_alive(self) -> Iterator[bytes]:
        yield self._frame("alive")

    def end(self, usage: Usage) -> Iterator[bytes]:
        yield self._frame("end", usage=usage_of(usage))

    def error(self, error: ApiError) -> Iterable[bytes]:
        yield self._frame("error", **openai_form(error))

    def _step(self, index: int, piece: Step) -> Iterator[bytes]:
        ids = {*piece.draft, *(each.token for row in piece.candidates for each in row)}
        yield self._frame(
            "step",
            row=index,
            ms=round(1e3 * (piece.at - self._started), 1),
            canvas=piece.canvas,
            step=piece.step,
            draft=piece.draft,
            kinds=piece.kinds,
            accepted=piece.accepted,
            certainty=piece.certainty,
            entropy=piece.entropy,
            **({} if piece.trial is None else {"trial": piece.trial, "pinned": piece.pinned}),
            **({"candidates": piece.candidates} if piece.candidates else {}),
            **self._words(ids),
        )

    def _words(self, ids: Iterable[int]) -> dict[str, Any]:
        """Return the spellings of ids that the client does not have yet."""
        new = sorted(set(ids) - self._told)
        self._told.update(new)
        if not new:
            return {}
        controls = [token for token in new if self._spellings.is_control(token)]
        return {"words": {token: self._spellings[token] for token in new}, "controls": controls}

    def _frame(self, event: str, **content: Any) -> bytes:
        return frame({"event": event, **content})
