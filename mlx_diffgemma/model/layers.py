"""Parts that several blocks use: norms, gated activation, feed-forward. Elementwise work is
compiled, short chains without shapes, which never costs a new trace."""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from .backend import compiled, compiled_per_shape, is_training
from .elementary import tanh
from .products import linear


def unit_rms(x: mx.array, eps: float) -> mx.array:
    """Return the RMS norm without a learned scale, in float32, rounded once. [..., M] -> [...,
    M]."""
    return _unit_rms(x, eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm with a learned scale: all of it in float32, rounded once, as in the reference."""

    def __call__(self, x: mx.array) -> mx.array:
        return _rms(x, self.weight, self.eps)

    def added_to(self, residual: mx.array, x: mx.array) -> mx.array:
        """Return residual + norm(x)."""
        return _add_rms(residual, x, self.weight, self.eps)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gelu(gate) * up with the tanh approximation (`gelu_pytorch_tanh`), rounded once before
    *."""
    return cast(mx.array, _trained_geglu(gate, up)) if is_training() else _geglu(gate, up)


def softcap(outputs: mx.array, cap: float) -> mx.array:
    """Return cap * tanh(outputs / cap), float32. MLX's tanh everywhere: a longer chain of
    operations would be split into several kernels, with arrays of the size of the logits between
    them."""
    return mx.tanh(outputs.astype(mx.float32) / cap) * cap


def geglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, ...]:
    """Return the gradients of geglu for the gate and for `up`."""
    return _geglu_gradients(gate, up, cotangent)


class MLP(nn.Module):
    """Gated feed-forward block, the dense one of every layer and that of self-conditioning."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:  # `fused.py` made one product of two
            gate, up = mx.split(linear(self.gate_up_proj, x), 2, axis=-1)
        else:
            gate, up = linear(self.gate_proj, x), linear(self.up_proj, x)
        return linear(self.down_proj, geglu(gate, up))


@compiled
def _unit_rms(x: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, None, eps)


@compiled
def _rms(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return _exact_rms(x, weight, eps)


@compiled
def _add_rms(residual: mx.array, x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return residual + _exact_rms(x, weight, eps)


@compiled_per_shape
def _geglu(gate: mx.array, up: mx.array) -> mx.array:
    x = gate.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return (0.5 * x * (1 + tanh(inner))).astype(gate.dtype) * up


@mx.custom_function
def _trained_geglu(gate: mx.array, up: mx.array) -> mx.array:
    return _geglu(gate, up)


@_trained_geglu.vjp
def _trained_geglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    """Return the gradients in two kernels; MLX would differentiate each operation of the tanh."""
    return geglu_gradients(*primals, cotangent)


@compiled_per_shape
def _geglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, ...]:
    x, y, passed = (a.astype(mx.float32) for a in (gate, up, cotangent))
    root = math.sqrt(2 / math.pi)
    curve = tanh(root * (x + 0.044715 * (x * x * x)))
    inner = root * (1 + 3 * 0.044715 * (x * x))
    slope = 0.5 * (1 + curve) + 0.5 * x * (1 - curve * curve) * inner
    to_gate, to_up = passed * y * slope, passed * (0.5 * x * (1 + curve))
    return to_gate.astype(gate.dtype), to_up.astype(up.dtype)


def _exact_rms(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    wide = mx.fast.rms_norm(x.astype(mx.float32), weight.astype(mx.float32), eps)
    return wide.astype(x.dtype)
