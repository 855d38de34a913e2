"""Prefix commit: how much of a canvas's left part has settled, and what is left of the canvas once
that part is committed. Reads nothing from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from .canvas import Belief, Canvas, Plan
from .noise import Noise
from .stopping import leading_columns

_LEAST_PART = 16  # columns of a part, unless a quarter of the canvas is fewer; each part is a pass


def settled_columns(
    draft: mx.array,
    previous_drafts: Sequence[mx.array],
    entropy: mx.array,
    *,
    steps: int,
    most_entropy: float,
) -> mx.array:
    """Return how many columns from the left on are stable and sure: int32 [B].

    Args:
      draft: [B, L] int32, this step's likeliest tokens.
      previous_drafts: [B, L] each, the drafts of the steps before, oldest first.
      entropy: [B, L] float32, nats.
      steps: steps for which a column must not have changed, >= 1.
      most_entropy: nats that a column may have.
    """
    if len(previous_drafts) < steps:
        return mx.zeros(draft.shape[0], dtype=mx.int32)
    holds = entropy <= most_entropy
    for previous in previous_drafts[len(previous_drafts) - steps :]:
        holds = holds & (draft == previous)
    return leading_columns(holds)


def least_part(canvas_length: int) -> int:
    """Return the fewest columns that are committed before the rest of a canvas: an eighth of it but
    at least 16, or a quarter where that is fewer."""
    return min(-(-canvas_length // 4), max(-(-canvas_length // 8), _LEAST_PART))


def rest_of(canvas: Canvas, part: int, index: int, plan: Plan, noise: Noise) -> Canvas:
    """Return a canvas behind its committed part, as the row's next canvas. What was computed of its
    columns moves to the left with them.

    Args:
      canvas: before its next step.
      part: its committed columns.
      index: of the new canvas in the answer.
      plan: for its first step.
      noise: its draws.
    """
    held = canvas.held
    return replace(
        canvas,
        noise=noise,
        index=index,
        plan=plan,
        tokens=canvas.tokens[:, part:],
        step=0,
        age=canvas.step + canvas.age,
        committed=canvas.committed + part,
        drafts=tuple(draft[:, part:] for draft in canvas.drafts),
        belief=_belief_behind(canvas.belief, part),
        held=None if held is None else held[:, part:],
        constraints=(),
    )


def _belief_behind(belief: Belief | None, part: int) -> Belief | None:
    if belief is None or belief.weights.shape[1] <= part:
        return None
    likeliest = belief.likeliest
    if likeliest is not None:
        likeliest = likeliest[0][:, part:], likeliest[1][:, part:]
    return Belief(
        belief.weights[:, part:], belief.total[:, part:], belief.entropy[:, part:], likeliest
    )
