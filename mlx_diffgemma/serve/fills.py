"""Gaps in code, for editors: what is before and behind the cursor is pinned, the model writes
between."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..config.generation import GenerationSettings
from ..errors import TemplateError
from ..events import Event, Finished, PrefillDone, StepDone, Text, TrialStarted
from ..language.prompt import encode_text
from ..language.template import SHOWN_BLANK, Slot, Template
from ..language.text import draft_pieces
from ..write.fill import Filled, FillTask
from ..write.job import Ask, Job, Task
from .errors import ApiError
from .pieces import Draft, OnStep, Piece, Shortened
from .runs import seeded

_NAME = "gap"


@dataclass(frozen=True, kw_only=True)
class AskedFill:
    """A checked request to fill a gap, for `runs.start`.

    Attributes:
      before: the text up to the cursor; it stays as it is.
      after: the text behind it.
      prompt: what the model is told; {code} is the code with a blank, {files} other files.
      files: name and text of other files.
      request: text of the client's that {request} in the prompt stands for.
      most: tokens of the gap at most; None leaves it to the model.
      old: the text that was there; the gap has from half of its tokens to twice as many and 8 more.
      window: tokens of the text around the gap that the model sees.
      indent: spaces that every further line has at least; the gap ends before one with fewer.
      stop: strings before which the gap ends.
      fence: stands on a line of its own before and behind the answer.
    """

    before: str
    after: str
    prompt: str
    settings: GenerationSettings
    window: int
    files: Sequence[tuple[str, str]] = ()
    request: str = ""
    most: int | None = None
    old: str | None = None
    indent: int = 0
    fence: str = ""
    stop: Sequence[str] = ()
    model: str | None = None
    count: int = 1
    drafts: bool = False
    one_call: bool = False
    param: str = "prompt"
    compiles: bool = False

    def __post_init__(self) -> None:
        if not (self.before + self.after).strip():
            raise ApiError(400, f"{self.param}: there is no text around the gap", param=self.param)

    def task(self, number: int, on_step: OnStep) -> Task:
        return _Gap(self, seeded(self.settings, number), on_step)

    def finished(self, text: str) -> str:
        """Return the text of a gap as the client gets it: up to a stop string, and to a line with
        less indentation."""
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        text = text[: min(ends)] if ends else text
        first, *lines = text.split("\n")
        kept = [first]
        for line in lines:
            if line.strip() and len(line) - len(line.lstrip(" \t")) < self.indent:
                break
            kept.append(line)
        text = "\n".join(kept)
        return f"{self.fence}\n{text}\n{self.fence}" if self.fence else text


@dataclass(frozen=True, slots=True)
class _Gap:
    """The task of a gap, whose job says pieces."""

    asked: AskedFill
    settings: GenerationSettings
    on_step: OnStep

    def job(self, model: Any, tokenizer: Any) -> Job[Any]:
        asked = self.asked
        canvas = self.settings.resolve(model.config).canvas_length
        before, after = _near(tokenizer, asked.before, asked.after, asked.window)
        parts = [part for part in (before, Slot(_NAME, "gap"), after) if part != ""]
        files = "".join(f"{name}:\n\n{text}\n\n" for name, text in asked.files)
        code = f"{before}{SHOWN_BLANK}{after}"
        shown = {"{files}": files, "{code}": code, "{request}": asked.request}
        # In one pass: a file may hold "{code}" itself.
        told = re.sub("|".join(map(re.escape, shown)), lambda found: shown[found[0]], asked.prompt)
        least, most = 1, min(canvas, asked.most or canvas)
        if asked.old is not None:
            count = len(encode_text(tokenizer, asked.old))
            if count > canvas:
                raise TemplateError(
                    f"the part to rewrite has {count} tokens, and a canvas holds {canvas}; mark "
                    "less"
                )
            most = min(2 * count + 8, most)
            least = min(max(1, count // 2), most)
        task = FillTask(
            template=Template(tuple(parts)),
            prompt=told,
            gap_tokens=(least, most),
            settings=self.settings,
            is_shown=True,
            standing={_NAME: asked.old} if asked.old else {},
        )
        ends = self.settings.resolve(model.config).eos_token_ids

        def text_of(step: StepDone) -> str:
            pieces = draft_pieces(tokenizer, step, ends)
            return _between("".join(text for text, _ in pieces), before, after)

        is_shortened = (before, after) != (asked.before, asked.after)
        teller = _Teller(asked, text_of, self.on_step, is_shortened)
        return _told(task.job(model, tokenizer), teller)


@dataclass(slots=True)
class _Teller:
    """Makes pieces of a fill's events."""

    asked: AskedFill
    text_of: Callable[[StepDone], str]
    on_step: OnStep
    is_shortened: bool
    is_final: bool = False  # whether the text is written now, and not a length looked for
    last: float = field(default_factory=time.perf_counter)

    def pieces(self, said: Event | Filled) -> Iterator[Piece]:
        """Yield what a client is told of an event."""
        if isinstance(said, PrefillDone):
            if self.is_shortened:
                yield Shortened()
            yield said
        elif isinstance(said, TrialStarted):
            self.is_final, self.last = said.is_final, time.perf_counter()
        elif isinstance(said, StepDone):
            self.last, before = time.perf_counter(), self.last
            self.on_step(self.last - before)
            if self.asked.drafts and (self.is_final or said.row == 0):
                yield Draft(self.asked.finished(self.text_of(said)), "")
        elif isinstance(said, Filled):
            slot = said.slots[_NAME]
            yield Text(self.asked.finished(slot.text), "answer")
            yield Finished("stop", len(slot.tokens), said.steps, said.canvases, said.positions)


def _told(job: Job[Any], teller: _Teller) -> Job[Any]:
    """Pass a job's demands on, and its events as pieces."""
    with closing(job):
        said = next(job)
        while True:
            event = None
            if said is None or isinstance(said, Ask):
                event = yield said
            else:
                yield from teller.pieces(said)
            try:
                said = job.send(event)
            except StopIteration:
                return


def _near(tokenizer: Any, before: str, after: str, most: int) -> tuple[str, str]:
    """Return the text nearest to the cursor in about `most` tokens, three quarters of it before the
    cursor where there is so much, in whole lines."""
    counts = [len(encode_text(tokenizer, text)) for text in (before, after)]
    if sum(counts) <= most:
        return before, after
    head = min(counts[1], max(most // 4, most - counts[0]))
    lead = min(counts[0], most - head)
    tail = before[len(before) - len(before) * lead // max(1, counts[0]) :]
    front = after[: len(after) * head // max(1, counts[1])]
    if len(tail) < len(before) and "\n" in tail:
        tail = tail[tail.index("\n") + 1 :]
    if len(front) < len(after) and "\n" in front:
        front = front[: front.rindex("\n") + 1]
    return tail, front


def _between(text: str, before: str, after: str) -> str:
    """Return what stands in a draft between as much of both texts as it shows."""
    lengths = range(min(len(before), len(text)), 0, -1)
    rest = text[next((n for n in lengths if before.endswith(text[:n])), 0) :]
    lengths = range(min(len(after), len(rest)), 0, -1)
    return rest[: len(rest) - next((n for n in lengths if after.startswith(rest[-n:])), 0)]
