"""Is this canvas settled? Pure."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def is_settled(
    draft: mx.array,
    previous_drafts: Sequence[mx.array],
    entropy: mx.array,
    *,
    stability_threshold: int,
    confidence_threshold: float,
) -> mx.array:
    """Whether each row's draft is stable and sure.

    Stable: every position equals the drafts of the last `stability_threshold` steps; earlier steps
    than that cannot
    be stable. Sure: the mean entropy lies below `confidence_threshold`.

    Args:
      draft: [B, L] int32, this step's likeliest tokens.
      previous_drafts: those of the steps before it, oldest first.
      entropy: [B, L] float32, nats.
      stability_threshold: steps, >= 0; 0 asks for no stability.
      confidence_threshold: nats.

    Returns:
      [B] bool.

    Source: transformers 5.23, generation_diffusion_gemma.py, StableAndConfidentStoppingCriteria.
    """
    if len(previous_drafts) < stability_threshold:
        return mx.zeros(draft.shape[0], dtype=mx.bool_)
    settled = entropy.mean(axis=-1) < confidence_threshold
    for previous in previous_drafts[len(previous_drafts) - stability_threshold :]:
        settled = settled & (draft == previous).all(axis=-1)
    return settled
