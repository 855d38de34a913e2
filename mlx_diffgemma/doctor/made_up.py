"""A few layers of the published shape with made-up packed weights, to measure their time. What they
compute means nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..config.model import LayerConfig, ModelConfig
from ..model import DiffusionGemma
from ..model.fused import fuse
from .published import with_layers

GROUP_SIZE, BITS = 64, 4


def narrowed(config: ModelConfig, factor: int) -> ModelConfig:
    """Return a config of about a `factor`-th of the width, which still packs into whole groups.
    Layers, heads, experts and the canvas stay as many."""

    def less(size: int, multiple: int = GROUP_SIZE) -> int:
        return max(1, round(size / factor / multiple)) * multiple

    if factor == 1:
        return config
    text = config.text
    layers = tuple(replace(layer, head_dim=less(layer.head_dim, 8)) for layer in text.layers)
    return replace(
        config,
        text=replace(
            text,
            layers=layers,
            vocab_size=less(text.vocab_size),
            hidden_size=less(text.hidden_size),
            intermediate_size=less(text.intermediate_size),
            moe_intermediate_size=less(text.moe_intermediate_size),
            head_dim=less(text.head_dim, 8),
        ),
    )


def kinds_of_layers(config: ModelConfig) -> dict[str, tuple[LayerConfig, int]]:
    """Return a layer of each kind and how many of it there are, by name."""
    kinds: dict[str, tuple[LayerConfig, int]] = {}
    for layer in config.text.layers:
        name = "sliding layer" if layer.is_sliding else "full layer"
        kinds[name] = layer, kinds.get(name, (layer, 0))[1] + 1
    return kinds


def made_up_model(
    config: ModelConfig, dtype: mx.Dtype, *, layers_per_kind: int, seed: int = 0
) -> DiffusionGemma:
    """Return a model with a few layers of each kind, packed to 4 bits, fused as after loading.
    Packed values are drawn directly: the weights never exist unpacked.

    Args:
      config: of the wanted shape.
      dtype: of everything that is not packed, and of the computation.
      layers_per_kind: how many; they share their experts, and all else differs.
      seed: of all values.
    """
    kinds = [layer for layer, _ in kinds_of_layers(config).values()]
    layers = [layer for layer in kinds for _ in range(layers_per_kind)]
    model = DiffusionGemma(with_layers(config, *layers))  # lazy: no weight is computed
    nn.quantize(model, group_size=GROUP_SIZE, bits=BITS)
    for i, layer in enumerate(model.layers):
        layer.experts = model.layers[i - i % layers_per_kind].experts
    keys = iter(mx.random.split(mx.random.key(seed), 4096))
    for module in _distinct_modules(model):
        _fill(module, dtype, keys)
    fuse(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def _distinct_modules(model: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for module in model.modules():
        if id(module) not in seen:
            seen.add(id(module))
            yield module


def _fill(module: nn.Module, dtype: mx.Dtype, keys: Iterator[mx.array]) -> None:
    """Give a module's own arrays values: of a packed product up to 1 / sqrt(inputs), of a norm or a
    scale 1."""
    arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
    if "scales" not in arrays:
        for name, value in arrays.items():
            module[name] = mx.ones(value.shape, dtype)
        return
    largest = (arrays["scales"].shape[-1] * GROUP_SIZE) ** -0.5
    shape = arrays["weight"].shape
    # MLX draws integers by way of floats, of 24 bits.
    high, low = (
        mx.random.randint(0, 1 << 16, shape, dtype=mx.uint32, key=next(keys)) for _ in range(2)
    )
    spread = mx.random.uniform(0.9, 1.1, arrays["scales"].shape, key=next(keys))
    module["weight"] = (high << 16) | low
    module["scales"] = (spread * (2 * largest / (2**BITS - 1))).astype(mx.bfloat16)
    module["biases"] = mx.full(arrays["biases"].shape, -largest, mx.bfloat16)
    mx.eval(module.parameters())  # one module's at a time
