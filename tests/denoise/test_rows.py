"""Rows together: each writes what it writes alone, whoever comes and goes beside it. `make long`
draws 300 mixtures."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.model import Context, OpenContext
from tests.denoise import mixtures
from tests.denoise.mixtures import Tally, compare, logits_apart, summary

MIXTURES = 14  # two of each model; tests/denoise/mixtures.py runs 300


def test_a_row_of_any_mixture_writes_what_it_writes_alone(capsys):
    tally = Tally()
    for seed in range(MIXTURES):
        compare(seed, tally)
    with capsys.disabled():
        print("", summary(tally), *tally.ties, *tally.drifts, sep="\n")
    assert tally.findings == []
    assert len(tally.ties) + len(tally.drifts) < tally.rows / 20, "near ties are rare"
    assert min(tally.shared, tally.pinned, tally.left, tally.canvases - tally.rows) >= 7


def test_no_row_differs_at_all_where_rounding_is_a_billion_times_smaller():
    tally = Tally()
    with mixtures.doubles():
        for seed in range(MIXTURES // 2):
            compare(seed, tally, is_exact=True)
        assert max(logits_apart(seed) for seed in range(MIXTURES // 2)) < 1e-12
    assert tally.ties == tally.drifts == tally.findings == []
    assert tally.rows > 30


def test_a_steps_logits_are_those_of_the_row_alone():
    assert max(logits_apart(seed) for seed in range(MIXTURES)) < 1e-4


def finds(seeds=range(7)) -> bool:
    tally = Tally()
    for seed in seeds:
        compare(seed, tally)
        if tally.findings:
            return True
    return False


def test_a_mixture_shows_a_row_that_reads_the_context_of_another(monkeypatch):
    real = mixtures.DiffusionGemma.canvas_states

    def swapped(model, canvases, opened, **rest):
        if len(opened) > 1 and not opened[0].is_shared and not opened[1].is_shared:
            contexts = [each.closed() for each in opened]
            contexts[0], contexts[1] = contexts[1], contexts[0]
            widths = [canvas.shape[1] for canvas in canvases]
            opened[:2] = [
                OpenContext.of(context, max(widths[:2], default=1)) for context in contexts[:2]
            ]
        return real(model, canvases, opened, **rest)

    monkeypatch.setattr(mixtures.DiffusionGemma, "canvas_states", swapped)
    assert finds()


@pytest.mark.parametrize("number", [1, -1])
def test_a_row_that_joins_or_leaves_copies_no_context(number):
    """Those that stay keep their arrays, at their places in memory."""
    model = mixtures.model_of(number)
    rng = np.random.default_rng(3)
    settings = mixtures.GenerationSettings(max_denoising_steps=9, stability_threshold=9, seed=1)
    resolved = settings.resolve(model.config)

    def row(count: int, context: Context | None = None) -> mixtures.Row:
        tokens = None if context is not None else rng.integers(2, 60, count, dtype=np.int32)
        return mixtures.Row(
            model, resolved, tokens, context=context, is_shared=context is not None, number=count
        )

    def places(one: mixtures.Row) -> list[int]:
        layers = one.opened[0].layers
        mx.eval([layer.keys for layer in layers], [layer.values for layer in layers])
        arrays = [array for layer in layers for array in (layer.keys, layer.values)]
        return [np.asarray(array).ctypes.data for array in arrays]

    together, staying, leaving = Rows(model), row(9), row(30)
    together.add(staying)
    together.add(leaving)
    for _ in range(2):
        list(together.advance())
    before = places(staying)
    shared = model.prefill(mx.array(rng.integers(2, 60, (1, 12), dtype=np.int32)))
    mx.eval(shared.arrays)
    ones = [row(100 + i, shared) for i in range(2)]
    for one in ones:
        together.add(one)
    list(together.advance())
    assert places(staying) == before
    for one in ones:
        for layer, kept in zip(one.opened[0].layers, shared.layers, strict=True):
            assert layer.keys is kept.keys and layer.values is kept.values
    together.remove(leaving)
    list(together.advance())
    assert places(staying) == before
