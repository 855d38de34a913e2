"""Attention of one layer, for committed tokens and for the canvas alike: the mask tells the two
apart."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..config import LayerConfig, TextConfig
from .context import LayerContext
from .layers import RMSNorm, unit_rms
from .masks import Mask
from .products import linear
from .rope import periods, rotate

# Own keys and values [B, K, L, H] -> all that may be seen, [B, K, S + L, H], and what is kept.
Place = Callable[[mx.array, mx.array], tuple[LayerContext, LayerContext]]


class Attention(nn.Module):
    """Queries over the context's keys and their own. Where own keys go is the caller's business."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        M, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            layer.num_key_value_heads,
            layer.head_dim,
        )
        self.heads, self.kv_heads, self.head_dim, self.eps = N, K, H, config.rms_norm_eps
        self.q_proj = nn.Linear(M, N * H, bias=False)
        self.k_proj = nn.Linear(M, K * H, bias=False)
        if layer.is_sliding:  # full layers take their values from the key projection
            self.v_proj = nn.Linear(M, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, M, bias=False)
        self.q_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(H, eps=config.rms_norm_eps)
        self._periods = periods(config.rope[layer.type], H)

    def __call__(
        self, x: mx.array, place: Place, mask: Mask, position: int | mx.array
    ) -> tuple[mx.array, LayerContext]:
        """Attends from x [B, L, M]; `position` is that of its first token.

        Returns:
          The output [B, L, M], and what `place` wants kept.
        """
        B, L, _ = x.shape
        N, K, H = self.heads, self.kv_heads, self.head_dim
        # All heads are normalised and rotated at once. Values are the raw projection, in full
        # layers the keys': the key's norm and rotation are its own.
        normed = unit_rms(self._project(x).reshape(B, L, -1, H).astype(mx.float32), self.eps)
        scale = self.qk_scale if "qk_scale" in self else self.norm_scale()
        rotating = (normed[:, :, : N + K] * scale).astype(x.dtype)
        rotating = rotate(rotating.swapaxes(1, 2), position, self._periods)  # [B, N + K, L, H]
        values = normed[:, :, -K:].astype(x.dtype).swapaxes(1, 2)  # [B, K, L, H]
        seen, kept = place(rotating[:, N:], values)
        # Scale 1: queries and keys are normalised, so there is no 1/sqrt(H).
        out = mx.fast.scaled_dot_product_attention(
            rotating[:, :N], seen.keys, seen.values, scale=1.0, mask=mask
        )
        return linear(self.o_proj, out.swapaxes(1, 2).reshape(B, L, -1)), kept

    def norm_scale(self) -> mx.array:
        """The learned scales of the norms of queries and keys, head by head: [N + K, H]."""
        shapes = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim))
        weights = (self.q_norm.weight, self.k_norm.weight)
        return mx.concatenate([mx.broadcast_to(w, s) for w, s in zip(weights, shapes, strict=True)])

    def _project(self, x: mx.array) -> mx.array:
        """Heads of queries, keys and, in sliding layers, values: [B, L, (N + K or N + 2K) * H]."""
        if "qkv_proj" in self:  # `fused.py` made one product of three
            return linear(self.qkv_proj, x)
        names = [name for name in ("q_proj", "k_proj", "v_proj") if name in self]
        return mx.concatenate([linear(self[name], x) for name in names], axis=-1)
