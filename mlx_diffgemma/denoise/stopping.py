"""The stop rule: whether a canvas has settled, and how much of it is still needed. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

_EIGHTHS = 8  # of a canvas: its possible narrow widths
_LEAST_AHEAD = 32  # columns: a step of fewer takes nearly as long


def is_settled(
    draft: mx.array,
    previous_drafts: Sequence[mx.array],
    entropy: mx.array,
    *,
    stability_threshold: int,
    confidence_threshold: float,
    matters: mx.array | None = None,
    committed: int = 0,
) -> mx.array:
    """Return whether each row's draft is stable and sure.

    Stable: every position equals the drafts of the last `stability_threshold` steps; earlier steps
    than that cannot be stable. Sure: the mean entropy lies below `confidence_threshold`.

    Args:
      draft: [B, L] int32, this step's likeliest tokens.
      previous_drafts: the drafts of the steps before, oldest first.
      entropy: [B, L] float32, nats.
      stability_threshold: steps, >= 0; 0 asks for no stability.
      confidence_threshold: nats.
      matters: bool [B, L], the positions that are judged; None for all. A row without any is sure.
      committed: columns of the canvas that are committed already, and count as sure in the mean.

    Returns:
      [B] bool.

    Source: transformers 5.23, generation_diffusion_gemma.py, StableAndConfidentStoppingCriteria.
    """
    if len(previous_drafts) < stability_threshold:
        return mx.zeros(draft.shape[0], dtype=mx.bool_)
    if matters is None:
        mean = entropy.mean(axis=-1)
        if committed:
            mean = mean * (draft.shape[1] / (draft.shape[1] + committed))
    else:
        mean = (entropy * matters).sum(axis=-1) / mx.maximum(matters.sum(axis=-1) + committed, 1)
    settled = mean < confidence_threshold
    for previous in previous_drafts[len(previous_drafts) - stability_threshold :]:
        settled = settled & all_that_matter(draft == previous, matters)
    return settled


def all_that_matter(holds: mx.array, matters: mx.array | None) -> mx.array:
    """Return whether a claim, bool [B, L], is true at every position that matters: [B] bool."""
    return (holds if matters is None else holds | ~matters).all(axis=-1)


def answer_length(draft: mx.array, eos_token_ids: Sequence[int]) -> mx.array:
    """Return the positions up to each row's first end token, included: int32 [B]; L + 1 for a row
    without one."""
    is_end = (draft[..., None] == mx.array(list(eos_token_ids))).any(axis=-1)
    first = mx.argmax(is_end, axis=-1)
    return mx.where(is_end.any(axis=-1), first, draft.shape[1]).astype(mx.int32) + 1


def columns_to_end(length: mx.array, accepted: mx.array, most: int) -> mx.array:
    """Return the columns that an answer needs, int32 [B]: up to its first end token if that has
    been accepted, bool [B, W]; else `most`."""
    W = accepted.shape[1]
    last = mx.minimum(length, W)[:, None] - 1
    has_end = (length <= W) & mx.take_along_axis(accepted, last, axis=-1)[:, 0]
    return mx.where(has_end, length, most)


def columns_to_likely_end(ended: mx.array, length: mx.array, mass: float, most: int) -> mx.array:
    """Return the columns that an answer needs by the probability that it has ended: int32 [B].

    Args:
      ended: [B, W] float32, for each column the probability that it holds an end token or one
        behind it.
      length: int32 [B], from `answer_length`.
      mass: columns from which on all of them have ended with this probability are not needed.
      most: what is returned where the last column has not, or the draft has no end.
    """
    W = ended.shape[1]
    goes_on = ended < mass
    last = mx.where(goes_on, mx.arange(W), -1).max(axis=-1)  # the last one without
    found = mx.maximum(last + 2, length)  # the one behind it holds the end
    return mx.where((length <= W) & (last + 1 < W), found, most).astype(mx.int32)


def leading_columns(holds: mx.array) -> mx.array:
    """Return for how many columns from the left on a claim, bool [B, W], is true: int32 [B]."""
    return mx.cumprod(holds.astype(mx.int32), axis=-1).sum(axis=-1)


def width_ahead(accepted: int, share: float, canvas_length: int) -> int:
    """Return the columns to keep where so many on the left are accepted: a share of the canvas
    more, but at least 32, rounded up to sixteenths."""
    sixteenth = -(-canvas_length // 16)
    needed = accepted + max(share * canvas_length, _LEAST_AHEAD)
    return min(canvas_length, math.ceil(needed / sixteenth) * sixteenth)


def width_for(needed: int, canvas_length: int) -> int:
    """Return the columns to keep for an answer of `needed` columns: one eighth of the canvas more,
    rounded up to eighths. The margin allows the answer to grow a little."""
    eighth = -(-canvas_length // _EIGHTHS)
    return min(canvas_length, (-(-needed // eighth) + 1) * eighth)
