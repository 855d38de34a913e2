"""The stop rule: whether a canvas has settled, and how much of it is still needed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

_EIGHTHS = 8  # of a canvas: its possible narrow widths


def is_settled(
    draft: mx.array,
    previous_drafts: Sequence[mx.array],
    entropy: mx.array,
    *,
    stability_threshold: int,
    confidence_threshold: float,
    matters: mx.array | None = None,
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

    Returns:
      [B] bool.

    Source: transformers 5.23, generation_diffusion_gemma.py, StableAndConfidentStoppingCriteria.
    """
    if len(previous_drafts) < stability_threshold:
        return mx.zeros(draft.shape[0], dtype=mx.bool_)
    if matters is None:
        settled = entropy.mean(axis=-1) < confidence_threshold
    else:
        mean = (entropy * matters).sum(axis=-1) / mx.maximum(matters.sum(axis=-1), 1)
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


def width_for(needed: int, canvas_length: int) -> int:
    """Return the columns to keep for an answer of `needed` columns: one eighth of the canvas more,
    rounded up to eighths. The margin allows the answer to grow a little."""
    eighth = -(-canvas_length // _EIGHTHS)
    return min(canvas_length, (-(-needed // eighth) + 1) * eighth)
