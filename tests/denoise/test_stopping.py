"""When a canvas has settled, by hand."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_diffgemma.denoise.stopping import (
    answer_length,
    columns_to_likely_end,
    is_settled,
    width_for,
)

A, B, C = [1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9, 9]
SURE, UNSURE = [0.0, 0.0, 0.0, 0.0196], [0.0, 0.0, 0.0, 0.0204]  # means 0.0049 and 0.0051 nats


def settled(draft, previous, entropy, stability=1) -> list[bool]:
    return is_settled(
        mx.array(draft),
        [mx.array(p) for p in previous],
        mx.array(entropy),
        stability_threshold=stability,
        confidence_threshold=0.005,
    ).tolist()


@pytest.mark.parametrize(
    ("previous", "entropy", "stability", "answer"),
    [
        ([A], SURE, 1, True),
        ([B], SURE, 1, False),
        ([A], UNSURE, 1, False),
        ([], SURE, 1, False),
        ([], SURE, 0, True),
        ([], UNSURE, 0, False),
        ([C], SURE, 0, True),
        ([A], SURE, 2, False),
        ([A, A], SURE, 2, True),
        ([B, A], SURE, 2, False),
        ([A, B], SURE, 2, False),
        ([C, A], SURE, 1, True),
    ],
    ids=[
        "stable and sure",
        "one position moved",
        "stable but unsure",
        "the first step has nothing to equal",
        "no stability asked",
        "no stability asked, but unsure",
        "no stability asked, though it moved",
        "two steps asked, one there",
        "two steps asked and stable",
        "two steps asked, the older differs",
        "two steps asked, the newer differs",
        "older steps than asked do not matter",
    ],
)
def test_settled_means_stable_and_sure(previous, entropy, stability, answer):
    assert settled([A], [[p] for p in previous], [entropy], stability) == [answer]


def test_a_mean_entropy_that_equals_the_threshold_is_not_below_it():
    entropy = mx.array([[0.25, 0.25]])
    draft = mx.array([[1, 2]])
    for threshold, answer in ((0.25, False), (0.2500001, True)):
        out = is_settled(
            draft, [draft], entropy, stability_threshold=1, confidence_threshold=threshold
        )
        assert out.tolist() == [answer]


def test_columns_that_are_committed_count_as_sure_in_the_mean():
    draft, entropy = mx.array([[1, 2]]), mx.array([[0.009, 0.009]])
    rules = {"stability_threshold": 1, "confidence_threshold": 0.005}
    for matters in (None, mx.array([[True, True]])):
        assert [
            is_settled(
                draft, [draft], entropy, matters=matters, committed=committed, **rules
            ).item()
            for committed in (0, 1, 2)
        ] == [False, False, True]


def test_rows_settle_on_their_own():
    assert settled([A, A, A], [[A, B, A]], [SURE, SURE, UNSURE]) == [True, False, False]


# The answer alone


def test_an_answer_ends_with_its_first_end_token_or_behind_the_canvas():
    draft = mx.array([[5, 9, 7, 9], [1, 2, 3, 4], [8, 0, 0, 0], [1, 2, 3, 9]])
    assert answer_length(draft, (9, 8)).tolist() == [2, 5, 1, 4]


def test_what_stands_behind_the_answer_neither_moves_nor_worries():
    draft, before = mx.array([[5, 9, 7, 7]]), mx.array([[5, 9, 6, 8]])
    entropy = mx.array([[0.0, 0.004, 5.0, 5.0]])
    rules = {"stability_threshold": 1, "confidence_threshold": 0.005}
    matters = mx.arange(4) < answer_length(draft, (9,))[:, None]
    assert is_settled(draft, [before], entropy, matters=matters, **rules).item()
    assert not is_settled(draft, [before], entropy, **rules).item()
    moved = mx.array([[4, 9, 7, 7]])
    assert not is_settled(draft, [moved], entropy, matters=matters, **rules).item()
    unsure = mx.array([[0.0, 0.02, 0.0, 0.0]])  # a mean of 0.01 over two, of 0.005 over four
    assert not is_settled(draft, [before], unsure, matters=matters, **rules).item()


@pytest.mark.parametrize(
    ("needed", "canvas", "width"),
    [(1, 256, 64), (32, 256, 64), (33, 256, 96), (224, 256, 256), (256, 256, 256), (3, 32, 8),
     (1, 5, 2), (5, 5, 5)],
)  # fmt: skip
def test_widths_are_whole_eighths_with_one_to_spare(needed, canvas, width):
    assert width_for(needed, canvas) == width


@pytest.mark.parametrize(
    ("ended", "length", "needed"),
    [
        ([0.0, 0.1, 0.8, 0.9, 0.9, 0.9], 3, 3),
        ([0.0, 0.1, 0.8, 0.6, 0.9, 0.9], 3, 5),
        ([0.0, 0.1, 0.8, 0.9, 0.9, 0.9], 5, 5),
        ([0.0, 0.1, 0.8, 0.9, 0.9, 0.6], 3, 99),
        ([0.0, 0.1, 0.8, 0.9, 0.9, 0.9], 7, 99),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 1, 1),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.7], 6, 6),
    ],
    ids=[
        "the first likely end",
        "behind the last doubt",
        "no less than the draft's own answer",
        "the last column is in doubt",
        "the draft has no end",
        "an empty answer",
        "an end in the last column",
    ],
)
def test_columns_are_needed_up_to_a_likely_end(ended, length, needed):
    found = columns_to_likely_end(mx.array([ended]), mx.array([length]), 0.7, 99)
    assert found.tolist() == [needed]
