"""Statistics and acceptance, by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.sampler import decide, statistics, top_candidates

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
