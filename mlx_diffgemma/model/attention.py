"""Attention of one layer, for committed tokens and for the canvas; only the masks differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config.model import LayerConfig, TextConfig
from .backend import is_cpu, is_training
from .context import LayerContext
from .elementary import exp_below_zero
from .layers import RMSNorm, unit_rms
from .masks import Mask
from .products import linear
from .rope import rotate

# Earlier keys and values, own ones [B, K, L, H] -> all that queries may attend to, in one part or
# several, and what is kept.
Place = Callable[
    [LayerContext | None, mx.array, mx.array], tuple[tuple[LayerContext, ...], LayerContext]
]

_SCORES = 1 << 22  # of them at a time, 16 MiB in float32, and at least those of a head


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Columns of a forward pass that attend to one context and to each other."""

    count: int  # columns
    past: LayerContext | None
    place: Place
    mask: Mask
    position: int | mx.array  # of the first column


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
        self, x: mx.array, segments: Sequence[Segment]
    ) -> tuple[mx.array, list[LayerContext]]:
        """Attend from x [B, T, M], whose columns are those of the segments, one behind another.
        Rows of a batch, which training uses, share one segment.

        Returns:
          The output [B, T, M], and what each segment's `place` keeps.
        """
        B, T, _ = x.shape
        N, K, H = self.heads, self.kv_heads, self.head_dim
        # All heads are normalised and scaled at once. Values are the raw projection (in full
        # layers that of the keys), without the keys' norm and rotation.
        normed = unit_rms(self._project(x).reshape(B, T, -1, H).astype(mx.float32), self.eps)
        scale = self.qk_scale if "qk_scale" in self else self.norm_scale()
        rotating = (normed[:, :, : N + K] * scale).astype(x.dtype).swapaxes(1, 2)
        runs = [(segment.position, segment.count) for segment in segments]
        turned = rotate(rotating, runs, self._rope)  # [B, N + K, L, H] of each segment
        values = normed[:, :, -K:].astype(x.dtype).swapaxes(1, 2)  # [B, K, T, H]
        outputs, kept, start = [], [], 0
        for segment, heads in zip(segments, turned, strict=True):
            stop = start + segment.count
            own = values if segment.count == T else values[:, :, start:stop]
            seen, keep = segment.place(segment.past, heads[:, N:], own)
            outputs.append(attend(heads[:, :N], seen, segment.mask))  # [B, N, L, H]
            kept.append(keep)
            start = stop
        joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
        joined = joined.swapaxes(1, 2).reshape(B, T, -1)
        return linear(self.o_proj, joined), kept

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


def attend(queries: mx.array, seen: Sequence[LayerContext], mask: Mask) -> mx.array:
    """Return softmax(q k) v, [B, N, L, H], over keys in one part, or in several without a mask.
    The scale is 1: queries and keys are normalised, so there is no 1/sqrt(H)."""
    if len(seen) == 1 and (not is_cpu() or queries.dtype != mx.float32):
        return mx.fast.scaled_dot_product_attention(
            queries, seen[0].keys, seen[0].values, scale=1.0, mask=mask
        )
    B, N, L, H = queries.shape
    K = seen[0].keys.shape[1]
    keys = sum(part.keys.shape[2] for part in seen)
    most = _SCORES // (B * L * keys)
    if most < N and N > 1 and is_cpu() and not is_training():
        return _by_heads(queries, seen, mask, max(1, most))
    grouped = queries.reshape(B, K, N // K * L, H)  # queries that share their keys
    parts = [grouped @ part.keys.swapaxes(2, 3) for part in seen]
    scores = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    S = scores.shape[-1]
    scores = scores.reshape(B, N, L, S)
    if mask is not None:
        allowed = mx.arange(S) <= mx.arange(S - L, S)[:, None] if mask == "causal" else mask
        scores = mx.where(allowed, scores, -mx.inf)
    if queries.dtype != mx.float32:  # parts on a GPU
        weights, total = mx.softmax(scores, axis=-1, precise=True), None
    else:  # no gradient through the largest score: it cancels
        largest = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = exp_below_zero(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
    weights, out, start = weights.reshape(B, K, -1, S), mx.zeros(()), 0
    for i, part in enumerate(seen):
        own = weights if len(seen) == 1 else weights[..., start : start + part.keys.shape[2]]
        mixed = own @ part.values
        out, start = mixed if i == 0 else out + mixed, start + part.keys.shape[2]
    out = out.reshape(B, N, L, H)
    return out if total is None else out / total


def _by_heads(queries: mx.array, seen: Sequence[LayerContext], mask: Mask, most: int) -> mx.array:
    """Return what `attend` does, for at most so many heads at a time, which share their keys: for
    the memory of their scores, of which several copies are held."""
    heads, kv_heads = queries.shape[1], seen[0].keys.shape[1]
    group = heads // kv_heads
    size = next(n for n in range(min(most, group), 0, -1) if group % n == 0)
    outputs = []
    for start in range(0, heads, size):
        own = start // group
        parts = [
            LayerContext(part.keys[:, own : own + 1], part.values[:, own : own + 1])
            for part in seen
        ]
        outputs.append(attend(queries[:, start : start + size], parts, mask))
        mx.eval(outputs[-1])  # or memory is given out for all of them before the first is done
    return mx.concatenate(outputs, axis=1)
