"""Statistics and acceptance, by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.denoise.sampler import (
    chunk_size,
    decide,
    draw,
    hold,
    probability_of,
    scaled_logits,
    shortlist,
    statistics,
    top_candidates,
)

LN2 = float(np.log(2))


def logits_of(probabilities) -> mx.array:
    return mx.array(np.log(np.maximum(np.array(probabilities, np.float32), 1e-30)))


def test_entropy_is_in_nats_and_the_draft_is_the_likeliest_token():
    p = [[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]]]
    # - sum p ln p: 0, ln 2, 2 ln 2, and 0.2303 + 0.3219 + 0.3612 + 0.3665 = 1.2799
    out = statistics(logits_of(p))
    np.testing.assert_allclose(np.array(out.entropy)[0], [0, LN2, 2 * LN2, 1.27985], atol=1e-5)
    assert np.array(out.draft)[0, [0, 3]].tolist() == [0, 3]
    assert out.draft.dtype == mx.int32 and out.entropy.dtype == mx.float32


def test_entropy_does_not_depend_on_the_level_of_the_logits():
    p = logits_of([[[0.5, 0.25, 0.125, 0.125]]])  # 1.75 ln 2
    for level in (-30.0, 0.0, 30.0):
        assert statistics(p + level).entropy.item() == pytest.approx(1.75 * LN2, abs=1e-5)


@pytest.mark.parametrize(
    ("bound", "kept"),
    [(0.0, 2), (0.1, 2), (0.7, 3), (2.0, 3), (2.1, 4)],
    ids=[
        "bound 0 keeps what costs nothing before it",
        "the first uncertain one is free",
        "one coin flip spent",
        "just short of all",
        "all",
    ],
)
def test_bound_counts_entropy_spent_before_each_position(bound, kept):
    # entropies 0, ln 2 = 0.693, 2 ln 2 = 1.386 twice; spent before each: 0, 0, 0.693, 2.079
    entropy = mx.array([[0, LN2, 2 * LN2, 2 * LN2]])
    ours = decide(
        entropy, mx.zeros((1, 4), mx.int32), mx.ones((1, 4), mx.int32), entropy_bound=bound
    )
    assert int(ours.accepted.sum()) == kept


def test_accepted_positions_take_the_proposal_and_all_others_noise():
    # Sorted: 0.04, 0.05, 1, 2; spent before each: 0, 0.04, 0.09, 1.09. The order is no swap, so
    # that a permutation taken for its inverse would show.
    entropy = mx.array([[1.0, 0.04, 0.05, 2.0]])
    proposal, noise = mx.array([[10, 11, 12, 13]]), mx.array([[20, 21, 22, 23]])
    ours = decide(entropy, proposal, noise, entropy_bound=0.05)
    assert ours.accepted.tolist() == [[False, True, True, False]]
    assert ours.canvas.tolist() == [[20, 11, 12, 23]]


def test_one_position_is_kept_however_unsure_all_are():
    entropy = mx.array([[5.0, 4.0, 6.0]])
    ours = decide(entropy, mx.zeros((1, 3), mx.int32), mx.ones((1, 3), mx.int32), entropy_bound=0.1)
    assert ours.accepted.tolist() == [[False, True, False]]


def test_rows_spend_their_own_entropy():
    entropy = mx.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    ours = decide(entropy, mx.zeros((2, 3), mx.int32), mx.ones((2, 3), mx.int32), entropy_bound=0.1)
    assert ours.accepted.sum(axis=1).tolist() == [3, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 64), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.125, 0.5, 1.0, 4.0]),
)
def test_what_is_kept_is_what_a_walk_from_the_surest_up_would_keep(sixteenths, bound):
    entropy = np.array(sixteenths, np.float32) / 16  # sums of sixteenths are exact in float32
    spent, kept = 0.0, []
    for value in sorted(entropy.tolist()):
        if spent <= bound:
            kept.append(value)
        spent += value
    shape = (1, len(sixteenths))
    accepted = decide(
        mx.array(entropy[None]),
        mx.zeros(shape, mx.int32),
        mx.ones(shape, mx.int32),
        entropy_bound=bound,
    ).accepted
    assert sorted(entropy[np.array(accepted)[0]].tolist()) == kept


def test_shapes_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\).*disagree"):
        decide(
            mx.zeros((1, 3)),
            mx.zeros((1, 2), mx.int32),
            mx.zeros((1, 3), mx.int32),
            entropy_bound=1,
        )


def test_top_candidates_come_best_first_with_their_probabilities():
    ids, probabilities = top_candidates(
        logits_of([[[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]]), 3
    )
    assert ids.tolist() == [[[1, 3, 2], [0, 2, 1]]]
    np.testing.assert_allclose(
        np.array(probabilities), [[[0.4, 0.3, 0.2], [0.7, 0.15, 0.1]]], atol=1e-6
    )
    assert ids.dtype == mx.int32


def test_the_first_candidate_is_the_draft_and_all_of_them_sum_to_one():
    logits = mx.array(np.random.default_rng(0).normal(0, 3, (2, 5, 16)).astype(np.float32))
    ids, probabilities = top_candidates(logits, 16)
    assert ids[..., 0].tolist() == statistics(logits).draft.tolist()
    np.testing.assert_allclose(np.array(probabilities.sum(axis=-1)), 1, atol=1e-5)


def outputs_of(seed: int, shape: tuple[int, ...] = (2, 5, 48)) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 20, shape).astype(np.float32))


def test_statistics_of_outputs_are_those_of_their_capped_and_heated_logits():
    outputs = outputs_of(0)
    logits = np.array(30 * mx.tanh(outputs / 30) / 0.7)
    np.testing.assert_allclose(np.array(scaled_logits(outputs, 0.7, 30.0)), logits, rtol=1e-5)
    seen, plain = statistics(outputs, 0.7, 30.0), statistics(mx.array(logits))
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    assert seen.draft.tolist() == plain.draft.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(np.array(seen.entropy), np.array(plain.entropy), atol=1e-5)
    np.testing.assert_allclose(np.array(seen.confidence), p.max(-1), rtol=1e-4)
    shares = np.array(seen.weights) / np.array(seen.total)[..., None]
    np.testing.assert_allclose(shares, p, rtol=1e-4, atol=1e-6)
    chunks = p.reshape(2, 5, -1, chunk_size(48)).sum(-1)
    masses = np.array(seen.masses) / np.array(seen.total)[..., None]
    np.testing.assert_allclose(masses, chunks, rtol=1e-4, atol=1e-6)


def test_a_sure_position_has_an_entropy_of_nothing_not_of_what_rounding_leaves():
    logits = np.zeros((1, 1, 1024), np.float32)
    logits[0, 0, 7] = 75.0
    assert 0 <= statistics(mx.array(logits)).entropy.item() < 1e-26


def test_in_16_bits_the_weights_are_those_of_the_rounded_logits():
    outputs = outputs_of(1).astype(mx.bfloat16)
    seen = statistics(outputs, 0.5, 30.0)
    exact = 30 * mx.tanh(outputs.astype(mx.float32) / 30) / 0.5
    rounded = np.array(exact.astype(mx.bfloat16).astype(mx.float32))
    expected = np.exp(rounded - rounded.max(-1, keepdims=True))
    assert seen.weights.dtype == mx.bfloat16 and seen.entropy.dtype == mx.float32
    found = np.array(seen.weights.astype(mx.float32))
    np.testing.assert_allclose(
        found, expected, rtol=2**-8, atol=1e-30
    )  # half a unit in the last place
    np.testing.assert_allclose(np.array(seen.total), expected.sum(-1), rtol=2**-6)
    entropy = statistics(exact).entropy  # not of the rounded ones
    np.testing.assert_allclose(np.array(seen.entropy), np.array(entropy), atol=1e-5)


@pytest.mark.parametrize(("vocab", "size"), [(262_144, 512), (384, 24), (48, 8), (7, 7), (1, 1)])
def test_chunks_divide_the_vocabulary(vocab, size):
    assert chunk_size(vocab) == size


@pytest.mark.parametrize("vocab", [60, 13], ids=["six chunks", "one chunk"])
def test_two_levels_draw_from_the_distribution_itself(vocab):
    count, rng = 40_000, np.random.default_rng(3)
    logits = rng.normal(0, 1.5, vocab).astype(np.float32)
    rows = mx.broadcast_to(mx.array(logits), (1, count, vocab))
    size = chunk_size(vocab)
    gumbels = tuple(
        mx.random.gumbel((1, count, n), key=mx.random.key(i))
        for i, n in enumerate((vocab // size, size))
    )
    tokens = np.array(draw(statistics(rows, 0.8), gumbels))[0]
    p = np.exp(logits / 0.8)
    expected = count * p / p.sum()
    seen = np.bincount(tokens, minlength=vocab)
    # Chi-square: mean vocab - 1, deviation sqrt(2 (vocab - 1)); five of them.
    bound = vocab - 1 + 5 * np.sqrt(2 * (vocab - 1))
    assert ((seen - expected) ** 2 / expected).sum() < bound


def test_a_chunk_without_mass_is_never_drawn():
    logits = np.full((1, 500, 16), -300.0, np.float32)
    logits[..., 5] = 0
    rows = mx.array(logits)
    gumbels = tuple(mx.random.gumbel((1, 500, 4), key=mx.random.key(i)) for i in (0, 1))
    assert set(np.array(draw(statistics(rows), gumbels)).flatten().tolist()) == {5}


def test_probability_of_a_token_is_its_softmax():
    outputs = outputs_of(2)
    tokens = mx.array(np.random.default_rng(0).integers(0, 48, (2, 5)).astype(np.int32))
    p = mx.softmax(30 * mx.tanh(outputs / 30) / 0.6, axis=-1)
    expected = np.take_along_axis(np.array(p), np.array(tokens)[..., None], axis=-1)[..., 0]
    found = probability_of(tokens, statistics(outputs, 0.6, 30.0))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3, 8, 48])
def test_a_shortlist_holds_the_likeliest_tokens_and_no_others(count):
    seen = statistics(outputs_of(4))
    ids, probabilities = shortlist(seen.weights, seen.total, count)
    p = np.array(seen.weights) / np.array(seen.total)[..., None]
    assert np.sort(np.array(ids)).tolist() == np.sort(np.argsort(-p)[..., :count]).tolist()
    found = np.take_along_axis(p, np.array(ids), axis=-1)
    np.testing.assert_allclose(np.array(probabilities), found, rtol=1e-6)


# Holding


def hold_row(proposal, probability, draft, held, matters=None, confidence=0.9, share=0.0):
    count = len(proposal)
    out = hold(
        mx.array([proposal]),
        mx.array([probability]),
        mx.array([draft]),
        mx.array([held]),
        mx.array([[True] * count if matters is None else matters]),
        mx.array([[90 + i for i in range(count)]]),
        confidence=confidence,
        share=share,
    )
    return out.canvas[0].tolist(), out.accepted[0].tolist(), out.tokens[0].tolist()


def test_sure_proposals_are_held_and_the_rest_is_refilled():
    canvas, accepted, held = hold_row([1, 2, 3], [0.95, 0.5, 0.9], [1, 2, 3], [-1] * 3)
    assert canvas == [1, 91, 3] and accepted == [True, False, True] and held == [1, -1, 3]


def test_a_held_token_stays_while_it_is_the_likeliest_and_goes_when_it_is_not():
    canvas, accepted, held = hold_row([1, 7, 3], [0.6, 0.6, 0.95], [1, 7, 3], [1, 2, -1])
    assert held == [1, -1, 3] and accepted == [True, False, True] and canvas == [1, 91, 3]


def test_where_nothing_new_is_sure_the_likeliest_open_position_is_held():
    _, accepted, _ = hold_row([1, 2, 3], [0.2, 0.5, 0.4], [1, 2, 3], [-1] * 3)
    assert accepted == [False, True, False]
    # Held ones that only stay are no progress.
    _, accepted, _ = hold_row([1, 2, 3], [0.95, 0.3, 0.4], [1, 2, 3], [1, -1, -1])
    assert accepted == [True, False, True]


def test_a_share_of_the_open_positions_is_held_in_any_case():
    p = [0.95, 0.5, 0.4, 0.3, 0.2]
    _, accepted, _ = hold_row([1, 2, 3, 4, 5], p, [1, 2, 3, 4, 5], [-1] * 5, share=0.3)
    assert accepted == [True, True, True, False, False]  # ceil(0.3 * 4) of the four open ones


def test_positions_that_do_not_matter_are_not_held_for_progress():
    matters = [True, True, False]
    _, accepted, _ = hold_row([1, 2, 3], [0.2, 0.3, 0.8], [1, 2, 3], [-1] * 3, matters)
    assert accepted == [False, True, False]


def test_candidates_of_16_bit_outputs_have_the_probabilities_of_their_logits():
    outputs = outputs_of(6, (1, 4, 96)).astype(mx.bfloat16)
    seen = statistics(outputs, 0.5, 30.0)
    p = np.array(mx.softmax(scaled_logits(outputs, 0.5, 30.0), axis=-1))
    for confidence in (seen.confidence, None):
        ids, found = top_candidates(outputs, 3, confidence, 0.5, 30.0)
        expected = np.take_along_axis(p, np.array(ids), axis=-1)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4)
