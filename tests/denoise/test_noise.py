"""Seeded draws: independent rows, no key used twice, and the right distributions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import SeededNoise

VOCAB = 50


def draw(noise: SeededNoise, kind: str, canvas: int, step: int, rows: int, length: int = 200):
    if kind == "start":
        return noise.start(canvas, (rows, length), VOCAB).tolist()
    if kind == "renoise":
        return noise.renoise(canvas, step, (rows, length), VOCAB).tolist()
    return noise.sample(canvas, step, mx.zeros((rows, length, VOCAB))).tolist()


@pytest.mark.parametrize("kind", ["start", "sample", "renoise"])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 4])
def test_row_i_under_seed_s_draws_what_a_single_run_under_s_plus_i_draws(kind, seed):
    together = draw(SeededNoise(seed), kind, 2, 5, rows=3)
    alone = [draw(SeededNoise(seed + i), kind, 2, 5, rows=1)[0] for i in range(3)]
    assert together == alone


def test_sampled_rows_do_not_depend_on_their_neighbours_logits():
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(0, 2, (2, 30, VOCAB)).astype(np.float32))
    both = SeededNoise(3).sample(0, 1, logits)
    assert both[1].tolist() == SeededNoise(4).sample(0, 1, logits[1:])[0].tolist()


def test_no_two_draws_of_a_run_are_alike():
    draws = [
        (seed, attempt, kind, canvas, step)
        for seed in (0, 1)
        for attempt in (0, 1)
        for canvas in (0, 1, 2)
        for kind, steps in (("start", 1), ("sample", 3), ("renoise", 3))
        for step in range(steps)
    ]
    seen = {
        tuple(draw(SeededNoise(seed).reroll(attempt), kind, canvas, step, rows=1)[0])
        for seed, attempt, kind, canvas, step in draws
    }
    assert len(seen) == len(draws)


def test_draws_do_not_depend_on_the_order_in_which_they_are_asked_for():
    noise, again = SeededNoise(5), SeededNoise(5)
    forwards = [draw(noise, "renoise", 0, step, rows=2) for step in range(4)]
    backwards = [draw(again, "renoise", 0, step, rows=2) for step in reversed(range(4))]
    assert forwards == backwards[::-1]


def test_the_global_seed_plays_no_part():
    mx.random.seed(1)
    first = draw(SeededNoise(5), "sample", 0, 0, rows=1)
    mx.random.seed(2)
    assert draw(SeededNoise(5), "sample", 0, 0, rows=1) == first


@pytest.mark.parametrize("kind", ["start", "sample", "renoise"])
def test_tokens_are_uniform_over_the_whole_vocabulary(kind):
    # Chi-square with 49 degrees of freedom: mean 49, deviation sqrt(98) = 9.9; six deviations.
    count = 20_000
    tokens = np.array(draw(SeededNoise(11), kind, 0, 0, rows=1, length=count)[0])
    seen = np.bincount(tokens, minlength=VOCAB)
    assert len(seen) == VOCAB and seen.min() > 0
    assert ((seen - count / VOCAB) ** 2 / (count / VOCAB)).sum() < 49 + 6 * 9.9


def test_samples_follow_the_softmax_of_their_logits():
    p = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    logits = mx.array(np.log(np.maximum(p, 1e-30)).astype(np.float32))
    count = 20_000
    tokens = SeededNoise(1).sample(0, 0, mx.broadcast_to(logits, (1, count, 5)))
    share = np.bincount(np.array(tokens)[0], minlength=5) / count
    # Deviation of a share of one half: sqrt(0.25 / 20000) = 0.0035; five of them.
    np.testing.assert_allclose(share, p, atol=0.018)
    assert share[4] == 0
    assert tokens.dtype == mx.int32


def test_tokens_are_int32():
    noise = SeededNoise(0)
    assert noise.start(0, (2, 3), VOCAB).dtype == mx.int32
    assert noise.renoise(0, 0, (2, 3), VOCAB).dtype == mx.int32
