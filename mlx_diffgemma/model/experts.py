"""The mixture of experts: a router that picks k of E per token, and the experts' weights in
three-dimensional arrays."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from ..config import TextConfig
from .layers import geglu, unit_rms

# From this many (token, expert) pairs on, they are sorted by expert: MLX's sorted kernels read
# each expert once.
SORT_FROM_PAIRS = 64


class Router(nn.Module):
    """Reads the residual stream itself, un-normed by any learned norm, and normalises it on its
    own."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.top_k, self.eps, self.root = (
            config.top_k_experts,
            config.rms_norm_eps,
            config.hidden_size**-0.5,
        )

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [T, M] -> expert indices [T, k] and their weights, float32 [T, k]."""
        logits = self.proj(unit_rms(x, self.eps) * self.scale * self.root).astype(
            mx.float32
        )  # [T, E]
        chosen = mx.argpartition(logits, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        # A softmax over the chosen logits equals one over all of them, renormalised.
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return chosen, weights * self.per_expert_scale[chosen]


class Experts(nn.Module):
    """Gated feed-forward blocks, one per expert; rows 0 .. F-1 of `gate_up_proj` are the gate."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, M, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = SwitchLinear(M, 2 * F, E, bias=False)
        self.down_proj = SwitchLinear(F, M, E, bias=False)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x [T, M], chosen [T, k], weights float32 [T, k] -> the weighted sum [T, M], added up in
        float32."""
        T, k = chosen.shape
        pairs = chosen.flatten()  # [T * k]
        is_sorted = pairs.size >= SORT_FROM_PAIRS
        if is_sorted:
            order = mx.argsort(pairs)
            rows, pairs = x[order // k], pairs[order]
        else:
            rows = mx.repeat(x, k, axis=0)
        gate, up = mx.split(
            self.gate_up_proj(rows[:, None], pairs, sorted_indices=is_sorted), 2, axis=-1
        )
        out = self.down_proj(geglu(gate, up), pairs, sorted_indices=is_sorted)[:, 0]  # [T * k, M]
        if is_sorted:
            out = out[mx.argsort(order)]
        out = out.reshape(T, k, -1).astype(mx.float32) * weights[..., None]
        return out.sum(axis=1).astype(x.dtype)
