"""Checks of attention at the published head sizes, with every kind of mask, and of the rotary
position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from ..config.model import RopeConfig
from ..model.attention import attend
from ..model.context import LayerContext
from ..model.masks import Mask, canvas_mask, causal_mask
from ..model.rope import rotate
from .device import TYPES, computed, given, relative, tolerance
from .exact import attention, drawn, rotated
from .outcome import Check

PART = "attention"
_HEADS = {256: 2, 512: 1}  # head size -> heads of keys and values; four heads of queries
_KEYS = 72
_QUERIES = (40, 3)  # many and few take different kernels
_PADDING = np.array([0, 9], np.int32)
_MASKS = {
    "no mask": "kernels that are chosen by head size and length (mlx PRs 3842 and 4459)",
    "causal": "a causal mask that is not aligned with the last key (mlx issue 2835)",
    "padded": "masked keys that still count (mlx issues 2626 and 3897)",
    "window": "masks that are read for another row or column (mlx issue 2626, PR 4416)",
}
_ROPES = {
    256: RopeConfig("default", rope_theta=1e4, partial_rotary_factor=1.0),
    512: RopeConfig("proportional", rope_theta=1e6, partial_rotary_factor=0.25),
}


def checks() -> Iterator[Check]:
    """Yield the checks of this file."""
    for type_name, dtype in TYPES.items():
        for size in _HEADS:
            for mask, looks_for in _MASKS.items():
                yield Check(
                    f"attention, heads of {size}, {mask}, {type_name}",
                    PART,
                    # Scores up to 12 are rounded before the exponential: to the type by kernels
                    # that are not fused, to TF32 by matrix units.
                    3 * tolerance(dtype),
                    looks_for,
                    f"computing in {type_name}",
                    partial(_attention, dtype, size, mask),
                )
            yield Check(
                f"attention, heads of {size}, scores near 200, {type_name}",
                PART,
                # Scores are whole numbers that every type holds, but kernels may round queries
                # after a factor of log2(e).
                3 * tolerance(dtype),
                "exponentials of scores whose maximum is not subtracted: infinity, then NaN "
                "(mlx issue 2096)",
                f"computing in {type_name}",
                partial(_large_scores, dtype, size),
            )
            yield Check(
                f"attention, heads of {size}, keys in a larger buffer, {type_name}",
                PART,
                3 * tolerance(dtype),
                "keys and values that are a view of an open context, read with the wrong stride",
                f"computing in {type_name}",
                partial(_view, dtype, size),
            )
            yield Check(
                f"rope, heads of {size}, {type_name}",
                PART,
                # Sines of angles up to 600, which float32 holds to 2^-14.
                2 * tolerance(dtype),
                "rope that is wrong from a batch's second row on, for single tokens (mlx issue "
                "3494), and pairs that are not half a head apart",
                f"computing in {type_name}",
                partial(_rope, dtype, size),
            )


def _drawn(
    dtype: mx.Dtype, size: int, queries: int
) -> tuple[tuple[mx.array, mx.array, mx.array], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return queries, keys and values for scores of deviation 3."""
    scale = (3 / size**0.5) ** 0.5
    q = drawn(41, (2, 4, queries, size), dtype, scale)
    k = drawn(42, (2, _HEADS[size], _KEYS, size), dtype, scale)
    v = drawn(43, (2, _HEADS[size], _KEYS, size), dtype)
    return (q.array, k.array, v.array), (q.exact, k.exact, v.exact)


def _mask(kind: str, queries: int) -> Mask:
    """Return a mask as the model makes it."""
    start = _KEYS - queries
    if kind == "padded":
        return canvas_mask(_KEYS, first_key=0, padding=mx.array(_PADDING))
    if kind == "window":
        return causal_mask(start, queries, first_key=0, window=24, padding=mx.array(_PADDING))
    return "causal" if kind == "causal" else None


def _allowed(kind: str, queries: int) -> np.ndarray:
    """Return the same mask from its definition, [B, 1, queries, keys]."""
    allowed = np.ones((2, 1, queries, _KEYS), bool)
    for row, padding in enumerate(_PADDING):
        for i in range(queries):
            query = _KEYS - queries + i
            for key in range(_KEYS):
                allowed[row, 0, i, key] = {
                    "no mask": True,
                    "causal": key <= query,
                    "padded": key >= padding,
                    "window": key == query or max(padding, query - 23) <= key < query,
                }[kind]
    return allowed


def _attention(dtype: mx.Dtype, size: int, mask: str) -> float:
    cases = [(queries, *_drawn(dtype, size, queries)) for queries in _QUERIES]
    found = computed(
        lambda: [attend(q, [LayerContext(k, v)], _mask(mask, n)) for n, (q, k, v), _ in cases]
    )
    differences = [
        relative(out, attention(*exact, _allowed(mask, queries)))
        for out, (queries, _, exact) in zip(found, cases, strict=True)
    ]
    return float(np.max(differences))


def _large_scores(dtype: mx.Dtype, size: int) -> float:
    """Let each key's score be a whole number from 192 to 200, which every type holds exactly."""
    rng = np.random.default_rng(44)
    keys = np.zeros((1, 1, _KEYS, size))
    keys[..., 0], keys[..., 1] = 16, rng.integers(0, 9, _KEYS)
    queries = np.zeros((1, 4, 20, size))
    queries[..., 0], queries[..., 1] = 12, 1
    q, k = given(queries, dtype), given(keys, dtype)
    v = drawn(45, (1, 1, _KEYS, size), dtype)
    (found,) = computed(lambda: attend(q.array, [LayerContext(k.array, v.array)], None))
    return relative(found, attention(q.exact, k.exact, v.exact, None))


def _view(dtype: mx.Dtype, size: int) -> float:
    (q, k, v), exact = _drawn(dtype, size, 40)
    (found,) = computed(lambda: attend(q, [LayerContext(k, v).with_room(30).first(_KEYS)], None))
    return relative(found, attention(*exact, None))


def _rope(dtype: mx.Dtype, size: int) -> float:
    """Rotate rows of one and of several tokens, from one position and from one of each row."""
    rope = _ROPES[size]
    pairs = np.arange(size // 2)
    turning = pairs < rope.partial_rotary_factor * size / 2
    periods = np.where(turning, rope.rope_theta ** (2.0 * pairs / size), np.inf)
    cases = [
        (drawn(46, (2, 3, tokens, size), dtype), np.array(starts, np.int32))
        for tokens, starts in ((1, (600, 600)), (1, (17, 600)), (9, (3, 3)), (9, (0, 311)))
    ]

    def turn(x: mx.array, starts: np.ndarray) -> mx.array:
        is_one = starts[0] == starts[1]
        position = int(starts[0]) if is_one else mx.array(starts)
        (turned,) = rotate(x, [(position, x.shape[2])], rope)
        return turned

    found = computed(lambda: [turn(x.array, starts) for x, starts in cases])
    differences = [
        relative(out, rotated(x.exact, starts[:, None] + np.arange(x.exact.shape[2]), periods))
        for out, (x, starts) in zip(found, cases, strict=True)
    ]
    return float(np.max(differences))
