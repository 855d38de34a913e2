"""The trace of a run, step by step: a plain object (run.json) and a self-contained page (run.html).
Keeps row 0 of each step.

run.json:

    format      "mlx_diffgemma.trace/1"
    model (a repository's id or a folder's name), seed, prompt, settings (those that were given),
    complete (False: the run was cut short)
    text        {"answer", "thought"}: what is final
    tool_calls  each {"id", "name", "arguments"}
    vocabulary  token id -> how it looks, for every id below; a control token by its name
    controls    the ids among them that are control tokens
    canvases    each {"canvas", "tokens" (None where it was not committed), "text", "steps"}
    steps       each {"step", "attempt", "accepted_tokens", "free_tokens", "mean_entropy", and per
                position "draft", "accepted", "certainty", "entropy" (nats) and "candidates", which
                is [[id, probability], ...], best first}

A run of `fill` or `edit` has an entry of canvases for each look for lengths and for each text, with
two more fields: "trial" is {"final" (False: the text was dropped), "lengths" (of the slots, tokens;
None as long as they are open)}, and "pinned" tells for each position whether its text was given.
What is pinned does not count in "accepted_tokens", "free_tokens" and "mean_entropy".

`step` and `canvas` count from 0. `attempt` is above 0 where an empty canvas was drawn again. A step
may be narrower than the canvas, under `canvas_width="answer"`.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..checkpoint.files import write_whole
from ..config.generation import GenerationSettings
from ..events import CanvasCommitted, Event, Finished, StepDone, Text, ToolCall, TrialStarted
from ..language.text import CERTAINTY_BANDS, Spellings
from .pages import FORMAT, check_page, model_name

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

PAGE_FILES = ("trace.html", "trace.css", "trace_view.js")
CANDIDATES = 5  # per position, unless the vocabulary is smaller
_PLACE_OF_DATA = "@@RUN@@"  # in trace.html
_THOUSANDTHS = 1000  # the page's precision of probabilities and nats


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One step of row 0. W positions, k candidates."""

    step: int
    attempt: int
    pinned: np.ndarray  # bool [W]
    draft: np.ndarray  # int32 [W]
    accepted: np.ndarray  # bool [W]
    certainty: np.ndarray  # float32 [W]
    entropy: np.ndarray  # float32 [W]
    candidates: np.ndarray  # int32 [W, k]
    probabilities: np.ndarray  # float32 [W, k]

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "attempt": self.attempt,
            "accepted_tokens": int((self.accepted & ~self.pinned).sum()),
            "free_tokens": (free := int((~self.pinned).sum())),
            "mean_entropy": round(float(self.entropy[~self.pinned].mean()) if free else 0.0, 6),
        }


@dataclass(slots=True, eq=False)
class _Canvas:
    index: int
    trial: dict[str, Any] | None = None
    pinned: list[bool] | None = None
    steps: list[_Step] = field(default_factory=list)
    tokens: list[int] | None = None

    @property
    def about(self) -> dict[str, Any]:
        trial = {} if self.trial is None else {"trial": self.trial, "pinned": self.pinned}
        return {"canvas": self.index, **trial}


class Trace:
    """Records a run of one prompt, or of `fill` or `edit`. The page shows candidates only if the
    settings ask for `CANDIDATES`."""

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        *,
        model: str,
        prompt: str,
        settings: GenerationSettings,
    ) -> None:
        self._tokenizer, self._spellings = tokenizer, Spellings(tokenizer)
        given = {f.name: getattr(settings, f.name) for f in fields(settings)}
        self._about = {
            "model": model_name(model),
            "seed": given.pop("seed"),
            "prompt": prompt,
            "settings": {name: value for name, value in given.items() if value not in (None, ())},
        }
        self._canvases: list[_Canvas] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._text = {"answer": "", "thought": ""}
        self._is_complete = False

    def observe(self, event: Event) -> None:
        """Record an event; this reads a step's arrays."""
        match event:
            case TrialStarted():
                trial = {
                    "final": event.is_final,
                    "lengths": dict(zip(event.slots, event.lengths, strict=True)),
                }
                pinned = np.array(event.pinned)[0].tolist()
                self._canvases.append(_Canvas(event.window, trial, pinned))
            case StepDone():
                canvas = self._canvas(event.canvas_index)
                before = canvas.steps[-1] if canvas.steps else None
                attempt = 0 if before is None else before.attempt + (event.step <= before.step)
                canvas.steps.append(_recorded(event, attempt, canvas.pinned))
            case CanvasCommitted():
                canvas = self._canvas(event.canvas_index)
                canvas.tokens = np.array(event.tokens[0]).tolist()
            case Text():
                self._text[event.channel] += event.piece
            case ToolCall():
                self._tool_calls.append(asdict(event))
            case Finished():
                self._is_complete = True

    def conclude(self, answer: str) -> None:
        """Record the result of `fill` or `edit`, which no event holds."""
        self._text["answer"] = answer
        self._is_complete = True

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been recorded."""
        return not any(canvas.steps for canvas in self._canvases)

    def as_object(self) -> dict[str, Any]:
        """Return the content of run.json; see the head of this file."""
        ids = self._ids()
        return {
            **self._head(),
            "vocabulary": {str(token): self._spellings[token] for token in ids},
            "controls": [token for token in ids if self._spellings.is_control(token)],
            "canvases": [
                {
                    **canvas.about,
                    "tokens": canvas.tokens,
                    "text": self._decode(canvas),
                    "steps": [_plain(step) for step in canvas.steps],
                }
                for canvas in self._canvases
            ],
        }

    def html(self) -> str:
        """Return the page."""
        template, style, view = (
            files(__package__).joinpath(name).read_text(encoding="utf-8") for name in PAGE_FILES
        )
        template = template.replace("@@STYLE@@", style).replace("@@VIEW@@", view)
        before, after = template.split(_PLACE_OF_DATA)
        return before + _inside_script(json.dumps(self._for_page())) + after

    def write(self, page: Path) -> Path:
        """Write the page, and the plain object beside it; return the latter's path. Files are never
        half written, and only older traces are replaced.

        Raises:
          DiffGemmaError: if one of them cannot be written.
        """
        beside = check_page(page)
        write_whole(beside, json.dumps(self.as_object()).encode())
        write_whole(page, self.html().encode())
        return beside

    def _canvas(self, index: int) -> _Canvas:
        if not self._canvases or self._canvases[-1].index != index:
            self._canvases.append(_Canvas(index))
        return self._canvases[-1]

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self._about,
            "complete": self._is_complete,
            "text": self._text,
            "tool_calls": self._tool_calls,
        }

    def _ids(self) -> list[int]:
        """Return every token id that occurs, in order."""
        parts = [np.array(canvas.tokens or [], np.int32) for canvas in self._canvases]
        for canvas in self._canvases:
            for step in canvas.steps:
                parts += [step.draft, step.candidates.ravel()]
        return np.unique(np.concatenate(parts)).tolist() if parts else []

    def _decode(self, canvas: _Canvas) -> str | None:
        if canvas.tokens is None:
            return None
        return str(self._tokenizer.decode(canvas.tokens, clean_up_tokenization_spaces=False))

    def _for_page(self) -> dict[str, Any]:
        """Return the page's data: the head plain, words and columns packed."""
        ids = self._ids()
        steps = [step for canvas in self._canvases for step in canvas.steps]
        return {
            **self._head(),
            "bands": CERTAINTY_BANDS,
            "thousandths": _THOUSANDTHS,
            "candidates": max((step.candidates.shape[1] for step in steps), default=0),
            "canvases": [
                {
                    "canvas": canvas.index,
                    "trial": canvas.trial,
                    "text": self._decode(canvas),
                    "steps": [{**step.summary, "width": len(step.draft)} for step in canvas.steps],
                }
                for canvas in self._canvases
            ],
            "controls": [i for i, token in enumerate(ids) if self._spellings.is_control(token)],
            "words": _packed(json.dumps([self._spellings[token] for token in ids]).encode()),
            "columns": _packed(_columns(steps, np.array(ids, np.int32))),
        }


def _recorded(event: StepDone, attempt: int, pinned: list[bool] | None) -> _Step:
    draft, accepted, certainty, entropy = (
        event.draft[0],
        event.accepted[0],
        event.certainty[0],
        event.entropy[0],
    )
    ids, probabilities = (c[0] for c in event.candidates or 2 * (mx.zeros((1, len(draft), 0)),))
    mx.eval(draft, accepted, certainty, entropy, ids, probabilities)
    return _Step(
        event.step,
        attempt,
        np.array(pinned[: len(draft)] if pinned else [False] * len(draft), bool),
        np.array(draft, np.int32),
        np.array(accepted, bool),
        np.array(certainty, np.float32),
        np.array(entropy, np.float32),
        np.array(ids, np.int32),
        np.array(probabilities, np.float32),
    )


def _plain(step: _Step) -> dict[str, Any]:
    pairs = zip(step.candidates.tolist(), _rounded(step.probabilities), strict=True)
    return {
        **step.summary,
        "draft": step.draft.tolist(),
        "accepted": step.accepted.tolist(),
        "certainty": _rounded(step.certainty),
        "entropy": _rounded(step.entropy),
        "candidates": [list(map(list, zip(*pair, strict=True))) for pair in pairs],
    }


def _rounded(values: np.ndarray) -> Any:
    return values.astype(np.float64).round(5).tolist()


def _columns(steps: list[_Step], ids: np.ndarray) -> bytes:
    """Return the numbers of all positions of all steps, column by column and byte by byte, which
    compresses well: 1 byte with bit 0 for accepted and bit 1 for pinned; certainty and entropy, 2
    bytes in thousandths; draft 3, as the word's place in the table; then per candidate 3 and 2
    likewise. Little end first. Draft and certainty are kept as their XOR with the first
    candidate's."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(step, name) for step in steps])

    def planes(values: np.ndarray, count: int) -> bytes:
        return b"".join((values >> 8 * i & 255).astype(np.uint8).tobytes() for i in range(count))

    def thousandths(values: np.ndarray) -> np.ndarray:
        return np.minimum((values * _THOUSANDTHS).round(), 0xFFFF).astype(np.int64)

    if not steps:
        return b""
    words, shares = np.searchsorted(ids, joined("candidates")), thousandths(joined("probabilities"))
    draft, certainty = np.searchsorted(ids, joined("draft")), thousandths(joined("certainty"))
    if words.shape[1]:  # the draft is nearly always the first candidate, and zeros compress well
        draft, certainty = draft ^ words[:, 0], certainty ^ shares[:, 0]
    bits = joined("accepted").astype(np.int64) + 2 * joined("pinned")
    parts = [planes(bits, 1), planes(certainty, 2)]
    parts += [planes(thousandths(joined("entropy")), 2), planes(draft, 3)]
    parts += [planes(words[:, i], 3) + planes(shares[:, i], 2) for i in range(words.shape[1])]
    return b"".join(parts)


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _inside_script(text: str) -> str:
    """Return JSON that no HTML parser mistakes for an end of the script or a comment."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
