"""The denoising loop: rows read their text, then denoise a canvas, accept and renoise until it has
settled, commit it, and so on. Rows join and leave between steps. Knows ids, not text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from ..config.generation import GenerationSettings, ResolvedSettings
from ..config.model import ModelConfig
from ..errors import ConfigError, DiffGemmaError, PromptError, TemplateError, ThreadError
from ..events import LoopEvent
from ..model import DiffusionGemma, OpenContext
from ..model.backend import is_cpu
from ..model.images import Seen
from .ahead import predict
from .canvas import Canvas, Plan, Taken
from .checked import checked_tokens
from .images import Features
from .noise import Noise
from .pinned import Pinned
from .row import Row
from .step import take_step
from .store import Store

_COPIED_BYTES = 64 << 20  # from this many on, they are given back


class Rows:
    """Rows that are computed together. Each writes what it would write alone."""

    def __init__(
        self,
        model: DiffusionGemma,
        store: Store | None = None,
        *,
        are_events_computed: bool = False,
    ) -> None:
        """Make an empty set of rows.

        Args:
          model: the model that computes them.
          store: where contexts are found and kept.
          are_events_computed: whether all arrays of a step's events are computed with it, for
            readers in other threads; else only those that most listeners read.

        Raises:
          ConfigError: if the store keeps another model's contexts.
        """
        if store is not None:
            store.serve(model)
        self.model, self._store, self._are_events_computed = model, store, are_events_computed
        self._features = Features() if store is None else store.features
        self.rows: list[Row] = []
        self._mean_row: mx.array | None = None  # [M], for sparse self-conditioning
        self._built: _Built | None = None
        self._copied = 0  # bytes of contexts that steps have copied, which MLX's cache may hold

    def add(self, row: Row) -> None:
        """Let a row join. Nothing of the others is copied or computed again."""
        if row.settings.self_conditioning == "sparse" and self._mean_row is None:
            self._mean_row = self.model.mean_row()
        row.join(self._store)
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Let a row leave before its end; its memory is free after the current step."""
        row.leave()
        self.rows = [each for each in self.rows if each is not row]
        self._built = None  # it may hold the row's context

    def run(self) -> Generator[LoopEvent, None, None]:
        """Run all rows to their ends, in one thread."""
        thread = threading.get_ident()
        while self.rows:
            for _, event in self.advance():
                if isinstance(event, RowFailed):
                    raise event.error
                yield event
                check_thread(thread)

    def advance(self) -> Generator[tuple[Row, LoopEvent | RowFailed], None, None]:
        """Read one piece of text of the rows that have some to read, then take one step of all
        others. Yield events with the rows that they are of. Rows that finish or fail leave."""
        yield from self._read()
        for row in list(self.rows):
            if row.unread is None and row.canvas is None and not row.is_done:
                yield from _events(row, row.begin_canvas)
        yield from self._step([row for row in self.rows if row.canvas is not None])
        self.rows = [row for row in self.rows if not row.is_done]

    def _read(self) -> Iterator[tuple[Row, LoopEvent | RowFailed]]:
        """Read the next piece of some rows in one pass, no more tokens than a piece of the first
        row may have. They go to the end of the line, so that a long text delays nobody."""
        waiting = [row for row in self.rows if row.unread is not None]
        if not waiting:
            return
        if len(waiting[0].ahead):
            yield from self._read_ahead(waiting[0])
            return
        reading: list[Row] = []
        left = waiting[0].settings.prefill_step_size
        for row in waiting:
            if not len(row.ahead) and (not reading or len(row.piece) <= left):
                reading.append(row)
                left -= len(row.piece)
        images: list[Seen | None] = []
        failed: list[tuple[Row, RowFailed]] = []
        for row in list(reading):
            try:
                images.append(row.look(self._features))
            except DiffGemmaError as error:  # such as a damaged file of the tower
                reading.remove(row)
                row.leave()
                failed.append((row, RowFailed(error)))
        if not reading:
            yield from failed
            return
        pieces = [mx.array(row.piece[None]) for row in reading]
        contexts = [row.take_context() for row in reading]
        _, contexts = self.model.encode(pieces, contexts, images, states=False)
        mx.eval([context.arrays for context in contexts])
        mx.clear_cache()
        for row, context in zip(reading, contexts, strict=True):
            if not row.is_done:  # it may have left while another one's event was heard
                yield from _events(row, partial(row.has_read, context))
        self.rows = [row for row in self.rows if row not in reading] + reading
        yield from failed

    def _read_ahead(self, row: Row) -> Iterator[tuple[Row, LoopEvent | RowFailed]]:
        """Read the rest of a row's text with standing tokens behind it, and commit those of them
        that the model would write."""
        piece, ahead = row.piece, row.ahead
        tokens = mx.array(np.concatenate([piece, ahead])[None])
        states, (columns,) = self.model.read_ahead([tokens], [row.take_context()])
        outputs = self.model.outputs(states[:, len(piece) - 1 :])
        seen = predict(outputs, ahead, self.model.config.text.final_logit_softcapping)
        yield from _events(row, partial(row.has_read_ahead, columns, seen))
        if row.context is not None:
            mx.eval(row.context.arrays)
        mx.clear_cache()
        self.rows = [each for each in self.rows if each is not row] + [row]

    def _step(self, rows: list[Row]) -> Iterator[tuple[Row, LoopEvent | RowFailed]]:
        """Take one step of the given rows."""
        if not rows:
            return
        built, self._built, copied = self._built, None, 0
        if built is not None and built.fits([_canvas(row) for row in rows]):
            taken, opened = built.taken, built.opened
        else:
            built = None
            opened = [row.opened.pop() for row in rows]
            copied = sum(each.nbytes for each in opened if each.unread is not None)
            taken, opened = take_step(
                self.model, [_canvas(row) for row in rows], opened, self._mean_row
            )
        for row, each, context in zip(rows, taken, opened, strict=True):
            row.take(each, context)
        del built, opened  # arrays without other references are written in place
        checks = [number for each in taken for number in each.check]
        read = checks[0] if len(checks) == 1 else mx.concatenate(checks)
        mx.async_eval(read, *(array for each in taken for array in self._heard(each)))
        self._build_next(rows)
        for row, each in zip(rows, taken, strict=True):
            if not row.is_done:
                yield row, each.event
        numbers: list[int] = np.array(read).tolist()  # the one host read of a step
        self._copied += copied
        if self._copied > _COPIED_BYTES:
            self._copied = 0
            mx.clear_cache()
        for row, each in zip(rows, taken, strict=True):
            check, numbers = numbers[: len(each.check)], numbers[len(each.check) :]
            if row.canvas is not None and not row.goes_on(check):  # or it has left meanwhile
                yield from _events(row, partial(row.end_canvas, each.event))

    def _build_next(self, rows: list[Row]) -> None:
        """Build the next step of the rows that have one before the host reads this one, so that the
        device need not wait for Python. It is dropped if a row settles, joins or changes its plan.
        """
        waits = any(_canvas(row).waits for row in rows)
        rows = [row for row in rows if _canvas(row).has_steps_left]
        if is_cpu() or waits or not rows:
            return
        canvases, opened = [_canvas(row) for row in rows], [row.opened[0] for row in rows]
        taken, opened = take_step(self.model, canvases, opened, self._mean_row)
        self._built = _Built([(c.tokens, c.plan) for c in canvases], taken, opened)

    def _heard(self, taken: Taken) -> Iterator[mx.array]:
        """Yield the arrays of a step that are computed with it: what a listener reads, and the
        next canvas, or the arrays that it is drawn from would stay in memory until then."""
        event = taken.event
        yield event.draft
        yield event.entropy
        yield from event.candidates or ()
        if event.readout is not None:
            yield event.readout
        if self._are_events_computed:
            yield event.accepted
            yield event.certainty
        if taken.after.has_steps_left:
            yield taken.after.tokens


@dataclass(frozen=True, slots=True, eq=False)
class RowFailed:
    """A row ended by an error of its own; the others go on."""

    error: Exception


def _events(
    row: Row, happen: Callable[[], list[LoopEvent]]
) -> Iterator[tuple[Row, LoopEvent | RowFailed]]:
    """Yield the events of what happens to a row; its listeners are other people's code."""
    try:
        events: list[LoopEvent | RowFailed] = list(happen())
    except Exception as error:  # whatever it is, it is the row's alone
        row.leave()
        events = [RowFailed(error)]
    for event in events:
        yield row, event


class _Built:
    """A step that is built but not yet computed."""

    def __init__(
        self, seen: list[tuple[mx.array, Plan]], taken: list[Taken], opened: list[OpenContext]
    ) -> None:
        self._seen, self.taken, self.opened = seen, taken, opened

    def fits(self, canvases: list[Canvas]) -> bool:
        """Return whether these are the canvases that the step was built for. A row's next canvas
        may have the same plan, but never the same array of tokens."""
        return len(canvases) == len(self._seen) and all(
            canvas.tokens is tokens and canvas.plan == plan
            for canvas, (tokens, plan) in zip(canvases, self._seen, strict=True)
        )


def denoise_tokens(
    model: DiffusionGemma,
    tokens: mx.array,
    settings: GenerationSettings | ResolvedSettings,
    *,
    lengths: mx.array | None = None,
    noise: Noise | None = None,
    pinned: Sequence[Pinned] | None = None,
    stop: Callable[[int, np.ndarray], bool] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[LoopEvent, None, None]:
    """Run prompts to their ends. Closing the generator stops the run; no further step is computed.

    Row i under seed s writes what a single run under seed s + i writes; its events hold its number.

    Args:
      model: the model, whose checkpoint fills in open settings.
      tokens: int32 [B, S]; rows of different lengths are padded on the left, with any token.
      settings: how to denoise.
      lengths: int32 [B], tokens of each row without padding; None where all rows are full.
      noise: the source of draws, for a run of one row; by default `SeededNoise` of the settings'
        seed.
      pinned: the given parts of each row's answer. Pinned tokens are the same in every canvas and
        every draft; they are never noised, accepted or counted in the stop rule.
      stop: called with a row's number and each canvas that it commits, int32 [up to L], before the
        canvas is yielded; the row ends with it if the result is True.
      prompt_progress_callback: called with (tokens read, tokens in all) of a row during prefill.

    Yields:
      For each row PrefillDone; per canvas StepDone for each step and CanvasCommitted; Finished.

    Raises:
      PromptError: if a token is outside the vocabulary or stands for an image, or the prompt is
      empty or too long.
      ConfigError: if the settings contradict the checkpoint, or one noise is given for several
      rows.
    """
    if isinstance(settings, GenerationSettings):
        settings = settings.resolve(model.config, is_free=pinned is None)
    texts = _check_prompt(tokens, lengths, model.config)
    if noise is not None and len(texts) > 1:
        raise ConfigError(f"a noise draws for one row, and the run has {len(texts)}")
    if pinned is not None and len(pinned) != len(texts):
        raise TemplateError(f"{len(pinned)} rows are pinned, and the run has {len(texts)}")
    rows = Rows(model)
    for number, text in enumerate(texts):
        rows.add(
            Row(
                model,
                replace(settings, seed=settings.seed + number),
                text,
                number=number,
                noise=noise,
                pinned=None if pinned is None else pinned[number],
                stop=None if stop is None else partial(stop, number),
                progress=prompt_progress_callback,
            )
        )
    yield from rows.run()


def check_thread(began_in: int) -> None:
    """Raise `ThreadError` unless this is the thread with the given identifier."""
    if threading.get_ident() != began_in:
        raise ThreadError(
            "a stream is read in the thread that began it, since MLX's streams belong to a thread; "
            "Engine runs requests of any thread"
        )


def _canvas(row: Row) -> Canvas:
    assert row.canvas is not None
    return row.canvas


def _check_prompt(
    tokens: mx.array, lengths: mx.array | None, config: ModelConfig
) -> list[np.ndarray]:
    """Return the tokens of each row, after a check of every token: one outside the table would be
    read as garbage."""
    host = np.array(tokens)
    if host.ndim != 2 or host.size == 0:
        raise PromptError(
            f"the prompt is empty: tokens must be [B, S] with at least one token, got {host.shape}"
        )
    real = np.full(host.shape[0], host.shape[1]) if lengths is None else np.array(lengths)
    if real.shape != host.shape[:1] or real.min() < 1 or real.max() > host.shape[1]:
        raise PromptError(
            f"lengths must be {host.shape[0]} numbers from 1 to {host.shape[1]}, "
            f"got {real.tolist()}"
        )
    rows = zip(host, real.tolist(), strict=True)
    return [checked_tokens(row[len(row) - count :], config) for row, count in rows]
