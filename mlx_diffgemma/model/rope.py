"""Rotary position embedding: pairs (i, i + H/2), over the whole head or over its first part."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..config import RopeConfig


def periods(rope: RopeConfig, head_dim: int) -> mx.array:
    """Positions per radian of each pair, float32 [H/2]; infinite where a pair does not rotate.

    "proportional" rotates the first `partial_rotary_factor` of the pairs, and its exponents still
    run over the whole
    head: theta^(2i/H), not over the rotating part.

    Source: transformers 5.23, modeling_rope_utils.py, _compute_proportional_rope_parameters.
    """
    rotating = int(rope.partial_rotary_factor * head_dim // 2)
    out = np.full(head_dim // 2, np.inf, np.float32)
    exponents = np.arange(0, 2 * rotating, 2, dtype=np.float32) / np.float32(head_dim)
    out[:rotating] = np.float32(rope.rope_theta) ** exponents
    return mx.array(out)


def rotate(x: mx.array, position: int | mx.array, periods: mx.array) -> mx.array:
    """Rotates [B, heads, S, H]; `position` is that of the first token, one for all rows or int32
    [B]."""
    return mx.fast.rope(
        x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=position, freqs=periods
    )
