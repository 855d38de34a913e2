"""Checks of sorting, choosing and drawing over the vocabulary, and of random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from ..denoise.noise import SeededNoise
from ..denoise.sampler import (
    chunk_size,
    decide,
    draw,
    shortlist,
    statistics,
    top_candidates,
)
from . import device
from .device import TYPES, computed, given, relative, share, tolerance
from .exact import drawn, softmax
from .outcome import Check

PART = "sampling"
_VOCABULARY = 262_144
_SORTING = "sorts over many blocks that lose or repeat values"
_STATISTICS = 2e-3  # float32 sums of a quarter of a million exponentials, which GPUs compute fast
_SIGMAS = 5.0  # by chance one run in two million is beyond; the draws are those of a fixed seed


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for rows, columns, count in ((256, 128, 8), (2, _VOCABULARY, 64)):
        for type_name in ("float32", "bfloat16"):
            yield Check(
                f"argpartition, {count} of {columns:,}, {type_name}",
                PART,
                0.0,
                "argpartition that misses one of the largest; Metal and CUDA sort in its place, "
                "over many blocks",
                "this version of mlx",
                partial(_argpartition, rows, columns, count, TYPES[type_name]),
            )
    yield Check("argsort", PART, 0.0, _SORTING, "this version of mlx", _argsort)
    for type_name, dtype in TYPES.items():
        yield Check(
            f"entropy and probabilities, {type_name}",
            PART,
            # Computed in float32 from outputs of any type; kept weights are rounded to the type.
            max(_STATISTICS, tolerance(dtype)),
            "statistics computed in 16 bits, or by a product that matrix units round (mlx issue "
            "3897)",
            f"computing in {type_name}",
            partial(_statistics, dtype),
        )
    yield Check("shortlist", PART, 0.0, _SORTING, "--self-conditioning sparse", _shortlist)
    yield Check("candidates, best first", PART, 1e-3, _SORTING, "--trace", _candidates)
    yield Check(
        "acceptance by entropy",
        PART,
        0.0,
        "cumsum and sorts of one graph that disturb each other (mlx issue 4419)",
        "this version of mlx",
        _acceptance,
    )
    yield Check(
        "two-level draws follow their distribution",
        PART,
        _SIGMAS,
        "biased Gumbel noise (mlx issue 1494), and draws that take a chunk of the vocabulary for "
        "another",
        "temperatures above 0; use --temp 0",
        _draws,
    )
    yield Check(
        "noise tokens are uniform",
        PART,
        _SIGMAS,
        "random tokens that leave out a part of the vocabulary",
        "this version of mlx",
        _uniform,
    )
    yield Check(
        "random bits are the CPU's",
        PART,
        # Keys are bits. Tokens are made of bits by a division; where that is rounded otherwise, one
        # in a hundred is the next token.
        0.03,
        "a seed that gives other answers on this device than elsewhere",
        "seeds, to repeat an answer of another machine",
        _bits,
    )


def _chosen_values(found: np.ndarray, values: np.ndarray, count: int) -> float:
    """Return the share of rows whose chosen values are not the largest ones. Where several are
    equal, any of them may be chosen, but none twice."""
    taken = np.sort(np.take_along_axis(values, found, axis=-1), axis=-1)
    best = np.sort(values, axis=-1)[..., -count:]
    repeated = (np.diff(np.sort(found, axis=-1), axis=-1) == 0).any(axis=-1)
    return share((taken != best).any(axis=-1) | repeated)


def _argpartition(rows: int, columns: int, count: int, dtype: mx.Dtype) -> float:
    x = drawn(140, (rows, columns), dtype)
    (found,) = computed(lambda: mx.argpartition(x.array, kth=-count, axis=-1)[..., -count:])
    return _chosen_values(found, x.exact, count)


def _argsort() -> float:
    pairs = np.random.default_rng(141).integers(0, 128, 2048).astype(np.uint32)
    x = drawn(142, (3, 4096), mx.float32)
    orders = computed(lambda: [mx.argsort(mx.array(pairs)), mx.argsort(x.array, axis=-1)])
    ordered = np.take_along_axis(x.exact, orders[1], axis=-1)
    wrong = (pairs[orders[0]] != np.sort(pairs), (ordered != np.sort(x.exact, axis=-1)).ravel())
    return share(np.concatenate(wrong))


def _statistics(dtype: mx.Dtype) -> float:
    x = drawn(143, (1, 2, _VOCABULARY), dtype, 4.0)
    seen = computed(lambda: statistics(x.array, 0.7, 30.0))
    draft, entropy, confidence, ratios, masses, weights, total = seen
    logits = 30 * np.tanh(x.exact / 30) / 0.7
    p = softmax(logits)
    chunks = p.reshape(1, 2, -1, chunk_size(_VOCABULARY)).sum(axis=-1)
    top = np.take_along_axis(x.exact, draft[..., None], axis=-1)[..., 0]
    # In 16 bits the kept weights are those of rounded logits, up to 40: an eighth for bfloat16.
    kept = given(logits, dtype).exact
    kept_ratios = np.exp(kept - kept.max(axis=-1, keepdims=True))
    float32_only = [
        float((top != x.exact.max(axis=-1)).any()),
        relative(entropy, -(p * np.log(p)).sum(axis=-1)),
        relative(confidence, p.max(axis=-1)),
        relative(ratios * confidence[..., None], p),
        relative(masses * confidence[..., None], chunks),
    ]
    rounded = [relative(weights, kept_ratios), relative(total, kept_ratios.sum(axis=-1))]
    allowed = max(_STATISTICS, tolerance(dtype))
    # One number for both: differences of what is float32 in any case count by their own tolerance.
    return float(np.max([*(d * allowed / _STATISTICS for d in float32_only), *rounded]))


def _shortlist() -> float:
    weights = given(np.exp(drawn(144, (1, 3, 16_384), mx.float32, 2.0).exact), mx.float32)
    total = given(weights.exact.sum(axis=-1), mx.float32)
    ids, _ = computed(lambda: shortlist(weights.array, total.array, 64))
    return _chosen_values(ids, weights.exact, 64)


def _candidates() -> float:
    x = drawn(145, (1, 3, 16_384), mx.float32, 4.0)
    ids, found = computed(lambda: top_candidates(x.array, 8))
    p = softmax(x.exact)
    right = -np.sort(-p, axis=-1)[..., :8]
    named = np.take_along_axis(p, ids, axis=-1)
    return float(np.max([relative(found, right), relative(named, right)]))


def _acceptance() -> float:
    """Compare with a walk from the surest position up; entropies are sixteenths, whose sums are
    exact."""
    rng = np.random.default_rng(146)
    entropy = rng.permutation(np.arange(512)).reshape(2, 256) / 16.0
    proposal, noise = np.zeros((2, 256), np.int32), np.ones((2, 256), np.int32)
    bound = 250.0
    canvas, accepted = computed(
        lambda: decide(
            mx.array(entropy.astype(np.float32)),
            mx.array(proposal),
            mx.array(noise),
            entropy_bound=bound,
        )
    )
    right = np.zeros((2, 256), bool)
    for row in range(2):
        spent = 0.0
        for place in np.argsort(entropy[row]):
            right[row, place] = spent <= bound
            spent += entropy[row, place]
    return max(share(accepted != right), share(canvas != np.where(right, proposal, noise)))


def _draws() -> float:
    """Draw 16,384 times from one distribution over 256 tokens."""
    places, vocabulary = 16_384, 256
    logits = drawn(147, (1, 1, vocabulary), mx.float32, 1.5)
    repeated = given(np.broadcast_to(logits.exact, (1, places, vocabulary)), mx.float32)

    def build() -> mx.array:
        noise = SeededNoise(148).gumbels(0, 0, (1, places), vocabulary)
        return draw(statistics(repeated.array), noise)

    (tokens,) = computed(build)
    return _sigmas(tokens, softmax(logits.exact)[0, 0])


def _uniform() -> float:
    vocabulary = 384
    (tokens,) = computed(lambda: SeededNoise(149).renoise(0, 0, (1, 32768), vocabulary))
    return _sigmas(tokens, np.full(vocabulary, 1 / vocabulary))


def _sigmas(tokens: np.ndarray, chances: np.ndarray) -> float:
    """Return how far the chi-square of drawn tokens is above what is expected, in standard
    deviations. Tokens that are expected less than ten times count together.

    Source: E. B. Wilson and M. M. Hilferty, The distribution of chi-square, PNAS 17 (1931).
    """
    counts = np.bincount(tokens.ravel(), minlength=len(chances))
    if len(counts) > len(chances):
        return math.inf  # a token beyond the vocabulary
    due = chances * tokens.size
    often = due >= 10
    counts = np.append(counts[often], counts[~often].sum())
    due = np.append(due[often], due[~often].sum())
    counts, due = counts[due > 0], due[due > 0]
    square, freedom = float(((counts - due) ** 2 / due).sum()), len(due) - 1
    spread = 2 / (9 * freedom)
    return ((square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _bits() -> float:
    """Return the share of keys, and of the tokens drawn with them, that are not the reference's."""

    def build() -> list[mx.array]:
        keys = [mx.random.key(seed) for seed in (0, 7, 2**63 + 5)]
        parts = [mx.random.split(key, 5) for key in keys]
        return parts + [mx.random.randint(0, _VOCABULARY, (1001,), key=key) for key in keys]

    here, there = computed(build), device.expected(build)
    return max(share(a != b) for a, b in zip(here, there, strict=True))
