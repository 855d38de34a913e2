"""Rotary position embedding: pairs (i, i + H/2), over the whole head or over its first part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate

import mlx.core as mx
import numpy as np

from ..config.model import RopeConfig
from .backend import compiled, is_cpu

_BLOCK = 256  # positions

# The first position, one for all rows of a batch or int32 [B], and the number of places.
Run = tuple[int | mx.array, int]


@cache
def periods(rope: RopeConfig, head_dim: int) -> mx.array:
    """Return the positions per radian of each pair, float32 [H/2]; infinite where a pair does not
    rotate.

    "proportional" rotates the first `partial_rotary_factor` of the pairs, and its exponents still
    run over the whole
    head: theta^(2i/H), not over the rotating part.

    Source: transformers 5.23, modeling_rope_utils.py, _compute_proportional_rope_parameters.
    """
    rotating = int(rope.partial_rotary_factor * head_dim // 2)
    out = np.full(head_dim // 2, np.inf, np.float32)
    exponents = np.arange(0, 2 * rotating, 2, dtype=np.float32) / np.float32(head_dim)
    out[:rotating] = np.float32(rope.rope_theta) ** exponents
    table = mx.array(out)
    mx.eval(table)
    return table


def rotate(x: mx.array, runs: Sequence[Run], rope: RopeConfig) -> list[mx.array]:
    """Rotate [B, heads, T, H], whose places are runs of neighbouring positions, and return each
    run's part."""
    H = x.shape[-1]
    if not is_cpu():
        return [
            mx.fast.rope(
                part,
                H,
                traditional=False,
                base=None,
                scale=1.0,
                offset=position,
                freqs=periods(rope, H),
            )
            for part, (position, _) in zip(_parts(x, runs), runs, strict=True)
        ]
    # There MLX recomputes sines and cosines in every layer. Here layers of a kind share them.
    (position, count), *others = runs
    if isinstance(position, int):
        cosines, sines = _table(rope, H, tuple(runs))
    else:  # in training
        assert not others
        cosines, sines = _waves(rope, H, position[:, None, None, None], count)
    first, second = mx.split(x, 2, axis=-1)
    swapped = mx.concatenate([second, first], axis=-1)
    return _parts(turned(x, swapped, cosines, sines), runs)


def _parts(x: mx.array, runs: Sequence[Run]) -> list[mx.array]:
    if len(runs) == 1:
        return [x]
    ends = list(accumulate(count for _, count in runs))
    return list(mx.split(x, ends[:-1], axis=2))


# Two kinds of layers, for the canvases of some rows and for the tokens that they read.
@lru_cache(maxsize=32)
def _table(rope: RopeConfig, head_dim: int, runs: tuple[Run, ...]) -> tuple[mx.array, mx.array]:
    """Return the waves of some runs, cut from blocks, since runs begin anywhere."""
    pieces = []
    for start, count in runs:
        for number in range(start // _BLOCK, -(-(start + count) // _BLOCK)):
            first = number * _BLOCK
            inside = slice(max(start - first, 0), start + count - first)
            pieces.append([wave[inside] for wave in _block(rope, head_dim, number)])
    cosines, sines = (mx.concatenate(list(parts), axis=0) for parts in zip(*pieces, strict=True))
    return cosines, sines


@lru_cache(maxsize=32)
def _block(rope: RopeConfig, head_dim: int, number: int) -> tuple[mx.array, mx.array]:
    waves = _waves(rope, head_dim, mx.array(number * _BLOCK), _BLOCK)
    mx.eval(waves)
    return waves


def _waves(
    rope: RopeConfig, head_dim: int, position: mx.array, count: int
) -> tuple[mx.array, mx.array]:
    """Return cosines and sines for both halves of a head, with negative sines for the first half:
    float32 [..., count, H], for positions [..., 1, 1]."""
    places = (mx.arange(count)[:, None] + position).astype(mx.float32)
    angles = places * (1 / periods(rope, head_dim))
    cosines, sines = mx.cos(angles), mx.sin(angles)
    return (
        mx.concatenate([cosines, cosines], axis=-1),
        mx.concatenate([-sines, sines], axis=-1),
    )


@compiled
def turned(x: mx.array, swapped: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Return x * cosines + swapped * sines; `swapped` has the other number of each pair."""
    # Sines and products are rounded to the model's type, as in the reference.
    return x * cosines.astype(x.dtype) + swapped * sines.astype(x.dtype)
