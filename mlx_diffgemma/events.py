"""The events of a run, in order: prefill, then steps and a commit per canvas, then the end.

Each event speaks of one row; the rows of a run are numbered from 0. Arrays are `[1, L]` (L the
canvas) and lazy: nothing is computed for a listener that does not read them. Under
`canvas_width="answer"` and `prefix_commit` a step's arrays hold only the columns that the step
computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, slots=True, eq=False)
class PrefillDone:
    """A row's prompt is in its context."""

    prompt_tokens: int
    cached_tokens: int  # of them, those that a kept context held already
    seconds: float
    row: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StepDone:
    """One denoise step."""

    canvas_index: int
    step: int  # from 0
    draft: mx.array  # [1, L] int32, the best guess so far
    accepted: mx.array  # [1, L] bool, where the proposal was kept
    entropy: mx.array  # [1, L] float32, nats; 0 where a token is pinned
    certainty: mx.array  # [1, L] float32, probability of the draft's tokens; 1 where pinned
    candidates: tuple[mx.array, mx.array] | None = (
        None  # ids int32 and probabilities, [1, L, k], best first
    )
    row: int = 0
    # float32 [P, N], natural logarithms of the probabilities at temperature 1 of the row's
    # `Readout`: N tokens at the first P positions.
    readout: mx.array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CanvasCommitted:
    """A canvas is final. After the first end token `tokens` holds padding. Under `prefix_commit` it
    may be the left part of a canvas, whose rest goes on as the next one; under `warm_read` standing
    text that was read, without a step."""

    canvas_index: int
    # [1, L] int32; narrower where `max_new_tokens` cuts the canvas, where a narrow canvas lost its
    # end token in its last step, and for parts and text that was read.
    tokens: mx.array
    steps: int  # denoise steps run on this canvas
    row: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A row is complete."""

    reason: Literal["stop", "length"]  # an end token, or the limit was reached
    new_tokens: int  # the end token counts, padding does not
    steps: int  # denoise steps over all canvases
    # Committed; under `prefix_commit` each part counts, under `warm_read` each pass that kept some.
    canvases: int
    # Canvas columns computed, summed over steps: the work done. Standing tokens that were read and
    # not kept count too.
    positions: int
    row: int = 0
    constraint: Literal["kept"] | None = None  # the answer fits, and was checked; None without one
    stop_string: str | None = None  # that ended the answer
    thought_tokens: int = 0  # of the new tokens, those of thoughts, without their markers

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoise step, as transformers counts them."""
        return self.new_tokens / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class TrialStarted:
    """`fill` starts a canvas, whose steps follow: one that finds the lengths of slots, where they
    are open, and one for the text."""

    window: int  # from 0; a long template is written window by window
    slots: tuple[str, ...]  # names of the slots that the window writes
    lengths: tuple[int | None, ...]  # tokens of each slot; None as long as they are open
    pinned: mx.array  # [1, L] bool, True where the text is given
    is_final: bool  # False: the canvas only finds lengths, and its text is dropped


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text that will not change any more."""

    piece: str
    channel: Literal["answer", "thought"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model calls a tool. Its text is in no `Text`."""

    id: str  # "call_0", "call_1", ... over the conversation, for the `tool_call_id` of the result
    name: str
    arguments: dict[str, Any]  # JSON's types

    def line(self) -> str:
        """Return the call in one line, for display."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f"{self.name}({arguments})"


@dataclass(frozen=True, slots=True)
class BrokenToolCall:
    """A tool call that cannot be carried out. Its text comes as a `Text` of the answer just
    before."""

    id: str
    text: str  # all of it, with its markers
    problem: Literal["incomplete", "malformed"]  # it was cut off, or cannot be read


LoopEvent = PrefillDone | StepDone | CanvasCommitted | Finished
Event = LoopEvent | TrialStarted | Text | ToolCall | BrokenToolCall
