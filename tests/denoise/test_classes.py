"""Reductions over classes of tokens on the device, against numpy over the whole vocabulary."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.constraint.decode import best, endings
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.constraint.tokens import DEAD, TokenAutomaton, lift
from mlx_diffgemma.denoise.classes import (
    Blocks,
    block_log_p,
    block_maxima,
    block_sums,
    class_sums,
    draw_of,
    likeliest_of,
)
from mlx_diffgemma.denoise.sampler import statistics
from tests.constraint.automata import but, dfa, either, many, one_of, row
from tests.constraint.cases import maxima, sums, vocabulary

HEAT, CAP, W = 0.6, 30.0, 7


def automaton() -> TokenAutomaton:
    """Two classes of many tokens, some of a few, and singles."""
    texts = [chr(code) for code in range(0x4E00, 0x4E00 + 1706)]
    texts += [f"{a}{b}" for a in "abcdefghij" for b in "klmnop"]
    texts += ["x", "y", "xy", '"', '",', "true", "false"]
    made = row('"', many(but('"x')), '"', either(",", many(one_of("xy")), "true"))
    return lift(dfa(made), vocabulary(texts))


AUTOMATON = automaton()
BLOCKS = Blocks.of(AUTOMATON)
V = len(AUTOMATON.classes)


def outputs(kind: mx.Dtype, scale: float = 20) -> mx.array:
    drawn = np.random.default_rng(0).normal(0, scale, (1, W, V)).astype(np.float32)
    return mx.array(drawn).astype(kind)


def log_p(x: mx.array) -> np.ndarray:
    logits = CAP * np.tanh(np.array(x.astype(mx.float32), np.float64)[0] / CAP) / HEAT
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def test_blocks_hold_every_token_that_is_not_dead_once():
    held = np.concatenate([np.array(one).ravel() for one in BLOCKS.columns])
    assert sorted(held.tolist()) == np.flatnonzero(AUTOMATON.classes != DEAD).tolist()
    assert sum(one.shape[0] > 0 for one in BLOCKS.columns) == 4
    tokens = np.array(BLOCKS.tokens)
    for number in range(1, len(AUTOMATON.sizes)):
        blocks = BLOCKS.members[BLOCKS.starts[number] : BLOCKS.starts[number + 1]]
        own = tokens[blocks].ravel()
        assert own[own >= 0].tolist() == np.flatnonzero(AUTOMATON.classes == number).tolist()


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16])
def test_class_maxima_are_those_over_the_vocabulary(kind):
    x = outputs(kind)
    seen = statistics(x, HEAT, CAP)
    found = np.array(block_log_p(block_maxima(x, BLOCKS), seen, x, HEAT, CAP))[0]
    ours = BLOCKS.joined(np.maximum, found, -np.inf)
    expected = maxima(AUTOMATON, log_p(x))
    np.testing.assert_allclose(ours[:, 1:], expected[:, 1:], atol=2e-4)
    assert (ours[:, DEAD] == -np.inf).all()


@pytest.mark.parametrize("scale", [0.5, 20])
def test_class_sums_are_those_over_the_vocabulary(scale):
    x = outputs(mx.float32, scale)
    seen = statistics(x, HEAT, CAP)
    r, products = (np.array(one)[0] for one in block_sums(seen.ratios, BLOCKS))
    P, N = class_sums(r, products, np.array(seen.confidence)[0], BLOCKS)
    logs = log_p(x)
    np.testing.assert_allclose(P[:, 1:], sums(AUTOMATON, np.exp(logs))[:, 1:], rtol=1e-4, atol=1e-9)
    expected = sums(AUTOMATON, np.exp(logs) * logs)
    np.testing.assert_allclose(N[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-7)
    assert (P[:, DEAD] == 0).all() and (N[:, DEAD] == 0).all()


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16])
def test_the_token_of_a_class_is_its_likeliest_and_the_lowest_of_several(kind):
    x = outputs(kind)
    x = mx.where(mx.arange(V) % 3 == 0, mx.round(x / 8) * 8, x)  # many ties
    found = np.array(block_maxima(x, BLOCKS).astype(mx.float32))[0]
    every = np.array(x.astype(mx.float32))[0]
    for number in range(1, len(AUTOMATON.sizes)):
        classes = np.full(W, number)
        chosen = mx.array(BLOCKS.largest(found, classes))[None]
        inside = np.where(AUTOMATON.classes == number, every, -np.inf)
        assert likeliest_of(x, chosen, BLOCKS).tolist() == [inside.argmax(axis=1).tolist()]


def test_the_draft_that_the_device_writes_fits_and_scores_what_was_promised():
    x = outputs(mx.float32, 5)
    seen = statistics(x, HEAT, CAP)
    found = np.array(block_log_p(block_maxima(x, BLOCKS), seen, x, HEAT, CAP))[0]
    path = best(AUTOMATON, BLOCKS.joined(np.maximum, found, -np.inf), endings(AUTOMATON, 0))
    chosen = mx.array(BLOCKS.largest(found, path.classes))[None]
    tokens = np.array(likeliest_of(x, chosen, BLOCKS))[0]
    assert AUTOMATON.after(tokens) == AUTOMATON.end
    score = log_p(x)[np.arange(W), tokens].sum()
    assert path.score == pytest.approx(score, abs=1e-3)


def test_tokens_of_a_class_are_drawn_as_the_model_has_them():
    x = outputs(mx.float32, 1)[:, :1]
    seen = statistics(x, HEAT, CAP)
    number = int(np.argmax(AUTOMATON.sizes[1:])) + 1
    p = np.where(AUTOMATON.classes == number, np.exp(log_p(x)[0]), 0)
    p /= p.sum()
    count, rng = 4000, np.random.default_rng(0)
    r = np.repeat(np.array(block_sums(seen.ratios, BLOCKS)[0])[0], count, axis=0)
    blocks = BLOCKS.drawn(r, np.full(count, number), rng.random(count))
    gumbels = mx.random.gumbel((1, count, 512), key=mx.random.key(0))
    many_x = mx.broadcast_to(x, (1, count, V))
    tokens = np.array(draw_of(many_x, mx.array(blocks)[None], gumbels, BLOCKS, HEAT, CAP))[0]
    often = np.bincount(tokens, minlength=V)
    assert not often[p == 0].any()
    likely = p * count > 5
    chi = ((often - p * count) ** 2 / np.maximum(p * count, 1e-9))[likely].sum()
    assert likely.sum() > 50
    assert chi < likely.sum() + 5 * math.sqrt(2 * likely.sum())


def test_a_class_without_probability_is_drawn_by_its_tokens():
    number = int(np.argmax(AUTOMATON.sizes[1:])) + 1
    nothing = np.zeros((1000, len(BLOCKS.members)), np.float32)
    rng = np.random.default_rng(0)
    blocks = BLOCKS.drawn(nothing, np.full(1000, number), rng.random(1000))
    own = BLOCKS.members[BLOCKS.starts[number] : BLOCKS.starts[number + 1]]
    assert set(blocks.tolist()) <= set(own.tolist())
    assert np.mean(blocks < BLOCKS.columns[0].shape[0]) > 0.8  # in blocks of 512
    x = mx.full((1, 1000, V), -1e4)
    tokens = draw_of(x, mx.array(blocks)[None], mx.zeros((1, 1000, 512)), BLOCKS, HEAT, CAP)
    assert (AUTOMATON.classes[np.array(tokens)[0]] == number).all()


def test_probabilities_under_the_constraint_are_the_marginals():
    x = outputs(mx.float32, 5)
    seen = statistics(x, HEAT, CAP)
    confidence = np.array(seen.confidence)[0]
    r, products = (np.array(one)[0] for one in block_sums(seen.ratios, BLOCKS))
    P, N = class_sums(r, products, confidence, BLOCKS)
    found = Strings.of(AUTOMATON, P, endings(AUTOMATON, 0)).marginals(N)
    expected = np.exp(log_p(x)) * found.factors[:, AUTOMATON.classes]
    np.testing.assert_allclose(expected.sum(axis=1), 1, atol=1e-5)
    entropy = -np.where(expected > 0, expected * np.log(np.maximum(expected, 1e-300)), 0).sum(
        axis=1
    )
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-4)


def test_where_every_possible_token_is_out_of_range_the_draft_fits_all_the_same():
    outside = int(np.flatnonzero(AUTOMATON.classes == DEAD)[0])
    x = mx.where(mx.arange(V) == outside, 1e4, mx.zeros((1, W, V)))
    seen = statistics(x)
    assert seen.draft.tolist() == [[outside] * W]
    maxima = block_log_p(block_maxima(x, BLOCKS), seen, x, 1.0, math.inf)
    found = np.array(maxima)[0]
    path = best(AUTOMATON, BLOCKS.joined(np.maximum, found, -np.inf), endings(AUTOMATON, 0))
    chosen = mx.array(BLOCKS.largest(found, path.classes))[None]
    draft = likeliest_of(x, chosen, BLOCKS)
    assert AUTOMATON.after(np.array(draft)[0]) == AUTOMATON.end
    confidence = np.array(seen.confidence)[0]
    r, products = (np.array(one)[0] for one in block_sums(seen.ratios, BLOCKS))
    P, N = class_sums(r, products, confidence, BLOCKS)
    marginals = Strings.of(AUTOMATON, P, endings(AUTOMATON, 0)).marginals(N)
    np.testing.assert_allclose(marginals.masses.sum(axis=1), 1, atol=1e-9)
