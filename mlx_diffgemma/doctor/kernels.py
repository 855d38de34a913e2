"""Checks of norms, activations and other compiled functions. Each is called with several shapes, as
a compiled function might answer with its first trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from ..denoise.sampler import scaled_logits
from ..model.layers import RMSNorm, geglu, unit_rms
from .device import TYPES, Given, computed, given, relative, tolerance
from .exact import drawn, rms_norm, softmax
from .exact import geglu as exact_geglu
from .outcome import Check

PART = "compiled kernels"
_STALE = "a compiled function that answers with its first trace or shape (mlx issue 3201)"
_M, _EPS = 2816, 1e-6
_SHAPES = ((3, _M), (1, 7, _M), (3, _M))  # the last has the first's shape and other values
_VOCABULARY = 262_144


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    functions: dict[str, Callable[[mx.Dtype], float]] = {
        "geglu": _geglu,
        "norm without a scale": _unit_rms,
        "norm": _norm,
        "residual and norm": _residual,
        "softcap and temperature": _softcap,
    }
    for name, function in functions.items():
        for type_name, dtype in TYPES.items():
            yield Check(
                f"{name}, {type_name}",
                PART,
                tolerance(dtype),
                _STALE,
                f"computing in {type_name}; MLX_DISABLE_COMPILE=1 goes without compiled functions",
                partial(function, dtype),
            )
    yield Check(
        "norm, squares above float16's range",
        PART,
        tolerance(mx.float16),
        "squares summed in float16, which overflow to infinity",
        "float16; use bfloat16",
        _large_norm,
    )
    for type_name, dtype in TYPES.items():
        yield Check(
            f"softmax over {_VOCABULARY:,} columns, {type_name}",
            PART,
            tolerance(dtype),
            "softmax that adds up in 16 bits, where a sum of small shares stands still",
            f"computing in {type_name}",
            partial(_softmax, dtype),
        )


def _drawn(dtype: mx.Dtype, seed: int, scale: float = 1.0) -> list[Given]:
    return [drawn(seed + i, shape, dtype, scale) for i, shape in enumerate(_SHAPES)]


def _worst(
    device: Callable[..., mx.array], right: Callable[..., np.ndarray], *operands: list[Given]
) -> float:
    """Return the largest difference over calls with other shapes and values."""
    calls = list(zip(*operands, strict=True))
    found = computed(lambda: [device(*(g.array for g in call)) for call in calls])
    return float(
        np.max(
            [
                relative(out, right(*(g.exact for g in call)))
                for out, call in zip(found, calls, strict=True)
            ]
        )
    )


def _geglu(dtype: mx.Dtype) -> float:
    return _worst(geglu, exact_geglu, _drawn(dtype, 50, 2.0), _drawn(dtype, 60))


def _unit_rms(dtype: mx.Dtype) -> float:
    return _worst(
        lambda x: unit_rms(x, _EPS), lambda x: rms_norm(x, 1.0, _EPS), _drawn(dtype, 70, 3.0)
    )


def _scaled_norm(dtype: mx.Dtype) -> tuple[RMSNorm, np.ndarray]:
    norm, weight = RMSNorm(_M, eps=_EPS), given(np.linspace(0.5, 1.5, _M), dtype)
    norm.weight = weight.array
    return norm, weight.exact


def _norm(dtype: mx.Dtype) -> float:
    norm, weight = _scaled_norm(dtype)
    return _worst(norm, lambda x: rms_norm(x, weight, _EPS), _drawn(dtype, 80, 3.0))


def _residual(dtype: mx.Dtype) -> float:
    norm, weight = _scaled_norm(dtype)
    return _worst(
        norm.added_to,
        lambda residual, x: residual + rms_norm(x, weight, _EPS),
        _drawn(dtype, 90),
        _drawn(dtype, 100, 3.0),
    )


def _softcap(dtype: mx.Dtype) -> float:
    """Cap at 30 and divide by a temperature that is another one in each call."""
    outputs = _drawn(dtype, 110, 20.0)
    heats = [given(np.array(heat), mx.float32) for heat in (0.8, 0.6, 0.4)]
    return _worst(
        lambda x, heat: scaled_logits(x, heat, 30.0),
        lambda x, heat: 30 * np.tanh(x / 30) / heat,
        outputs,
        heats,
    )


def _large_norm() -> float:
    norm, weight = _scaled_norm(mx.float16)
    return _worst(norm, lambda x: rms_norm(x, weight, _EPS), _drawn(mx.float16, 120, 2000.0))


def _softmax(dtype: mx.Dtype) -> float:
    x = drawn(130, (2, _VOCABULARY), dtype)
    (found,) = computed(lambda: mx.softmax(x.array, axis=-1, precise=True))
    return relative(found, softmax(x.exact))
