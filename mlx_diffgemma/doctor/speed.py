"""The time of each part of a step at the published shape, and what follows for whole answers.

Weights are made up. One layer of each kind is timed, and the sum over all layers is calculated; a
real run is measured only with a real model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import mlx.core as mx

from ..config.generation import default_of
from ..config.model import LayerConfig, ModelConfig
from ..denoise.noise import SeededNoise
from ..denoise.sampler import decide, draw, statistics
from ..denoise.stopping import is_settled
from ..model import DiffusionGemma
from ..model.attention import Segment
from ..model.backend import is_cpu
from ..model.context import LayerContext
from ..model.products import head
from ..model.stack import Layer
from .floors import Chip, Model, known_chip
from .made_up import kinds_of_layers, made_up_model, narrowed
from .published import published_model, with_layers

CONTEXT = 1024  # tokens before the canvas
STEPS = (8, 12, 16, 20)  # per canvas, for which tokens per second are calculated
# Weights, and the arrays of the sampler over the whole vocabulary.
NEEDED_BYTES = 4 << 30
NARROW = 10  # the factor on a device that is too slow or too small for the published width
_TIMED = 3  # layers of a kind, so that a layer's weights are not in a GPU's cache
_SAMPLES, _LEAST_SAMPLES = 5, 3
_SLOW_SECONDS = 1.0  # of samples; a part that took longer gets fewer
_SAMPLE_SECONDS = 0.05
_MOST_REPEATS = 20
_FEW_REPEATS = 2  # of what writes arrays as large as the logits, which all wait in memory

Pass = Literal["step", "token"]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one part of a denoise step, or of a token of the autoregressive twin."""

    name: str
    of: Pass
    count: int  # how often the pass runs this part
    in_commit: bool  # whether reading a finished canvas runs it too
    ms: float  # median
    least_ms: float
    samples: int
    floor_ms: float | None  # None where no rates of the chip are known

    @property
    def total_ms(self) -> float:
        return self.count * self.ms


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """What the parts add up to. The twin is Gemma 4 of the same shape, one token at a time."""

    step_ms: float
    commit_ms: float
    token_ms: float
    floor_step_ms: float | None
    floor_token_ms: float | None
    tokens_per_second: dict[str, float]  # steps per canvas -> of the whole canvas
    floor_tokens_per_second: dict[str, float] | None
    twin_tokens_per_second: float
    break_even_steps: float  # with more steps per canvas the twin is faster


@dataclass(frozen=True, slots=True)
class Shape:
    """What was timed."""

    width_divisor: int  # 1: the published width
    canvas: int
    context: int
    dtype: str
    weight_bytes: int
    chip: str | None  # whose floors these are

    @property
    def is_narrow(self) -> bool:
        return self.width_divisor > 1


def width_divisor(backend: str, recommended_bytes: int) -> int:
    """Return 1 where the published width fits a device, else the divisor of the width."""
    return 1 if backend != "cpu" and recommended_bytes >= NEEDED_BYTES else NARROW


def time_parts(
    device_name: str, divisor: int, *, config: ModelConfig | None = None
) -> Iterator[Shape | Timing]:
    """Yield the shape, and then the time of each part as soon as it is measured.

    Args:
      device_name: as MLX gives it, to find the chip's rates.
      divisor: of the published width, from `width_divisor`.
      config: of another shape than the published one.
    """
    config = narrowed(published_model() if config is None else config, divisor)
    dtype = mx.float32 if is_cpu() else mx.bfloat16
    chip = known_chip(device_name) if divisor == 1 else None
    # A layer differs from the one before in all but its experts, which are nine tenths of it and
    # are chosen anew, so that its weights are not in a GPU's cache. A CPU is busy computing.
    model = made_up_model(config, dtype, layers_per_kind=_TIMED if divisor == 1 else 1)
    nbytes = sum({id(a): a.nbytes for a in _arrays(model.parameters())}.values())
    name, of = str(dtype).rpartition(".")[2], None if chip is None else chip.name
    yield Shape(divisor, config.canvas_length, CONTEXT, name, nbytes, of)
    try:
        yield from step_parts(model, config, chip)
        yield from _token_parts(model, config, chip)
    finally:
        del model
        mx.clear_cache()


def extrapolated(timings: Sequence[Timing], canvas: int) -> Extrapolation:
    """Return what the parts of a step and of a token add up to.

    A canvas of n steps takes n steps and a commit, which reads it with the layers alone.
    """
    step = [t for t in timings if t.of == "step"]
    token = [t for t in timings if t.of == "token"]
    step_ms, token_ms = (sum(t.total_ms for t in parts) for parts in (step, token))
    commit_ms = sum(t.total_ms for t in step if t.in_commit)
    floors: tuple[float, float, float] | None = None
    if all(t.floor_ms is not None for t in timings):
        least = [t.count * (t.floor_ms or 0.0) for t in step]
        commit = [f for t, f in zip(step, least, strict=True) if t.in_commit]
        floors = sum(least), sum(commit), sum(t.count * (t.floor_ms or 0.0) for t in token)
    return Extrapolation(
        step_ms=step_ms,
        commit_ms=commit_ms,
        token_ms=token_ms,
        floor_step_ms=floors[0] if floors else None,
        floor_token_ms=floors[2] if floors else None,
        tokens_per_second=_rates(step_ms, commit_ms, canvas),
        floor_tokens_per_second=_rates(floors[0], floors[1], canvas) if floors else None,
        twin_tokens_per_second=1e3 / token_ms,
        break_even_steps=max(0.0, canvas * token_ms - commit_ms) / step_ms,
    )


def _rates(step_ms: float, commit_ms: float, canvas: int) -> dict[str, float]:
    return {f"{steps}": 1e3 * canvas / (steps * step_ms + commit_ms) for steps in STEPS}


def step_parts(model: DiffusionGemma, config: ModelConfig, chip: Chip | None) -> Iterator[Timing]:
    """Yield the parts of a denoise step over a whole canvas.

    Args:
      model: has some layers of each kind, of which up to three are timed.
      config: of the whole shape, whose layers are counted.
      chip: whose floors are given; None for none.
    """
    rows, decoder, counted = config.canvas_length, model.model.decoder, Model(config)

    def least(*names: str) -> float | None:
        return None if chip is None else _floor(counted, rows, chip, names)

    for name, (layer, count) in kinds_of_layers(config).items():
        one = Model(with_layers(config, layer))
        floor = None if chip is None else one.commit_ms(rows, CONTEXT, chip, "floor")
        layers = _layers_of_kind(model, layer)
        run = _layers_run(layers, layer, rows, config, model.dtype)
        yield _timing(name, "step", count, True, run, floor, per_run=len(layers))
    canvas = mx.random.randint(0, config.vocab_size, (1, rows), key=mx.random.key(1))
    x = _normal((1, rows, config.text.hidden_size), model.dtype)
    mx.eval(canvas, x)
    yield _timing(
        "self-conditioning",
        "step",
        1,
        False,
        lambda: decoder.self_conditioning(model.embed(canvas), x),
        least("self-conditioning MLP"),
    )
    outputs = head(decoder.embed_tokens, decoder.norm(x))
    mx.eval(outputs)
    yield _timing(
        "head",
        "step",
        1,
        False,
        lambda: head(decoder.embed_tokens, decoder.norm(x)),
        least("lm_head"),
        most_repeats=_FEW_REPEATS,
    )
    sample = _sampler_run(outputs, config)
    weights, total = sample()[-2:]
    mx.eval(weights, total)
    floor = least("sampler")
    yield _timing("sampler", "step", 1, False, sample, floor, most_repeats=_FEW_REPEATS)
    del outputs, sample
    yield _timing(
        "soft embedding",
        "step",
        1,
        False,
        lambda: model.mean_embedding(weights, total),
        least("soft embedding"),
    )


def _token_parts(model: DiffusionGemma, config: ModelConfig, chip: Chip | None) -> Iterator[Timing]:
    """Yield the parts of one token of the twin: the same layers and head for one position."""
    decoder = model.model.decoder
    for name, (layer, count) in kinds_of_layers(config).items():
        one = Model(with_layers(config, layer))
        floor = None if chip is None else one.commit_ms(1, CONTEXT, chip, "floor")
        layers = _layers_of_kind(model, layer)
        run = _layers_run(layers, layer, 1, config, model.dtype)
        yield _timing(name, "token", count, False, run, floor, per_run=len(layers))
    x = _normal((1, 1, config.text.hidden_size), model.dtype)
    mx.eval(x)
    yield _timing(
        "head",
        "token",
        1,
        False,
        lambda: mx.argmax(head(decoder.embed_tokens, decoder.norm(x)), axis=-1),
        None if chip is None else _floor(Model(config), 1, chip, ("lm_head",)),
    )


def _layers_of_kind(model: DiffusionGemma, kind: LayerConfig) -> list[Layer]:
    kinds = model.config.text.layers
    return [layer for layer, own in zip(model.layers, kinds, strict=True) if own == kind][:_TIMED]


def _layers_run(
    layers: Sequence[Layer], kind: LayerConfig, rows: int, config: ModelConfig, dtype: mx.Dtype
) -> Callable[[], mx.array]:
    """Return a function that sends `rows` positions behind the context through some layers of a
    kind; its next call sends its last result through them again."""
    x = _normal((1, rows, config.text.hidden_size), dtype)
    kept = min(CONTEXT, config.text.sliding_window - 1) if kind.is_sliding else CONTEXT
    shape = (1, kind.num_key_value_heads, kept + rows, kind.head_dim)
    pasts = [
        LayerContext(_normal(shape, dtype, seed=1), _normal(shape, dtype, seed=2)) for _ in layers
    ]
    mx.eval(x, [(past.keys, past.values) for past in pasts])

    def segment(past: LayerContext) -> Segment:
        return Segment(rows, past, _at_the_end, None, CONTEXT)

    def run() -> mx.array:
        nonlocal x
        for layer in layers:
            # Without another reference, keys and values are written in place, as in a real step.
            x, kept = layer(x, [segment(pasts.pop(0))], layer.layer_scalar)
            pasts.extend(kept)
        return x

    return run


def _at_the_end(
    past: LayerContext | None, keys: mx.array, values: mx.array
) -> tuple[tuple[LayerContext], LayerContext]:
    """Write keys and values over the last places."""
    assert past is not None
    written = past.written(past.keys.shape[2] - keys.shape[2], keys, values)
    return (written,), written


def _sampler_run(outputs: mx.array, config: ModelConfig) -> Callable[[], tuple[mx.array, ...]]:
    """Return a function that draws, accepts and judges a canvas from the head's outputs."""
    shape = (1, outputs.shape[1])
    noise, cap = SeededNoise(0), config.text.final_logit_softcapping
    heat = mx.array(default_of("t_max"), dtype=mx.float32)

    def run() -> tuple[mx.array, ...]:
        seen = statistics(outputs, heat, cap)
        proposal = draw(seen, noise.gumbels(0, 0, shape, config.vocab_size))
        fresh = noise.renoise(0, 0, shape, config.vocab_size)
        decision = decide(seen.entropy, proposal, fresh, entropy_bound=default_of("entropy_bound"))
        settled = is_settled(
            seen.draft,
            [seen.draft],
            seen.entropy,
            stability_threshold=1,
            confidence_threshold=default_of("confidence_threshold"),
        )
        return decision.canvas, settled, seen.weights, seen.total

    return run


def _timing(
    name: str,
    of: Pass,
    count: int,
    in_commit: bool,
    run: Callable[[], Any],
    floor_ms: float | None,
    *,
    per_run: int = 1,
    most_repeats: int = _MOST_REPEATS,
) -> Timing:
    samples = [1e3 * seconds / per_run for seconds in _seconds(run, most_repeats)]
    return Timing(name, of, count, in_commit, median(samples), min(samples), len(samples), floor_ms)


def _seconds(run: Callable[[], Any], most_repeats: int = _MOST_REPEATS) -> list[float]:
    """Return the seconds of a run, several times. A sample is the mean of runs without a wait in
    between: the graph of the next one is built while the device computes, as in a real answer."""
    mx.eval(run())  # kernels are compiled
    samples: list[float] = []
    repeats = 1
    while len(samples) < (_SAMPLES if sum(samples) * repeats < _SLOW_SECONDS else _LEAST_SAMPLES):
        started = time.perf_counter()
        for _ in range(repeats):
            result = run()
            mx.async_eval(result)
        mx.eval(result)
        samples.append((time.perf_counter() - started) / repeats)
        if repeats == 1 and samples[-1] < _SAMPLE_SECONDS:  # too short: longer samples instead
            repeats = min(most_repeats, math.ceil(_SAMPLE_SECONDS / max(samples.pop(), 1e-6)))
    return samples


def _floor(counted: Model, rows: int, chip: Chip, names: Sequence[str]) -> float:
    parts = counted.step(rows, CONTEXT, chip, "floor")
    return sum(part.ms(chip, "floor") for part in parts if part.name in names)


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, *, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _arrays(tree: Any) -> Iterator[mx.array]:
    """Yield the arrays of a model's parameters."""
    if isinstance(tree, mx.array):
        yield tree
        return
    for value in tree.values() if isinstance(tree, dict) else tree:
        yield from _arrays(value)
