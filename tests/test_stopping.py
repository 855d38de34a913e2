"""When a canvas has settled, by hand."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_diffgemma.stopping import is_settled

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


def test_rows_settle_on_their_own():
    assert settled([A, A, A], [[A, B, A]], [SURE, SURE, UNSURE]) == [True, False, False]
