"""One row: a request's text so far, what it has written, what is left of its budget, and the plan
for its next step. Uses numbers that the loop has read already; reads only finished canvases from
the device itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx
import numpy as np

from ..config.generation import ResolvedSettings
from ..errors import NumbersError
from ..events import CanvasCommitted, Finished, LoopEvent, PrefillDone, StepDone
from ..language.images import ImagePatches
from ..model import Context, DiffusionGemma, OpenContext
from ..model.columns import TextColumns
from ..model.images import Seen
from .ahead import Predictions
from .canvas import Canvas, Plan, Readout, Taken
from .checked import check_room, check_rules, checked_noise
from .constrained import CanvasConstraint, Span, TokenConstraint
from .images import Features, Placed, as_text, outside, place_images, seen_between
from .noise import Noise, SeededNoise
from .pinned import Pinned, PinnedCanvas
from .plans import Plans
from .prefix import least_part, rest_of
from .standing import Stands
from .store import Store, snapshots
from .warm import going_on, standing_in

_NO_TOKENS = np.zeros(0, np.int32)


class Row:
    """One request among the rows of a loop. It reads its text piece by piece, then denoises a
    canvas, commits it, which is reading too, and so on until it is done."""

    canvas: Canvas | None = None
    is_done = False
    _rest: Canvas | None = None  # of a canvas whose part is committed
    _committed: np.ndarray | None = None  # tokens, int32 [S], that the canvas's first step reads
    _store: Store | None = None

    def __init__(
        self,
        model: DiffusionGemma,
        settings: ResolvedSettings,
        tokens: np.ndarray | None = None,
        *,
        images: Sequence[ImagePatches] = (),
        number: int = 0,
        context: Context | None = None,
        is_shared: bool = False,
        only_reads: bool = False,
        noise: Noise | None = None,
        pinned: Pinned | None = None,
        constraint: TokenConstraint | None = None,
        stop: Callable[[np.ndarray], bool] | None = None,
        begin: Callable[[], Sequence[int]] | None = None,
        readout: Readout | None = None,
        stands: Stands | None = None,
        start: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make a row.

        Args:
          model: the model that the loop runs.
          settings: how to denoise; the seed is the row's own.
          tokens: int32 [S], the text to read, S >= 1; None if the context holds all of it.
          images: those whose tokens the text holds, in order.
          number: of the row in its events.
          context: the text before `tokens`.
          is_shared: whether other rows use it too; what the row reads is then kept apart from it.
          only_reads: whether the row ends once it has read its text, and leaves its context.
          noise: where draws come from; by default the settings' seed.
          pinned: the given parts of the answer.
          constraint: what the whole answer must fit; not together with `pinned`.
          stop: called with each committed canvas, int32 [up to L]; True ends the row.
          begin: called before each canvas for tokens that it begins with; not where text is pinned.
          readout: whose probabilities each step's event holds.
          stands: what stands where the answer is written, for a warm start.
          start: int32 [up to L], what the first canvas begins with; NONE for noise.
          progress: called with (tokens read, tokens in all) while the text is read.

        Raises:
          PromptLengthError: if the text leaves no room for a canvas.
          DiffGemmaError: if images and their tokens do not match, or the model reads no images.
          ConfigError: if the noise does not suit the settings.
          ConstraintError: if the budget is too small for any answer that fits the constraint.
        """
        before = context.length if context is not None else 0
        count = 0 if tokens is None else len(tokens)
        room = check_room(model.config, settings, before + count, images)
        self.model, self.settings, self.number = model, settings, number
        self.noise, self.pinned = checked_noise(noise, settings, constraint), pinned
        check_rules(settings, is_free=pinned is None and readout is None)
        self._constraint, self._state = constraint, 0  # the state behind what is written
        self.context, self.is_shared = context, is_shared
        self.shared = context if is_shared else None  # to know it by, until the row is done
        self.unread, self.prompt_tokens = tokens, count
        self.opened: list[OpenContext] = []  # the open context, while there is a canvas
        self._part = 0  # settled columns of the canvas that are to be committed before the rest
        self._is_prompt, self._only_reads = count > 0, only_reads
        self._images: tuple[Placed, ...] = ()
        self._text = _NO_TOKENS if tokens is None else tokens  # behind `context`
        if images:
            model.check_vision()
            self._images = place_images(self._text, images, model.config)
        self._snapshots: list[int] = []  # its lengths at which it is kept
        self._cached = 0
        self.stop, self.begin, self._readout = stop, begin, readout
        self._stands, self._start_tokens = stands, start
        self._plans = Plans(settings, stands, readout, pinned)
        self._progress, self._started = progress, time.perf_counter()
        self._left = min(settings.max_new_tokens, room * settings.canvas_length)
        if constraint is not None:
            assert pinned is None
            constraint.check_budget(self._left)
        # Free positions: a shortened canvas moves the later ones.
        self._places = model.config.text.max_position_embeddings - before - count
        self._index = self._attempt = self._steps_here = 0  # of the current canvas
        self._written = self._new_tokens = self._steps = self._positions = 0

    @property
    def most_tokens(self) -> int:
        """How many tokens the row's context may hold at its end, without those that it shares."""
        shared = self.shared.length if self.shared is not None else 0
        return self.model.config.text.max_position_embeddings - self._places + self._left - shared

    @property
    def image_tokens(self) -> list[int]:
        """The tokens of each image that the row reads or will read."""
        return [placed.image.soft_tokens for placed in self._images]

    def join(self, store: Store | None) -> None:
        """Prepare to be run: find what is known of the text already. A row that was given a context
        uses no store, since the text of the context is unknown."""
        if store is None or self.unread is None or self.context is not None:
            return
        self._store, tokens = store, self._text
        self._text = as_text(tokens, self._images, store.salt) if self._images else tokens
        self._snapshots = snapshots(self._text, store.every, self.settings.eos_token_ids)
        if self._only_reads and len(self._text) > 1:  # the same text is found with a token to read
            self._snapshots = sorted({*self._snapshots, len(self._text) - 1})
        self._snapshots = [n for n in self._snapshots if n == outside(n, self._images)]
        self.context = store.find(self._text, self.model.config.text)
        if self.context is not None:
            self._cached = self.context.length
            self.unread = tokens[self._cached :]

    @property
    def ahead(self) -> np.ndarray:
        """Standing tokens to read behind the piece to read next, int32 [n]: none unless that is the
        rest of the text, since what is read behind them may not be kept."""
        reading = self._stands.reading if self._stands is not None else None
        if reading is None or self.unread is None or len(self.unread) > self._piece_tokens:
            return _NO_TOKENS
        is_bound = self._constraint is not None or self._rest is not None
        if is_bound or self._images or (self.begin is not None and self.begin()):
            return _NO_TOKENS
        return reading.ahead(min(self._left, self._places, self.settings.canvas_length))

    @property
    def _piece_tokens(self) -> int:
        """The most tokens of the next piece, but for images: those up to the next place at which
        the context is kept."""
        assert self.unread is not None
        read = len(self._text) - len(self.unread)
        after = next((place for place in self._snapshots if place > read), len(self._text))
        return min(self.settings.prefill_step_size, after - read)

    @property
    def piece(self) -> np.ndarray:
        """The tokens to read next; all of an image's are in one piece."""
        assert self.unread is not None
        read = len(self._text) - len(self.unread)
        stop = read + self._piece_tokens
        return self.unread[: outside(stop, self._images, after=read) - read]

    def look(self, features: Features) -> Seen | None:
        """Return the images in the piece to read next, and have those seen that were not yet."""
        assert self.unread is not None
        if not self._images:
            return None
        read = len(self._text) - len(self.unread)
        stop = read + len(self.piece)
        return seen_between(read, stop, self._images, self.model, features)

    def take_context(self) -> Context:
        """Return the context to read behind; the row keeps no reference to it."""
        context, self.context = self.context, None
        if context is None:
            return Context((), 0, 1)
        if self.is_shared:  # what is read is the row's own
            self.is_shared = False
            return Context.behind(context)
        return context

    def has_read(self, context: Context) -> list[LoopEvent]:
        """Take the context with the last piece in it."""
        assert self.unread is not None
        rest = self.unread[len(self.piece) :]
        self.context, self.unread = context, rest if len(rest) else None
        read = len(self._text) - len(rest)
        if not len(rest) or read in self._snapshots:
            self._keep(context)
        return self._told(len(rest))

    def has_read_ahead(self, columns: TextColumns, seen: Predictions) -> list[LoopEvent]:
        """Take what the model predicts behind the rest of the text and the tokens ahead of it, and
        commit those that are kept."""
        assert self.unread is not None and self._stands is not None and self._stands.reading
        ahead, count, reading = self.ahead, len(self.unread), self._stands.reading
        verdict = reading.judge(seen)
        draft, unread = verdict.written(ahead)
        may_be_empty = self._index > 0 or not self.settings.empty_rerolls
        if not may_be_empty and len(draft) and draft[0] in self.settings.eos_token_ids:
            reading.pause()
            draft, unread = _NO_TOKENS, 0
        self._positions += len(ahead) - verdict.kept  # computed as those of a canvas are
        self.context, self.unread = columns.until(count + len(draft) - unread), None
        if self._is_prompt:
            self._keep(columns.until(count))
        events = self._told(0)
        if len(draft):
            tokens = self._write(draft, events, is_read=True)
            self._text = np.concatenate([self._text, tokens])
            if self.is_done:
                self.context = None
            elif unread:
                self.unread = tokens[-1:]
            else:
                self._keep(self.context)
        return events

    def _keep(self, context: Context) -> None:
        """Keep a context in the store, that of the first tokens of the text."""
        if self._store is not None:
            self._store.keep(self._text[: context.length], context, self.model.config.text)

    def _told(self, left: int) -> list[LoopEvent]:
        """Tell how much of the prompt is left to read, in tokens; return the event of its end."""
        if self._is_prompt and self._progress is not None:
            self._progress(self.prompt_tokens - left, self.prompt_tokens)
        if left or not self._is_prompt:
            return []
        self._is_prompt, self.is_done = False, self._only_reads
        self._images = ()  # their pixels are not needed any more
        seconds = time.perf_counter() - self._started
        return [PrefillDone(self.prompt_tokens, self._cached, seconds, self.number)]

    def leave(self) -> None:
        """End the row where it is, and give its memory back."""
        self.is_done = True
        self.unread = self.canvas = self._rest = self.context = self.shared = None
        self.opened, self._images, self._committed = [], (), None

    def begin_canvas(self) -> list[LoopEvent]:
        """Open the context and start the next canvas. Return the events of a canvas that is given
        as a whole, which no step denoises; none otherwise."""
        assert self.context is not None
        settings, context = self.settings, self.context
        self.context = None  # freed once the open one has its copy
        unread = None if self._committed is None else mx.array(self._committed[None])
        self.opened = [
            OpenContext.beside(context)
            if self.is_shared
            else self.model.open(context, settings.canvas_length, unread=unread)
        ]
        self.is_shared = False
        self._attempt = self._steps_here = 0
        given, vocab_size = None, self.model.config.text.vocab_size
        if self.pinned is not None:
            given = self.pinned.canvas(self._written, settings.canvas_length, vocab_size)
        elif self.begin is not None and (first := self.begin()):
            given = Pinned(np.array(first)).canvas(0, settings.canvas_length, vocab_size)
            self._rest = None
        if given is not None and not given.has_free:
            return self._commit(np.array(given.tokens)[0])
        if self._rest is not None:
            self.canvas = replace(self._rest, constraints=self._constraints(None))
            self._rest = None
        else:
            self._start(given)
        return []

    def _start(self, given: PinnedCanvas | None) -> None:
        """Start a canvas from random tokens, under the noise of this attempt."""
        settings, noise = self.settings, self.noise
        if self._attempt:
            assert isinstance(noise, SeededNoise)
            noise = noise.reroll(self._attempt)
        shape, vocab_size = (1, settings.canvas_length), self.model.config.text.vocab_size
        start = noise.start(self._index, shape, vocab_size)
        if given is not None:
            start = given.kept_to(start)
        plan, constraints = self._first_plan(), self._constraints(given)
        canvas = Canvas(
            self.number,
            settings,
            noise,
            given,
            self._index,
            plan,
            start,
            constraints=constraints,
            readout=self._readout,
        )
        self.canvas = canvas if self._attempt else self._warm(canvas)

    def _warm(self, canvas: Canvas) -> Canvas:
        """Return a canvas with what stands in its place."""
        if self._stands is not None:
            canvas = standing_in(canvas, self._stands, is_pinned=self.pinned is not None)
        if self._start_tokens is not None and self._index == 0:
            canvas = going_on(canvas, self._start_tokens[None])
        return canvas

    def _constraints(self, given: PinnedCanvas | None) -> Sequence[CanvasConstraint | Span]:
        """Return what the next canvas must fit, behind the tokens that it begins with."""
        if self._constraint is None:
            return () if given is None else given.spans
        first = _NO_TOKENS if given is None else given.given
        state = self._constraint.after(first, self._state)
        pad = self.settings.pad_token_id
        return [CanvasConstraint(self._constraint, state, self._left, len(first), pad)]

    def take(self, taken: Taken, opened: OpenContext) -> None:
        """Take the results of a step, so that nothing refers to those of the step before."""
        self._steps_here += 1
        self._positions += taken.after.plan.width
        self.canvas, self.opened = taken.after, [opened]
        if taken.kept is not None:
            assert self._stands is not None
            self._stands.kept(taken.kept)

    def goes_on(self, check: list[int]) -> bool:
        """Return whether the canvas needs another step, from the numbers that the host read of the
        last one, and plan it."""
        assert self.canvas is not None
        if check[0] or not self.canvas.has_steps_left:
            return False
        self.canvas = replace(self.canvas, plan=self._plans.next(self.canvas.plan, check))
        if (
            self.settings.prefix_commit != "off"
            and self.canvas.pinned is None  # a rest has other columns
            and check[-1] >= least_part(self.settings.canvas_length)
        ):
            self._part = check[-1]
        return not self._part

    def end_canvas(self, last: StepDone) -> list[LoopEvent]:
        """Commit a canvas after its last step, or start it again if its answer is empty and that is
        asked for.

        Raises:
          NumbersError: if the step's numbers are not finite.
        """
        if not np.isfinite(np.array(last.entropy)).all():
            raise NumbersError(
                f"step {last.step + 1} of canvas {last.canvas_index + 1} gave numbers that are not "
                "finite; the weights are damaged, or the model's type is too narrow for them"
            )
        draft = np.array(last.draft)[0]
        return self._commit(draft[: self._part] if self._part else draft)

    def _commit(self, draft: np.ndarray) -> list[LoopEvent]:
        """Commit a canvas or its settled part, [W]: cut it at `max_new_tokens`, pad it after end
        tokens, count its tokens."""
        settings, canvas = self.settings, self.canvas
        part, self._part = self._part, 0
        self.canvas = None  # the belief holds arrays of the logits' size
        is_empty = draft[0] in settings.eos_token_ids
        if is_empty and canvas and self._index == 0 and self._attempt < settings.empty_rerolls:
            self._attempt += 1
            self._start(canvas.pinned)
            return []
        events: list[LoopEvent] = []
        tokens = self._write(draft, events, is_read=False)
        context, unread = self._close()
        if not self.is_done:
            self.context, self.unread = context, np.concatenate([unread, tokens])
            self._text = np.concatenate([self._text, tokens])
            if part:
                assert canvas is not None
                plan = self._plans.behind(canvas.plan, part, self._first_plan().widest)
                self._rest = rest_of(canvas, part, self._index, plan, self.noise)
            if self._is_read_jointly():
                self._committed, self.unread = self.unread, None
        return events

    def _write(self, draft: np.ndarray, events: list[LoopEvent], *, is_read: bool) -> np.ndarray:
        """Commit tokens, [W]: cut them at `max_new_tokens`, pad them after an end token, count them
        and see whether the row is done. Return them; add events."""
        settings = self.settings
        tokens = draft[: self._left]
        is_end = (tokens[:, None] == settings.eos_token_ids).any(axis=1)
        keep: np.ndarray = np.cumsum(is_end) - is_end == 0
        tokens = np.where(keep, tokens, settings.pad_token_id).astype(np.int32)
        self._left -= len(tokens)
        self._places -= len(tokens)
        self._written += len(tokens)
        self._new_tokens += int(keep.sum())
        if self._constraint is not None:
            self._state = self._constraint.after(tokens, self._state)
        if self._stands is not None:
            self._stands.committed(tokens, is_read=is_read)
        steps = 0 if is_read else self._steps_here
        self._steps += steps
        has_ended = bool(is_end.any())
        if self.stop is not None:
            has_ended |= self.stop(tokens)
        events.append(CanvasCommitted(self._index, mx.array(tokens[None]), steps, self.number))
        self._index += 1
        is_full = self._places < settings.canvas_length and not self._plans.ends_anywhere
        self.is_done = has_ended or self._left == 0 or is_full
        if self.is_done:
            reason: Literal["stop", "length"] = "stop" if has_ended else "length"
            counts = self._new_tokens, self._steps, self._index, self._positions
            events.append(Finished(reason, *counts, self.number))
        return tokens

    def _is_read_jointly(self) -> bool:
        """Whether the next step reads what is committed: not text that is too long for a canvas's
        pass, or that is read with standing text behind it."""
        assert self.unread is not None
        is_short = len(self.unread) <= self.settings.canvas_length
        return self.settings.commit_pass == "joint" and is_short and not len(self.ahead)

    def _close(self) -> tuple[Context, np.ndarray]:
        """Close the open context. Return it, and the committed tokens, int32 [S], that it does not
        hold, since no step came after them."""
        opened, committed = self.opened.pop(), self._committed
        context, self._committed = opened.closed(), None
        if committed is None or opened.unread is not None:
            return context, _NO_TOKENS if committed is None else committed
        self._keep(context)
        return context, _NO_TOKENS

    def _first_plan(self) -> Plan:
        stands = None if self._attempt else self._stands
        return self._plans.first(self._left, self._places, stands)
