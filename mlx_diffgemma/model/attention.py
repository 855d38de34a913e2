"""Attention of one layer, for committed tokens and for the canvas alike: the mask tells the two
apart."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import LayerConfig, TextConfig
from .context import LayerContext
from .layers import RMSNorm, unit_rms
from .masks import Mask
from .rope import periods, rotate


class Attention(nn.Module):
    """Queries over [context, own] keys. Reads a context, never writes it; the caller keeps the
    keys it wants."""

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
        self, x: mx.array, past: LayerContext | None, mask: Mask, position: int | mx.array
    ) -> tuple[mx.array, LayerContext]:
        """Attends from x [B, L, M]; `position` is that of its first token.

        Returns:
          The output [B, L, M], and the keys and values that were seen, [B, K, S + L, H].
        """
        B, L, _ = x.shape
        k = self.k_proj(x).reshape(B, L, self.kv_heads, self.head_dim)
        # Values are the raw projection: the key's norm and rotation come after, the value has its
        # own norm.
        v = self.v_proj(x).reshape(k.shape) if "v_proj" in self else k
        q = self.q_norm(self.q_proj(x).reshape(B, L, self.heads, self.head_dim)).swapaxes(
            1, 2
        )  # [B, N, L, H]
        k = self.k_norm(k).swapaxes(1, 2)  # [B, K, L, H]
        v = unit_rms(v, self.eps).swapaxes(1, 2)
        q = rotate(q, position, self._periods)
        k = rotate(k, position, self._periods)
        seen = LayerContext(k, v) if past is None else LayerContext(*past.join(k, v))
        # Scale 1: queries and keys are normalised, so there is no 1/sqrt(H).
        out = mx.fast.scaled_dot_product_attention(q, seen.keys, seen.values, scale=1.0, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1)), seen
