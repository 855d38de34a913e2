"""Attention of one layer, for committed tokens and for the canvas; only the masks differ."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..config.model import LayerConfig, TextConfig
from .backend import is_cpu
from .context import LayerContext
from .elementary import exp_below_zero
from .layers import RMSNorm, unit_rms
from .masks import Mask
from .products import linear
from .rope import rotate

# Earlier keys and values, own ones [B, K, L, H] -> all that queries may attend to, [B, K, S + L,
# H], and what is kept.
Place = Callable[[LayerContext | None, mx.array, mx.array], tuple[LayerContext, LayerContext]]


class Attention(nn.Module):
    """Attention of queries to the context's keys and their own. The caller decides where own keys
    are stored."""

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
        self._rope = config.rope[layer.type]

    def __call__(
        self,
        x: mx.array,
        past: LayerContext | None,
        place: Place,
        mask: Mask,
        position: int | mx.array,
    ) -> tuple[mx.array, LayerContext]:
        """Attend from x [B, L, M]; `position` is that of its first token.

        Returns:
          The output [B, L, M], and what `place` keeps.
        """
        B, L, _ = x.shape
        N, K, H = self.heads, self.kv_heads, self.head_dim
        # All heads are normalised and rotated at once. Values are the raw projection (in full
        # layers that of the keys), without the keys' norm and rotation.
        normed = unit_rms(self._project(x).reshape(B, L, -1, H).astype(mx.float32), self.eps)
        scale = self.qk_scale if "qk_scale" in self else self.norm_scale()
        rotating = (normed[:, :, : N + K] * scale).astype(x.dtype)
        rotating = rotate(rotating.swapaxes(1, 2), position, self._rope)  # [B, N + K, L, H]
        values = normed[:, :, -K:].astype(x.dtype).swapaxes(1, 2)  # [B, K, L, H]
        seen, kept = place(past, rotating[:, N:], values)
        out = attend(rotating[:, :N], seen, mask)
        return linear(self.o_proj, out.swapaxes(1, 2).reshape(B, L, -1)), kept

    def norm_scale(self) -> mx.array:
        """Return the learned scales of the norms of queries and keys, per head: [N + K, H]."""
        shapes = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim))
        weights = (self.q_norm.weight, self.k_norm.weight)
        return mx.concatenate([mx.broadcast_to(w, s) for w, s in zip(weights, shapes, strict=True)])

    def _project(self, x: mx.array) -> mx.array:
        """Return the heads of queries, keys and, in sliding layers, values: [B, L, (N + K or N +
        2K) * H]."""
        if "qkv_proj" in self:  # `fused.py` made one product of three
            return linear(self.qkv_proj, x)
        names = [name for name in ("q_proj", "k_proj", "v_proj") if name in self]
        return mx.concatenate([linear(self[name], x) for name in names], axis=-1)


def attend(queries: mx.array, seen: LayerContext, mask: Mask) -> mx.array:
    """Return softmax(q k) v, [B, N, L, H]. The scale is 1: queries and keys are normalised, so
    there is no 1/sqrt(H)."""
    if not is_cpu() or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(
            queries, seen.keys, seen.values, scale=1.0, mask=mask
        )
    B, N, L, H = queries.shape
    _, K, S, _ = seen.keys.shape
    grouped = queries.reshape(B, K, N // K * L, H)  # queries that share their keys
    scores = (grouped @ seen.keys.swapaxes(2, 3)).reshape(B, N, L, S)
    if mask is not None:
        allowed = mx.arange(S) <= mx.arange(S - L, S)[:, None] if mask == "causal" else mask
        scores = mx.where(allowed, scores, -mx.inf)
    # No gradient through the largest score: it cancels.
    weights = exp_below_zero(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    return (weights.reshape(B, K, -1, S) @ seen.values).reshape(B, N, L, H) / total
