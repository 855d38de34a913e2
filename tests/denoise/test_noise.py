"""Seeded draws: independent rows, no key used twice, and the right distributions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import SeededNoise

VOCAB = 50


def draw(noise: SeededNoise, kind: str, canvas: int, step: int, length: int = 200) -> list[int]:
    if kind == "start":
        tokens = noise.start(canvas, (1, length), VOCAB)
    elif kind == "renoise":
        tokens = noise.renoise(canvas, step, (1, length), VOCAB)
    else:
        tokens = noise.sample(canvas, step, mx.zeros((1, length, VOCAB)))
    assert tokens.shape == (1, length)
    return tokens[0].tolist()


@pytest.mark.parametrize("kind", ["start", "sample", "renoise"])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 4])
def test_neighbouring_seeds_draw_apart(kind, seed):
    rows = [draw(SeededNoise(seed + i), kind, 2, 5) for i in range(3)]
    for i, row in enumerate(rows):
        assert row == draw(SeededNoise(seed + i), kind, 2, 5)
        others = [sum(map(int.__eq__, row, other)) for other in rows if other is not row]
        assert max(others) < 30, "of 200 tokens, 4 are alike by chance"


@pytest.mark.parametrize("kind", ["start", "sample", "renoise"])
def test_draws_for_several_rows_are_refused(kind):
    asked = {
        "start": lambda: SeededNoise(0).start(0, (2, 4), VOCAB),
        "renoise": lambda: SeededNoise(0).renoise(0, 0, (2, 4), VOCAB),
        "sample": lambda: SeededNoise(0).sample(0, 0, mx.zeros((2, 4, VOCAB))),
    }
    with pytest.raises(ValueError, match=r"shapes are \(1, L\), got \(2, 4\)"):
        asked[kind]()


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
        tuple(draw(SeededNoise(seed).reroll(attempt), kind, canvas, step))
        for seed, attempt, kind, canvas, step in draws
    }
    assert len(seen) == len(draws)


def test_draws_do_not_depend_on_the_order_in_which_they_are_asked_for():
    noise, again = SeededNoise(5), SeededNoise(5)
    forwards = [draw(noise, "renoise", 0, step) for step in range(4)]
    backwards = [draw(again, "renoise", 0, step) for step in reversed(range(4))]
    assert forwards == backwards[::-1]


def test_the_global_seed_plays_no_part():
    mx.random.seed(1)
    first = draw(SeededNoise(5), "sample", 0, 0)
    mx.random.seed(2)
    assert draw(SeededNoise(5), "sample", 0, 0) == first


@pytest.mark.parametrize("kind", ["start", "sample", "renoise"])
def test_tokens_are_uniform_over_the_whole_vocabulary(kind):
    # Chi-square with 49 degrees of freedom: mean 49, deviation sqrt(98) = 9.9; six deviations.
    count = 20_000
    tokens = np.array(draw(SeededNoise(11), kind, 0, 0, length=count))
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
    assert noise.start(0, (1, 3), VOCAB).dtype == mx.int32
    assert noise.renoise(0, 0, (1, 3), VOCAB).dtype == mx.int32
