"""Warm starts: a canvas that goes on from tokens which stood there, instead of from noise. They are
its input and its last draft, and never frozen; the schedule goes on where as much is noise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from .canvas import Canvas
from .pinned import FREE
from .sampler import Statistics
from .standing import NONE, Kept, Stands, keep


def standing_in(canvas: Canvas, stands: Stands, *, is_pinned: bool) -> Canvas:
    """Return a canvas, before its first step, with what stands in its place: behind the tokens that
    it begins with, or between those that are pinned."""
    begin = 0 if canvas.pinned is None or is_pinned else len(canvas.pinned.given)
    length = canvas.settings.canvas_length
    return replace(canvas, standing=partial(stands.texts, begin, length))


def kept_by(canvas: Canvas, seen: Statistics) -> Kept | None:
    """Return what is kept of the texts that stand in a canvas, from a step's statistics; None if
    there are none. The host waits for it."""
    texts = canvas.standing() if canvas.standing is not None else ()
    return keep(texts, seen.ratios, canvas.settings.warm_start) if texts else None


def going_on(canvas: Canvas, kept: np.ndarray) -> Canvas:
    """Return a canvas, before a step, with kept tokens in it.

    Args:
      canvas: with the tokens, the drafts and the held tokens that it would have.
      kept: int32 [1, W], NONE where nothing is kept.
    """
    settings, length = canvas.settings, canvas.tokens.shape[1]
    shown = np.pad(kept, [(0, 0), (0, length - kept.shape[1])], constant_values=NONE)
    free = shown.size
    if canvas.pinned is not None:
        shown = np.where(canvas.pinned.host_tokens == FREE, shown, NONE)
        free = max(1, int((canvas.pinned.host_tokens == FREE).sum()))
    share = int((shown != NONE).sum()) / free
    own, held = mx.array(shown), canvas.held
    if settings.acceptance == "confidence":
        held = _over(own, mx.full(own.shape, NONE) if held is None else held)
    *before, last = canvas.drafts or (mx.full(own.shape, NONE),)
    return replace(
        canvas,
        tokens=_over(own, canvas.tokens),
        drafts=(*before, _over(own, last)),
        held=held,
        standing=None,
        skipped=max(0, int(share * settings.schedule_steps) - canvas.step),
    )


def _over(own: mx.array, tokens: mx.array) -> mx.array:
    """Return tokens [1, W] with the kept ones in their places."""
    own = own[:, : tokens.shape[1]]
    return mx.where(own != NONE, own, tokens)
