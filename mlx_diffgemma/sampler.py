"""Logits -> statistics, acceptance, next canvas. Pure functions; noise is passed in."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Statistics(NamedTuple):
    draft: mx.array  # [B, L] int32: the likeliest tokens
    entropy: mx.array  # [B, L] float32, nats


class Decision(NamedTuple):
    canvas: mx.array  # [B, L] int32: the next canvas
    accepted: mx.array  # [B, L] bool: where the proposal was kept


def statistics(logits: mx.array) -> Statistics:
    """Draft and entropy of temperature-scaled logits, float32 [B, L, V].

    Entropy is summed from log-probabilities in float32: as log-sum-exp minus a product it would
    lose its last digits,
    and the stop rule compares its mean with 0.005 nats.
    """
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -(mx.exp(log_p) * log_p).sum(axis=-1)
    return Statistics(mx.argmax(logits, axis=-1).astype(mx.int32), entropy)


def decide(
    entropy: mx.array, proposal: mx.array, noise: mx.array, *, entropy_bound: float
) -> Decision:
    """Keeps the most certain proposals until their joint entropy would pass the bound; all else
    becomes noise.

    Positions are visited from the lowest entropy up. One is kept while the entropy already spent
    *before* it is at
    most `entropy_bound`, so at least one position is always kept. Nothing is frozen: a position
    kept in one step can
    be lost in the next.

    Args:
      entropy: [B, L] float32, nats, of the distribution that the proposal was drawn from.
      proposal: [B, L] int32 tokens.
      noise: [B, L] int32 uniform random tokens.
      entropy_bound: nats, >= 0.

    Raises:
      ValueError: if shapes disagree.

    Source: arXiv 2505.24857; transformers 5.23, generation_diffusion_gemma.py, EntropyBoundSampler.
    """
    if not entropy.shape == proposal.shape == noise.shape:
        raise ValueError(
            f"entropy {entropy.shape}, proposal {proposal.shape} and noise {noise.shape} disagree"
        )
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    spent_before = mx.cumsum(ascending, axis=-1) - ascending
    rank = mx.argsort(order, axis=-1)  # the inverse permutation
    accepted = mx.take_along_axis(spent_before <= entropy_bound, rank, axis=-1)
    return Decision(mx.where(accepted, proposal, noise), accepted)


def top_candidates(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The likeliest tokens of each position, best first: ids int32 and probabilities float32, both
    [B, L, count]."""
    some = mx.argpartition(logits, kth=-count, axis=-1)[..., -count:]
    values = mx.take_along_axis(logits, some, axis=-1)
    order = mx.argsort(-values, axis=-1)
    probabilities = mx.exp(values - mx.logsumexp(logits, axis=-1, keepdims=True))
    return (
        mx.take_along_axis(some, order, axis=-1).astype(mx.int32),
        mx.take_along_axis(probabilities, order, axis=-1),
    )
