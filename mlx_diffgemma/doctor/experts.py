"""Checks of the grouped products of experts, of the layer around them and of the router."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.quantization import Quantization
from ..model.experts import Experts, Router
from ..model.switch_linear import QuantizedSwitchLinear, SwitchLinear
from .device import TYPES, affordable, computed, given, has_plain_experts, relative, tolerance
from .exact import PACKINGS, PUBLISHED, Packed, drawn, geglu, name_of, packed, rms_norm, softmax
from .outcome import Check
from .random_models import random_config

PART = "expert products"
_EXPERTS, _OUTPUTS = 4, 128
# The widths of the published model's experts, and one that is no multiple of 64.
_WIDTHS = (704, 2816)
_RAGGED = 352
# Enough rows per expert for MLX's sorted kernels, tiles that several experts share, and one expert
# that nobody chose.
_SORTED = np.repeat(np.arange(_EXPERTS, dtype=np.uint32), (17, 0, 1, 18))
_UNSORTED = np.array([3, 0, 2, 2, 0, 3, 1, 0, 3, 1], np.uint32)
_LONG = 32_802  # rows; more than an int16 counts, and not a multiple of 64


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for packing in PACKINGS:
        yield _grouped(packing, "bfloat16", 384 if packing.group_size == 128 else 704, True)
    yield from (
        _grouped(packing, type_name, width, is_sorted)
        for type_name, dtype in TYPES.items()
        for packing in affordable(PUBLISHED, dtype)
        for width, is_sorted in itertools.product(_WIDTHS, (True, False))
        if (type_name, width, is_sorted) != ("bfloat16", 704, True)  # above already
    )
    for packing in (p for p in PACKINGS if p.group_size <= 32):
        yield _grouped(packing, "bfloat16", _RAGGED, True)
    yield Check(
        "packed experts that are a view of a larger array",
        PART,
        tolerance(mx.bfloat16, packed_terms=704),
        "sorted gather_qmm that misreads sliced weights (mlx issue 4055) or reads zeros (gmlx)",
        "packed checkpoints, before a new version of mlx",
        _sliced,
    )
    yield Check(
        f"packed experts, sorted, {_LONG:,} rows",
        PART,
        tolerance(mx.bfloat16, packed_terms=64),
        "rows beyond 32,768 that M5's sorted gather_qmm spoilt (mlx issue 3856)",
        "prompts read more than 4,000 tokens at a time: --prefill-step-size 2048 or less",
        _long,
    )
    for type_name, dtype in TYPES.items():
        if has_plain_experts(dtype):
            for width in _WIDTHS:
                for is_sorted in (True, False):
                    yield _plain(type_name, width, is_sorted)
            yield _layer(None, type_name)
        yield _layer(Quantization(64, 4), type_name)
        yield _router(type_name)


def _order(is_sorted: bool) -> str:
    return "sorted" if is_sorted else "unsorted"


def _grouped(packing: Quantization, type_name: str, width: int, is_sorted: bool) -> Check:
    words, dtype = name_of(packing), TYPES[type_name]
    return Check(
        f"packed experts, {words}, {type_name}, {width} wide, {_order(is_sorted)}",
        PART,
        tolerance(dtype, packed_terms=width),
        "sorted gather_qmm, wrong on M5 where the width is no multiple of 64 (mlx issue 3887)"
        if is_sorted
        else "unsorted gather_qmm, which reads one expert's weights for another",
        f"experts packed as {words}, computed in {type_name}",
        partial(_packed_experts, packing, dtype, width, is_sorted),
    )


def _plain(type_name: str, width: int, is_sorted: bool) -> Check:
    dtype = TYPES[type_name]
    return Check(
        f"plain experts, {type_name}, {width} wide, {_order(is_sorted)}",
        PART,
        tolerance(dtype),
        "sorted gather_mm, wrong for rows with an axis put in (mlx issue 4253)"
        if is_sorted
        else "unsorted gather_mm, which reads one expert's weights for another",
        f"experts that are not packed, computed in {type_name}",
        partial(_plain_experts, dtype, width, is_sorted),
    )


def _multiplied(
    x: mx.array, weights: Packed, packing: Quantization, pairs: np.ndarray, is_sorted: bool
) -> mx.array:
    return mx.gather_qmm(
        x[:, None],
        weights.weight,
        weights.scales,
        weights.biases,
        rhs_indices=mx.array(pairs),
        transpose=True,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        sorted_indices=is_sorted,
    )[:, 0]


def _by_pair(x: np.ndarray, weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return x[i] @ weights[pairs[i]].T for every row."""
    out = np.empty((len(x), weights.shape[1]))
    for expert in np.unique(pairs):
        out[pairs == expert] = x[pairs == expert] @ weights[expert].T
    return out


def _packed_experts(packing: Quantization, dtype: mx.Dtype, width: int, is_sorted: bool) -> float:
    pairs = _SORTED if is_sorted else _UNSORTED
    weights = packed(packing, (_EXPERTS, _OUTPUTS, width), dtype, 11)
    x = drawn(12, (len(pairs), width), dtype)
    (found,) = computed(lambda: _multiplied(x.array, weights, packing, pairs, is_sorted))
    return relative(found, _by_pair(x.exact, weights.exact, pairs))


def _sliced() -> float:
    packing = Quantization(64, 4)
    whole = packed(packing, (_EXPERTS + 3, 2 * _OUTPUTS, 704), mx.bfloat16, 13)
    x = drawn(14, (len(_SORTED), 704), mx.bfloat16)
    here = np.s_[2 : 2 + _EXPERTS, _OUTPUTS:]

    def build() -> mx.array:
        assert whole.biases is not None
        view = Packed(whole.weight[here], whole.scales[here], whole.biases[here], whole.exact)
        return _multiplied(x.array, view, packing, _SORTED, True)

    (found,) = computed(build)
    return relative(found, _by_pair(x.exact, whole.exact[here], _SORTED))


def _long() -> float:
    packing = Quantization(32, 4)
    pairs = np.sort(np.random.default_rng(15).integers(0, _EXPERTS, _LONG).astype(np.uint32))
    weights = packed(packing, (_EXPERTS, 32, 64), mx.bfloat16, 15)
    x = drawn(16, (_LONG, 64), mx.bfloat16)
    (found,) = computed(lambda: _multiplied(x.array, weights, packing, pairs, True))
    return relative(found, _by_pair(x.exact, weights.exact, pairs))


def _plain_experts(dtype: mx.Dtype, width: int, is_sorted: bool) -> float:
    pairs = _SORTED if is_sorted else _UNSORTED
    weights = drawn(21, (_EXPERTS, _OUTPUTS, width), dtype)
    x = drawn(22, (len(pairs), width), dtype)
    (found,) = computed(
        lambda: mx.gather_mm(
            x.array[:, None],
            weights.array.swapaxes(1, 2),
            rhs_indices=mx.array(pairs),
            sorted_indices=is_sorted,
        )[:, 0]
    )
    return relative(found, _by_pair(x.exact, weights.exact, pairs))


# The layer around the products: pairs are sorted, multiplied twice, put back in order and added up.
_M, _F, _CHOSEN = 256, 192, 2


def _layer(packing: Quantization | None, type_name: str) -> Check:
    dtype = TYPES[type_name]
    words = "plain" if packing is None else name_of(packing)
    # Two products and an activation after each other.
    terms = 0 if packing is None else _M
    return Check(
        f"expert layer, {words}, {type_name}",
        PART,
        3 * tolerance(dtype, packed_terms=terms),
        "rows that are not put back in their tokens' order, and sums that leave an expert out",
        f"computing in {type_name}",
        partial(_layer_difference, packing, dtype),
    )


def _layer_difference(packing: Quantization | None, dtype: mx.Dtype) -> float:
    config = random_config(hidden_size=_M, experts=_EXPERTS, chosen=_CHOSEN, expert_size=_F).text
    layer = Experts(config)
    shapes = {"gate_up_proj": (_EXPERTS, 2 * _F, _M), "down_proj": (_EXPERTS, _M, _F)}
    exact = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if packing is None:
            weights = drawn(23 + i, shape, dtype, shape[-1] ** -0.5)
            layer[name].weight, exact[name] = weights.array, weights.exact
        else:
            layer[name], exact[name] = _packed_module(layer[name], packing, shape, dtype, 23 + i)
    rng = np.random.default_rng(25)
    # Many tokens are sorted by expert, few are not.
    inputs = []
    for tokens in (40, 3):
        chosen = np.stack([rng.permutation(_EXPERTS)[:_CHOSEN] for _ in range(tokens)])
        weights = given(rng.uniform(0.2, 1, chosen.shape), mx.float32)
        inputs.append((drawn(26 + tokens, (tokens, _M), dtype), chosen, weights))
    found = computed(lambda: [layer(x.array, mx.array(c), w.array) for x, c, w in inputs])
    differences = [
        relative(out, _mixed(x.exact, c, w.exact, exact))
        for out, (x, c, w) in zip(found, inputs, strict=True)
    ]
    return float(np.max(differences))


def _packed_module(
    plain: SwitchLinear, packing: Quantization, shape: tuple[int, ...], dtype: mx.Dtype, seed: int
) -> tuple[nn.Module, np.ndarray]:
    weights = packed(packing, shape, dtype, seed)
    module = plain.to_quantized(packing.group_size, packing.bits, packing.mode)
    assert isinstance(module, QuantizedSwitchLinear)
    module.weight, module.scales, module.biases = weights.weight, weights.scales, weights.biases
    scale = shape[-1] ** -0.5
    assert weights.biases is not None  # affine: both are linear in the weights
    module.scales, module.biases = weights.scales * scale, weights.biases * scale
    mx.eval(module.parameters())
    return module, weights.exact * scale


def _mixed(
    x: np.ndarray, chosen: np.ndarray, weights: np.ndarray, exact: dict[str, np.ndarray]
) -> np.ndarray:
    """Return the weighted sum of the chosen experts' outputs."""
    out = np.zeros_like(x)
    for column in range(chosen.shape[1]):
        pairs = chosen[:, column]
        gate, up = np.split(_by_pair(x, exact["gate_up_proj"], pairs), 2, axis=-1)
        down = _by_pair(geglu(gate, up), exact["down_proj"], pairs)
        out += weights[:, column : column + 1] * down
    return out


def _router(type_name: str) -> Check:
    dtype = TYPES[type_name]
    return Check(
        f"router, {type_name}",
        PART,
        # Rounded to the type: the normed input, its product with the scale, and the logits.
        3 * tolerance(dtype),
        "experts that are not the likeliest, although no near tie, and weights that are not the "
        "softmax of the chosen logits",
        f"computing in {type_name}",
        partial(_router_difference, dtype),
    )


def _router_difference(dtype: mx.Dtype) -> float:
    """Return how far a chosen logit is below one that should have been chosen, relative to the
    largest: near ties, which rounding may flip, count as little as they matter."""
    config = random_config(hidden_size=_M, experts=32, chosen=4, expert_size=_F).text
    router = Router(config)
    proj, scale = drawn(31, (32, _M), dtype), given(np.linspace(0.5, 1.5, _M), dtype)
    each = given(np.linspace(0.5, 2, 32), mx.float32)
    router.proj.weight, router.scale, router.per_expert_scale = proj.array, scale.array, each.array
    x = drawn(32, (64, _M), dtype, 5.0)
    chosen, weights = computed(lambda: router(x.array))
    normed = rms_norm(x.exact, scale.exact * _M**-0.5, config.rms_norm_eps)
    logits = normed @ proj.exact.T
    taken = np.take_along_axis(logits, chosen, axis=-1)
    best = np.sort(logits, axis=-1)[:, -4:]
    # Each expert only once, or the sums would differ.
    lost = np.abs(np.sort(taken, axis=-1) - best).max() / np.abs(logits).max()
    twice = any(len(set(row)) < len(row) for row in chosen.tolist())
    right = softmax(taken) * each.exact[chosen]
    return float(np.max([lost, relative(weights, right), float(twice)]))
