"""Small parts that more than one block uses: norm without weights, gated activation,
feed-forward."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def unit_rms(x: mx.array, eps: float) -> mx.array:
    """RMS norm without a learned scale, in float32 inside, rounded once. [..., M] -> [..., M]."""
    return mx.fast.rms_norm(x, None, eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm with a learned scale: all of it in float32, rounded once, as in the reference."""

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation (`gelu_pytorch_tanh`), rounded once before *."""
    return nn.gelu_approx(gate.astype(mx.float32)).astype(gate.dtype) * up


class MLP(nn.Module):
    """Gated feed-forward block, the dense one of every layer."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))
