"""The numbers of a run, and its events as plain objects for JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import counted
from ..events import (
    BrokenToolCall,
    CanvasCommitted,
    Event,
    Finished,
    PrefillDone,
    StepDone,
    Text,
    ToolCall,
    TrialStarted,
)
from ..language.text import Spellings
from ..write.edit import Edited
from ..write.fill import Filled

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of a finished run of one prompt. A single one of them is misleading."""

    prompt_tokens: int
    prompt_tokens_per_second: float
    new_tokens: int
    tokens_per_second: float  # new tokens over the time from prefill to the end
    canvases: int
    steps: int
    steps_per_canvas: float
    tokens_per_forward: float
    ms_per_step: float
    peak_bytes: int  # of MLX's allocator
    reason: str

    def line(self) -> str:
        """Return all of it in one line."""
        reason = {"stop": "end of answer", "length": "token limit"}[self.reason]
        peak = (
            f"{self.peak_bytes / 1e9:.2f} GB"
            if self.peak_bytes >= 1e9
            else f"{self.peak_bytes / 1e6:.0f} MB"
        )
        return (
            f"prompt {counted(self.prompt_tokens, 'token')}, "
            f"{self.prompt_tokens_per_second:.1f} tokens/s"
            f" | {counted(self.new_tokens, 'token')}, {self.tokens_per_second:.1f} tokens/s"
            f" | {self.canvases} canvas{'es' if self.canvases != 1 else ''}"
            f" x {self.steps_per_canvas:.1f} steps, {self.tokens_per_forward:.1f} tokens/forward,"
            f" {self.ms_per_step:.1f} ms/step"
            f" | peak {peak} | {reason}"
        )


class Stopwatch:
    """Measures a run of one prompt. Times include the work between events."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self._prefill: PrefillDone | None = None
        self._started = self._last = 0.0

    def observe(self, event: Event) -> Summary | None:
        """Return the summary once the run has finished, else None."""
        self._last = time.perf_counter()
        if isinstance(event, PrefillDone):
            self._prefill, self._started = event, self._last
        if not isinstance(event, Finished):
            return None
        assert self._prefill is not None
        seconds = max(self._last - self._started, 1e-9)
        tokens, steps, canvases = event.new_tokens, event.steps, event.canvases
        return Summary(
            prompt_tokens=self._prefill.prompt_tokens,
            prompt_tokens_per_second=self._prefill.prompt_tokens / max(self._prefill.seconds, 1e-9),
            new_tokens=tokens,
            tokens_per_second=tokens / seconds,
            canvases=canvases,
            steps=steps,
            steps_per_canvas=steps / canvases,
            tokens_per_forward=event.tokens_per_forward,
            ms_per_step=1e3 * seconds / steps if steps else 0.0,
            peak_bytes=mx.get_peak_memory(),
            reason=event.reason,
        )


class Drafts:
    """Reads the drafts of a run for `as_object`."""

    def __init__(self, tokenizer: AnyTokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._ends = tokenizer, frozenset(eos_token_ids)
        self._spellings = Spellings(tokenizer)
        self._pinned: list[bool] = []

    def observe(self, event: Event) -> None:
        """Remember the pinned positions of a `TrialStarted` for the steps after it."""
        if isinstance(event, TrialStarted):
            self._pinned = np.array(event.pinned)[0].tolist()

    def free(self, width: int) -> np.ndarray:
        """Return which of the first positions are not pinned, bool [width]."""
        pinned = np.zeros(width, bool)
        pinned[: len(self._pinned)] = self._pinned[:width]
        return ~pinned

    def fields(self, event: StepDone) -> dict[str, Any]:
        """Return the fields that a draft adds to its step.

        draft   the text up to the first end token, without control tokens
        tokens  the tokens before the first end token; each is an object with "text" (a
                control token or half a character by its name), "accepted", "certainty" (the
                token's probability, from 0 to 1) and, in `fill` and `edit`, "pinned" (it is
                part of the given text)
        """
        ids = np.array(event.draft[0]).tolist()
        stop = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        accepted, certainty = np.array(event.accepted[0]), np.array(event.certainty[0])
        tokens: list[dict[str, Any]] = [
            {
                "text": self._spellings[ids[i]],
                "accepted": bool(accepted[i]),
                "certainty": round(float(certainty[i]), 5),
            }
            for i in range(stop)
        ]
        for token, is_pinned in zip(tokens, self._pinned, strict=False):
            token["pinned"] = is_pinned
        text = self._tokenizer.decode(
            ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return {"draft": text, "tokens": tokens}


def as_object(
    event: Event, summary: Summary | None = None, *, drafts: Drafts | None = None
) -> dict[str, Any]:
    """Return one event of a run of one prompt as a JSON object; reads its arrays. With `drafts` a
    step has the fields of `Drafts.fields` too."""
    if drafts is not None:
        drafts.observe(event)
    match event:
        case PrefillDone():
            return {
                "event": "prefill",
                "prompt_tokens": event.prompt_tokens,
                "cached_tokens": event.cached_tokens,
                "seconds": event.seconds,
            }
        case StepDone():
            return {
                "event": "step",
                "canvas": event.canvas_index,
                "step": event.step,
                **_numbers(event, drafts),
                **(drafts.fields(event) if drafts else {}),
            }
        case TrialStarted():
            return {
                "event": "trial",
                "canvas": event.window,
                "final": event.is_final,
                "lengths": dict(zip(event.slots, event.lengths, strict=True)),
            }
        case CanvasCommitted():
            return {
                "event": "canvas",
                "canvas": event.canvas_index,
                "steps": event.steps,
                "tokens": np.array(event.tokens[0]).tolist(),
            }
        case Text():
            return {"event": "text", "channel": event.channel, "text": event.piece}
        case ToolCall():
            return {"event": "tool_call", **asdict(event)}
        case BrokenToolCall():
            return {"event": "broken_tool_call", **asdict(event)}
        case Finished():
            kept = {"constraint": event.constraint} if event.constraint else {}
            return {"event": "finished", **(asdict(summary) if summary else {}), **kept}


def _numbers(event: StepDone, drafts: Drafts | None) -> dict[str, Any]:
    """Return the accepted tokens and the mean entropy in nats, pinned tokens left out."""
    accepted, entropy = np.array(event.accepted[0]), np.array(event.entropy[0])
    free = np.ones(accepted.shape, bool) if drafts is None else drafts.free(len(accepted))
    return {
        "accepted": int(accepted[free].sum()),
        "mean_entropy": float(entropy[free].mean()) if free.any() else 0.0,
    }


def edited_object(edited: Edited) -> dict[str, Any]:
    """Return an edited document as a JSON object: the whole text, the selection and its
    replacement, then the work as for `filled_object`."""
    facts = filled_object(edited.filled)
    (slot,) = facts.pop("slots").values()
    selection = edited.selection
    return {
        "text": edited.text,
        "selection": {
            "start": selection.start,
            "stop": selection.stop,
            "text": edited.before[selection.start : selection.stop],
        },
        "replacement": edited.replacement,
        **{name: slot[name] for name in ("tokens", "certainty", "lengths")},
        **{name: value for name, value in facts.items() if name != "text"},
    }


def filled_object(filled: Filled) -> dict[str, Any]:
    """Return a filled template as a JSON object."""
    return {
        "text": filled.text,
        "slots": {
            name: {
                "text": slot.text,
                "tokens": len(slot.tokens),
                "certainty": round(slot.certainty, 6),
                "lengths": {str(n): round(chance, 4) for n, chance in sorted(slot.lengths.items())},
            }
            for name, slot in filled.slots.items()
        },
        "notes": list(filled.notes),
        "prompt_tokens": filled.prompt_tokens,
        "canvases": filled.canvases,
        "steps": filled.steps,
        "positions": filled.positions,
    }


def filled_lines(filled: Filled, name: str | None = None) -> list[str]:
    """Return a report on a filled template, in lines: notes, then slots, then the work.

    Args:
      filled: the result.
      name: of its only slot, for a reader who has made none.
    """
    lines = [*filled.notes]
    for slot in filled.slots.values():
        size = counted(len(slot.tokens), "token")
        line = f"{name or f'slot {slot.name}'}: {size}, certainty {slot.certainty:.0%}"
        others = sorted(slot.lengths.items(), key=lambda pair: -pair[1])[:4]
        if len(others) > 1:
            chances = ", ".join(f"{n}: {chance:.1%}" for n, chance in others)
            line += f"; likely lengths {chances}"
        lines.append(line)
    return [*lines, f"{counted(filled.steps, 'step')}, {filled.positions:,} rows x steps"]
