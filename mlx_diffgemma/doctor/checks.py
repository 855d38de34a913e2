"""The checks of this machine's results. Placeholder: the other branch's replaces it."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np

from .outcome import Check


def all_checks() -> list[Check]:
    """Return all checks, in the order in which they run."""
    return [
        Check(
            f"packed product, groups of {group}",
            "packed products",
            1e-4,
            "wrong products with packed weights",
            f"4-bit weights in groups of {group}",
            partial(_packed, group),
        )
        for group in (32, 64, 128)
    ] + [
        Check(
            "argpartition",
            "selection",
            0.0,
            "wrong places of the largest values",
            "top_candidates and sparse self-conditioning",
            _partition,
        )
    ]


def _packed(group: int) -> float:
    x, w = mx.random.normal((16, 256), key=mx.random.key(1)), mx.random.normal((64, 256))
    packed = mx.quantize(w, group_size=group, bits=4)
    found = mx.quantized_matmul(x, *packed, group_size=group, bits=4)
    exact = np.array(x) @ np.array(mx.dequantize(*packed, group_size=group, bits=4)).T
    return float(np.abs(np.array(found) - exact).max() / np.abs(exact).max())


def _partition() -> float:
    x = mx.random.normal((4, 5000), key=mx.random.key(2))
    found = np.sort(np.array(mx.argpartition(x, kth=-8, axis=-1)[:, -8:]), axis=-1)
    return float((found != np.sort(np.argsort(np.array(x), axis=-1)[:, -8:], axis=-1)).sum())
