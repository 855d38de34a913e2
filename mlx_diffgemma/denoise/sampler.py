"""The sampler: from head outputs to statistics, proposal, acceptance and next canvas. Pure; noise
is passed in.

The outputs have V columns, so reading and writing them is the main cost. `statistics` reads them
twice and writes two arrays of their size (three where the model computes in 16 bits); everything
else uses those, or a few of their columns, so that one of the two can reuse the outputs' memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ..model.backend import compiled, compiled_per_shape
from ..model.layers import softcap

NO_CAP = math.inf


class Statistics(NamedTuple):
    draft: mx.array  # [B, L] int32: the likeliest tokens
    entropy: mx.array  # [B, L] float32, nats
    confidence: mx.array  # [B, L] float32: probability of the draft's tokens
    ratios: mx.array  # [B, L, V] float32: probabilities over that of the draft
    masses: mx.array  # [B, L, V / chunk] float32: ratios summed over chunks of the vocabulary
    weights: mx.array  # [B, L, V], type of the outputs: the ratios that self-conditioning takes
    total: mx.array  # [B, L] float32: sum of the weights


class Decision(NamedTuple):
    canvas: mx.array  # [B, L] int32: the next canvas
    accepted: mx.array  # [B, L] bool: where the proposal was kept


def scaled_logits(
    outputs: mx.array,
    heat: float | mx.array = 1.0,
    cap: float = NO_CAP,
    allowed: mx.array | None = None,
) -> mx.array:
    """Return softcapped outputs over the temperature: float32, of the same shape. Tokens that are
    not allowed get -inf."""
    scaled = _scaled(outputs, _array(heat), cap)
    return scaled if allowed is None else mx.where(allowed, scaled, -mx.inf)


def statistics(
    outputs: mx.array,
    heat: float | mx.array = 1.0,
    cap: float = NO_CAP,
    allowed: mx.array | None = None,
) -> Statistics:
    """Return the statistics of every position's distribution that a step needs.

    All of them are relative to the likeliest token: with d the distance of a logit from the largest
    one, Z = sum exp(d) and S = sum exp(d) d, the entropy is ln Z - S / Z. Both terms vanish where a
    position is sure, so that nothing cancels; the stop rule compares their mean with 0.005 nats.
    The cap is monotone, so the largest output is the largest logit.

    Args:
      outputs: [B, L, V], the head's outputs, or logits.
      heat: temperature, a number or an array of one; an array costs no new trace.
      cap: of the softcap; infinite for none.
      allowed: bool, broadcast to [B, L, V], the tokens that have any mass; None for all.

    Returns:
      Statistics. In 16 bits the weights are those of the rounded logits, which the reference
      stores between steps; everything else is that of the logits in float32.
    """
    heat = _array(heat)
    fitting = outputs if allowed is None else mx.where(allowed, outputs, -mx.inf)
    draft = mx.argmax(fitting, axis=-1, keepdims=True)  # [B, L, 1]
    top = _scaled(mx.take_along_axis(outputs, draft, axis=-1), heat, cap)
    if outputs.dtype == mx.float32:
        ratios, products = _weigh(outputs, top, heat, cap)
        if allowed is not None:
            ratios, products = _only(allowed, ratios), _only(allowed, products)
        kept = ratios
    else:
        ratios, products, kept = _weigh_and_round(outputs, top, heat, cap)
        if allowed is not None:
            ratios, products, kept = (_only(allowed, x) for x in (ratios, products, kept))
    B, L, V = outputs.shape
    masses = ratios.reshape(B, L, -1, chunk_size(V)).sum(axis=-1)
    total = kept_total = masses.sum(axis=-1)
    if kept is not ratios:  # a product adds up in float32 whatever its type, a sum need not
        kept_total = (kept @ mx.ones((V, 1), kept.dtype))[..., 0].astype(mx.float32)
    return Statistics(
        draft=draft[..., 0].astype(mx.int32),
        entropy=mx.log(total) - products.sum(axis=-1) / total,
        confidence=1 / total,
        ratios=ratios,
        masses=masses,
        weights=kept,
        total=kept_total,
    )


def _only(allowed: mx.array, x: mx.array) -> mx.array:
    """Return 0 where a token is not allowed, even where a value overflowed."""
    return mx.where(allowed, x, mx.zeros((), x.dtype))


def draw(seen: Statistics, gumbels: tuple[mx.array, mx.array]) -> mx.array:
    """Draw a token for every position in two levels: a chunk of the vocabulary by its mass, then a
    token inside it. Exact, without noise over the whole vocabulary.

    Args:
      seen: from `statistics`.
      gumbels: standard Gumbel noise, float32 [B, L, V / chunk] and [B, L, chunk].

    Returns:
      int32 [B, L].

    Source: the Gumbel-max trick, arXiv 1611.01144, once per level.
    """
    size = chunk_size(seen.ratios.shape[-1])
    chunk = mx.argmax(mx.log(seen.masses) + gumbels[0], axis=-1, keepdims=True)  # [B, L, 1]
    inside = mx.take_along_axis(seen.ratios, chunk * size + mx.arange(size), axis=-1)
    token = mx.argmax(mx.log(inside) + gumbels[1], axis=-1, keepdims=True)
    return (chunk * size + token)[..., 0].astype(mx.int32)


def probability_of(tokens: mx.array, seen: Statistics) -> mx.array:
    """Return the probability of one token per position, int32 [B, L]: float32 [B, L]."""
    ratio = mx.take_along_axis(seen.ratios, tokens[..., None], axis=-1)[..., 0]
    return ratio * seen.confidence


def mass_of(ids: Iterable[int], seen: Statistics) -> mx.array:
    """Return the probability of some tokens together at every position: float32 [B, L]."""
    ratios = mx.take(seen.ratios, mx.array(sorted(ids)), axis=-1)
    return ratios.sum(axis=-1) * seen.confidence


@cache
def chunk_size(vocab_size: int) -> int:
    """Return the smallest divisor of the vocabulary's size that is at least its root."""
    root = math.isqrt(vocab_size - 1) + 1
    return next(size for size in range(root, vocab_size + 1) if vocab_size % size == 0)


def decide(
    entropy: mx.array, proposal: mx.array, noise: mx.array, *, entropy_bound: float
) -> Decision:
    """Keep the most certain proposals until their joint entropy would pass the bound; replace all
    others by noise.

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


class Held(NamedTuple):
    canvas: mx.array  # [B, L] int32: the next canvas
    accepted: mx.array  # [B, L] bool: where a token is held
    tokens: mx.array  # [B, L] int32: the tokens held, -1 where there is none


def hold(
    proposal: mx.array,
    probability: mx.array,
    draft: mx.array,
    held: mx.array,
    matters: mx.array,
    noise: mx.array,
    *,
    confidence: float,
    share: float,
) -> Held:
    """Hold every proposal that has the given probability, and of the other positions that matter
    the likeliest ones; replace all others by noise.

    Nothing is frozen. A token is held only while it is the likeliest at its position; when another
    becomes likelier, the position is open again.

    Args:
      proposal: [B, L] int32 tokens.
      probability: [B, L] float32, of the proposals.
      draft: [B, L] int32, the likeliest tokens.
      held: [B, L] int32, the tokens held so far, -1 where there is none.
      matters: bool [B, L], the positions that the answer depends on.
      noise: [B, L] int32 uniform random tokens.
      confidence: a probability.
      share: of the open positions that matter, how many are held at least; always one or more.
    """
    before = held
    held = mx.where(held == draft, held, -1)
    held = mx.where(probability >= confidence, proposal, held)
    is_open = (held < 0) & matters
    is_stuck = ~((held >= 0) & (before < 0) & matters).any(axis=-1, keepdims=True)
    ranked = mx.where(is_open, -probability, 1.0)
    if share:
        least = mx.maximum(is_stuck, mx.ceil(share * is_open.sum(axis=-1, keepdims=True)))
        rank = mx.argsort(mx.argsort(ranked, axis=-1), axis=-1)  # the inverse permutation
        is_likeliest = rank < least
    else:  # one, if any
        best = mx.argmin(ranked, axis=-1, keepdims=True)
        is_likeliest = is_stuck & (mx.arange(ranked.shape[-1]) == best)
    held = mx.where(is_open & is_likeliest, proposal, held)
    accepted = held >= 0
    return Held(mx.where(accepted, held, noise), accepted, held)


def shortlist(weights: mx.array, total: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return the likeliest tokens of each position, in any order: ids int32 and probabilities
    float32, both [B, L, count].

    Exact, and one pass over the vocabulary: the `count` largest weights lie in the `count` chunks
    with the largest maxima.

    Args:
      weights: [B, L, V], from `statistics`.
      total: [B, L], their sums.
      count: tokens, at most V.
    """
    B, L, V = weights.shape
    size = chunk_size(V)
    chunks = min(count, V // size)
    maxima = weights.reshape(B, L, -1, size).max(axis=-1)
    best = mx.argpartition(-maxima, kth=chunks - 1, axis=-1)[..., :chunks, None]
    columns = (best * size + mx.arange(size, dtype=best.dtype)).reshape(B, L, -1)
    values = mx.take_along_axis(weights, columns, axis=-1)
    inside = mx.argpartition(-values, kth=count - 1, axis=-1)[..., :count]
    ids = mx.take_along_axis(columns, inside, axis=-1).astype(mx.int32)
    values = mx.take_along_axis(values, inside, axis=-1).astype(mx.float32)
    return ids, values / total[..., None]


def top_candidates(
    outputs: mx.array,
    count: int,
    confidence: mx.array | None = None,
    heat: float | mx.array = 1.0,
    cap: float = NO_CAP,
    allowed: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the likeliest tokens of each position, best first: ids int32 and probabilities
    float32, both [B, L, count]. `confidence` is that of `statistics`, computed here if not given.
    If fewer tokens are allowed, the rest have probability 0."""
    fitting = outputs if allowed is None else mx.where(allowed, outputs, -mx.inf)
    some = mx.argpartition(fitting, kth=-count, axis=-1)[..., -count:]
    values = _scaled(mx.take_along_axis(outputs, some, axis=-1), _array(heat), cap)
    if allowed is not None:
        values = mx.where(mx.isinf(mx.take_along_axis(fitting, some, axis=-1)), -mx.inf, values)
    order = mx.argsort(-values, axis=-1)
    values = mx.take_along_axis(values, order, axis=-1)
    if confidence is None:
        confidence = statistics(outputs, heat, cap, allowed).confidence
    return (
        mx.take_along_axis(some, order, axis=-1).astype(mx.int32),
        mx.exp(values - values[..., :1]) * confidence[..., None],
    )


def _array(heat: float | mx.array) -> mx.array:
    return heat if isinstance(heat, mx.array) else mx.array(heat, dtype=mx.float32)


def _under_cap(outputs: mx.array, heat: mx.array, cap: float) -> mx.array:
    return (outputs.astype(mx.float32) if cap == NO_CAP else softcap(outputs, cap)) / heat


_scaled = compiled(_under_cap)


@compiled_per_shape
def _weigh(
    outputs: mx.array, top: mx.array, heat: mx.array, cap: float
) -> tuple[mx.array, mx.array]:
    distance = _under_cap(outputs, heat, cap) - top
    weights = mx.exp(distance)
    return weights, weights * distance


@compiled_per_shape
def _weigh_and_round(
    outputs: mx.array, top: mx.array, heat: mx.array, cap: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Return `_weigh`'s results, and the weights from logits rounded to the outputs' type."""
    logits = _under_cap(outputs, heat, cap)
    distance = logits - top
    weights = mx.exp(distance)
    rounded, rounded_top = (x.astype(outputs.dtype).astype(mx.float32) for x in (logits, top))
    kept = mx.exp(rounded - rounded_top).astype(outputs.dtype)
    # MLX makes one kernel of several outputs only where one depends on the others; this condition
    # always holds.
    return weights, mx.where(kept >= 0, weights * distance, 0.0), kept
