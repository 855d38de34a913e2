"""Times of made-up layers, and what they add up to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.doctor import speed
from mlx_diffgemma.doctor.floors import parameters
from mlx_diffgemma.doctor.made_up import made_up_model, narrowed
from mlx_diffgemma.doctor.published import published_model
from mlx_diffgemma.doctor.speed import Shape, Timing, extrapolated, time_parts, width_divisor
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.model.stack import Layer

PUBLISHED = published_model()


def tiny(**changes):
    """The published kinds of layers, as small as they can be packed."""
    config = narrowed(PUBLISHED, 44)
    sizes = {"num_experts": 8, "top_k_experts": 2, "vocab_size": 512} | changes
    text = replace(config.text, **sizes)
    return replace(config, text=text, canvas_length=16)


def timing(name: str, of: str, count: int, ms: float, floor: float | None, *, commit=False):
    return Timing(name, of, count, commit, ms, ms, 5, floor)


BY_HAND = [
    timing("sliding layer", "step", 25, 2.0, 1.0, commit=True),
    timing("full layer", "step", 5, 4.0, 2.0, commit=True),
    timing("self-conditioning", "step", 1, 1.0, 0.5),
    timing("head", "step", 1, 10.0, 5.0),
    timing("sampler", "step", 1, 5.0, 2.0),
    timing("soft embedding", "step", 1, 10.0, 5.0),
    timing("sliding layer", "token", 25, 0.2, 0.1),
    timing("full layer", "token", 5, 0.4, 0.1),
    timing("head", "token", 1, 3.0, 2.0),
]


def test_parts_add_up_to_steps_and_rates_as_by_hand():
    found = extrapolated(BY_HAND, canvas=256)
    # 25 * 2 + 5 * 4 = 70 for the layers, 26 for the rest; 25 * 0.2 + 5 * 0.4 + 3 = 10 a token.
    assert (found.step_ms, found.commit_ms, found.token_ms) == pytest.approx((96, 70, 10))
    assert list(found.tokens_per_second) == ["8", "12", "16", "20"]
    assert found.tokens_per_second["8"] == pytest.approx(256_000 / (8 * 96 + 70))
    assert found.tokens_per_second["20"] == pytest.approx(256_000 / (20 * 96 + 70))
    assert found.twin_tokens_per_second == pytest.approx(100)
    # At n steps both take the same time: n * 96 + 70 = 256 * 10.
    assert found.break_even_steps == pytest.approx(25.9375)
    assert (found.floor_step_ms, found.floor_token_ms) == pytest.approx((47.5, 5))
    assert found.floor_tokens_per_second["8"] == pytest.approx(256_000 / (8 * 47.5 + 35))


def test_without_rates_of_the_chip_there_are_no_floors():
    found = extrapolated([replace(t, floor_ms=None) for t in BY_HAND], canvas=256)
    assert found.floor_step_ms is found.floor_token_ms is found.floor_tokens_per_second is None
    assert found.tokens_per_second["8"] == pytest.approx(256_000 / (8 * 96 + 70))


def check_parts(events, *, has_floor: bool) -> Shape:
    shape, *timings = events
    assert [(t.of, t.name, t.count) for t in timings] == [(t.of, t.name, t.count) for t in BY_HAND]
    assert [t.in_commit for t in timings] == [t.in_commit for t in BY_HAND]
    for t in timings:
        assert 0 < t.least_ms <= t.ms and t.samples >= 3
        assert (t.floor_ms is not None) == has_floor
    assert extrapolated(timings, shape.canvas).step_ms >= sum(t.ms for t in timings[:6])
    return shape


def test_every_part_of_a_step_and_of_a_token_is_timed():
    shape = check_parts(time_parts("Apple M3 Ultra", 1, config=tiny()), has_floor=True)
    assert (shape.chip, shape.is_narrow, shape.canvas) == ("M3 Ultra", False, 16)
    shape = check_parts(time_parts("Apple M4 Pro", 1, config=tiny()), has_floor=False)
    assert shape.chip is None


def test_the_graph_of_a_gpu_is_timed_in_bfloat16():
    with as_on_gpu():
        shape = check_parts(time_parts("Apple M5", 1, config=tiny()), has_floor=True)
    assert shape.dtype == "bfloat16"


def test_a_narrow_model_has_no_floors():
    shape = next(time_parts("Apple M3 Ultra", 10, config=tiny()))
    assert shape.is_narrow and shape.chip is None


def test_the_time_of_a_layer_is_that_of_one_layer(monkeypatch):
    """By a clock that only layers move."""
    clock, call = [0.0], Layer.__call__

    def timed(self, *arguments):
        clock[0] += 0.03
        return call(self, *arguments)

    monkeypatch.setattr(Layer, "__call__", timed)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for t in list(time_parts("", 1, config=tiny()))[1:]:
        wanted = 30.0 if "layer" in t.name else 0.0
        assert [t.ms, t.least_ms] == pytest.approx([wanted, wanted]), t


@pytest.mark.parametrize(
    ("backend", "recommended", "divisor"),
    [("metal", 48 << 30, 1), ("cuda", 80 << 30, 1), ("metal", 2 << 30, 10), ("cpu", 64 << 30, 10)],
)
def test_a_slow_or_small_device_gets_narrow_layers(backend, recommended, divisor):
    assert width_divisor(backend, recommended) == divisor


def test_a_narrowed_shape_keeps_layers_heads_and_experts():
    text, wide = narrowed(PUBLISHED, 10).text, PUBLISHED.text
    assert narrowed(PUBLISHED, 1) == PUBLISHED
    for name in ("num_attention_heads", "num_experts", "top_k_experts", "num_hidden_layers"):
        assert getattr(text, name) == getattr(wide, name)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"):
        assert getattr(text, name) % 64 == 0
        assert 0.7 <= 10 * getattr(text, name) / getattr(wide, name) <= 1.3
    assert [layer.head_dim for layer in text.layers[4:6]] == [24, 48]


def test_made_up_weights_are_packed_shared_and_of_the_right_size():
    model = made_up_model(tiny(), mx.float32, layers_per_kind=3)
    assert len(model.layers) == 6
    assert model.layers[0].experts is model.layers[2].experts is not model.layers[3].experts
    projections = [layer.self_attn.qkv_proj.weight for layer in model.layers[:2]]
    assert not mx.array_equal(*projections).item()
    packed = np.array(model.model.decoder.embed_tokens.weight)
    for shift in range(0, 32, 4):  # every place of a group is used
        shares = np.bincount((packed.ravel() >> shift) & 15, minlength=16) / packed.size
        assert shares.min() > 0.03, f"bits from {shift} on"
    tokens = mx.arange(16)[None]
    context = model.prefill(tokens)
    states, _ = model.canvas_states([tokens], [model.open(context, 16)])
    outputs = model.outputs(states)
    assert outputs.shape == (1, 16, 512) and mx.isfinite(outputs).all().item()


def test_weights_of_the_published_shape_stay_below_two_gigabytes():
    """By the same count as the bytes of a small model."""
    for config, each in ((tiny(), None), (PUBLISHED, 2e9)):
        one = {layer.type: layer for layer in config.text.layers}
        layers = tuple(layer for layer in one.values() for _ in range(3))
        counts = parameters(replace(config.text, layers=layers, num_hidden_layers=6))
        counts["experts"] //= 3  # shared
        nbytes = sum(counts.values()) * 4.5 / 8
        if each is not None:
            assert nbytes < each
            continue
        shape = next(time_parts("", 1, config=config))
        norms = shape.weight_bytes - nbytes
        assert 0 < norms < 0.3 * nbytes


def test_weights_never_exist_unpacked():
    config = tiny(hidden_size=512, moe_intermediate_size=512, num_experts=32)
    unpacked = 4 * 32 * 3 * 512 * 512
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = made_up_model(config, mx.float32, layers_per_kind=1)
    assert mx.get_peak_memory() - before < unpacked
    held = sum({id(a): a.nbytes for _, a in tree_flatten(model.parameters())}.values())
    assert held < unpacked


def test_samples_are_repeated_until_they_are_long_enough(monkeypatch):
    monkeypatch.setattr(speed, "_SAMPLE_SECONDS", 0.0)
    runs = []

    def run():
        runs.append(mx.zeros(1) + 1)
        return runs[-1]

    assert len(speed._seconds(run)) == 5 and len(runs) == 6  # one to compile
    monkeypatch.setattr(speed, "_SAMPLE_SECONDS", 10.0)
    runs.clear()
    assert len(speed._seconds(run)) == 5 and len(runs) == 1 + 1 + 5 * 20
