"""Checks of writes in place: a canvas written behind a context must change no snapshot of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from ..model.context import Context, LayerContext, OpenContext
from .device import TYPES, computed, given, share
from .exact import drawn
from .outcome import Check

PART = "writes in place"
_AVOID = "several answers from one context: batches, fills and edits"
_TEXT, _CANVAS = 37, 12


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for type_name, dtype in TYPES.items():
        yield Check(
            f"a snapshot stays as it was, {type_name}",
            PART,
            0.0,
            "a slice update that reuses memory that something else refers to",
            _AVOID,
            partial(_snapshot, dtype),
        )
        yield Check(
            f"steps write one after another, {type_name}",
            PART,
            0.0,
            "a slice update at a wrong place (mlx PRs 1827 and 3483)",
            "this version of mlx",
            partial(_steps, dtype),
        )
    yield Check(
        "rows that share a context are written apart",
        PART,
        0.0,
        "a slice update of a broadcast array that writes all rows into one",
        _AVOID,
        _shared_rows,
    )
    yield Check(
        "columns written by index",
        PART,
        0.0,
        "scatter and put_along_axis at a wrong place (mlx PR 1122)",
        "--self-conditioning sparse, and this version of mlx",
        _by_index,
    )


def _layer(dtype: mx.Dtype) -> tuple[LayerContext, np.ndarray, np.ndarray]:
    """Return an open layer and what it holds."""
    keys = drawn(150, (2, 2, _TEXT + _CANVAS, 64), dtype)
    values = drawn(151, (2, 2, _TEXT + _CANVAS, 64), dtype)
    return LayerContext(keys.array, values.array), keys.exact, values.exact


def _snapshot(dtype: mx.Dtype) -> float:
    """Write two canvases over the same snapshot; all three must hold their own values."""
    layer, keys, values = _layer(dtype)
    canvases = [drawn(152 + i, (2, 2, _CANVAS, 64), dtype) for i in range(2)]

    def build() -> list[mx.array]:
        written = []
        for canvas in canvases:
            new = layer.written(_TEXT, canvas.array, -canvas.array)
            mx.eval(new.keys, new.values)
            written.append(new)
        return [a for kept in (layer, *written) for a in (kept.keys, kept.values)]

    right = [keys, values]
    for canvas in canvases:
        right += [_over(keys, canvas.exact), _over(values, -canvas.exact)]
    return _differing(computed(build), right)


def _steps(dtype: mx.Dtype) -> float:
    """Write several canvases, keeping only the last, as a denoising loop does."""
    layer, keys, values = _layer(dtype)
    canvases = [drawn(160 + i, (2, 2, _CANVAS - i, 64), dtype) for i in range(4)]

    def build() -> list[mx.array]:
        # A copy, so that its memory may be written.
        last = LayerContext(layer.keys + 0, layer.values + 0)
        for canvas in canvases:
            last = last.written(_TEXT, canvas.array, -canvas.array)
            mx.eval(last.keys, last.values)
        return [last.keys, last.values, last.first(_TEXT).keys]

    for canvas in canvases:
        keys, values = _over(keys, canvas.exact), _over(values, -canvas.exact)
    return _differing(computed(build), [keys, values, keys[:, :, :_TEXT]])


def _shared_rows() -> float:
    """Open one row's context for three rows, and write another canvas in each."""
    text = drawn(170, (1, 2, _TEXT, 64), mx.float32)
    canvas = drawn(171, (3, 2, _CANVAS, 64), mx.float32)
    context = Context((LayerContext(text.array, text.array),), _TEXT, 1)

    def build() -> list[mx.array]:
        own = [canvas.array[row : row + 1] for row in range(3)]
        opened = [OpenContext.of(context, _CANVAS).layers[0] for _ in own]
        behind = [
            layer.written(_TEXT, keys, keys).keys for layer, keys in zip(opened, own, strict=True)
        ]
        over = [context.layers[0].written(0, keys, keys).values for keys in own]
        return [mx.concatenate(behind), mx.concatenate(over), *context.arrays]

    rows = np.repeat(text.exact, 3, axis=0)
    behind = np.concatenate([rows, canvas.exact], axis=2)
    over = np.concatenate([canvas.exact, rows[:, :, _CANVAS:]], axis=2)
    return _differing(computed(build), [behind, over, text.exact, text.exact])


def _by_index() -> float:
    rng = np.random.default_rng(180)
    order = rng.permutation(500).astype(np.uint32)
    columns = np.stack([rng.permutation(300)[:40] for _ in range(6)]).astype(np.uint32)
    table, values = drawn(181, (6, 300), mx.float32), given(rng.normal(size=(6, 40)), mx.float32)

    def build() -> list[mx.array]:
        inverse = mx.zeros(500, mx.uint32)
        inverse[mx.array(order)] = mx.arange(500, dtype=mx.uint32)
        put = mx.put_along_axis(table.array, mx.array(columns), values.array, axis=1)
        return [inverse, put, table.array]

    right = table.exact.copy()
    np.put_along_axis(right, columns, values.exact, axis=1)
    return _differing(computed(build), [np.argsort(order), right, table.exact])


def _over(text: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Return a copy of a layer's array with a canvas behind the text."""
    out = text.copy()
    out[:, :, _TEXT : _TEXT + canvas.shape[2]] = canvas
    return out


def _differing(found: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Return the share of values that are not equal, in the worst array."""
    return max(share(a != b) for a, b in zip(found, right, strict=True))
