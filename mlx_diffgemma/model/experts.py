"""The mixture of experts: a router that picks k of E experts per token, and their weights in
three-dimensional arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config.model import TextConfig
from .backend import compiled_per_shape, is_cpu, is_training
from .layers import geglu, geglu_gradients, unit_rms
from .products import expert_matrix, linear
from .switch_linear import SwitchLinear

# From this many (token, expert) pairs on, they are sorted by expert: MLX's sorted kernels read
# each expert once.
SORT_FROM_PAIRS = 64
# On the CPU backend, from this many multiplications per pair on, a product per expert saves more
# than waiting for the router costs.
_PRODUCT_PER_EXPERT_FROM = 1 << 16
# Up to this many per token for all experts together, computing all of them is cheaper than
# choosing.
_ALL_UP_TO = 1 << 20


class Router(nn.Module):
    """Chooses experts from the raw residual stream, which no learned norm precedes, and normalises
    it itself."""

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
        """Map x [T, M] to expert indices [T, k] and their weights, float32 [T, k]."""
        scaled = unit_rms(x, self.eps) * self.scale * self.root
        logits = linear(self.proj, scaled).astype(mx.float32)  # [T, E]
        chosen = mx.argpartition(logits, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        if is_training():  # the choice itself has no derivative
            chosen = mx.stop_gradient(chosen)
        # A softmax over the chosen logits equals one over all of them, renormalised.
        weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
        return chosen, weights * self.per_expert_scale[chosen]


class Experts(nn.Module):
    """Gated feed-forward blocks, one per expert; rows 0 .. F-1 of `gate_up_proj` are the gate."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, M, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = SwitchLinear(M, 2 * F, E)
        self.down_proj = SwitchLinear(F, M, E)
        self.count, self.multiplications = E, 3 * M * F

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Map x [T, M], chosen [T, k], weights float32 [T, k] to the weighted sum [T, M], added up
        in float32."""
        T, k = chosen.shape
        is_large = self.multiplications >= _PRODUCT_PER_EXPERT_FROM
        if is_cpu() and is_large and not is_training():
            out = self._product_per_expert(x, chosen)
        elif is_cpu() and self._are_cheap_together(x):
            return self._all_at_once(x, chosen, weights)
        else:
            out = self._grouped_products(x, chosen)
        return _weighted_sum(out.reshape(T, k, -1), weights).astype(x.dtype)

    def _grouped_products(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Return the chosen experts' outputs for every token, [T * k, M], by MLX's grouped
        products."""
        k = chosen.shape[1]
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
            back = mx.zeros_like(order)
            back[order] = mx.arange(order.size, dtype=order.dtype)
            out = out[back]
        return out

    def _product_per_expert(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Return the same by one dense product per chosen expert. The host must know each one's
        number of rows, so this waits for the router: for the CPU backend only."""
        pairs = np.array(chosen).flatten()
        order = np.argsort(pairs, kind="stable")
        ends = np.cumsum(np.bincount(pairs, minlength=self.count)).tolist()
        groups = [
            (expert, start, end)
            for expert, (start, end) in enumerate(pairwise([0, *ends]))
            if end > start
        ]
        rows = x[mx.array(order // chosen.shape[1])]  # [T * k, M]
        out = []
        for expert, start, end in groups:
            gate, up = mx.split(
                rows[start:end] @ expert_matrix(self.gate_up_proj, expert).T, 2, axis=-1
            )
            out.append(geglu(gate, up) @ expert_matrix(self.down_proj, expert).T)
            mx.eval(out[-1])  # one expert's unpacked weights at a time
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        return mx.concatenate(out)[mx.array(back)]

    def _are_cheap_together(self, x: mx.array) -> bool:
        """Return whether all experts' products for all tokens cost less than one call per pair."""
        parts = (self.gate_up_proj, self.down_proj)
        plain = all(type(p) is SwitchLinear and p.weight.dtype == x.dtype for p in parts)
        return plain and x.dtype == mx.float32 and self.count * self.multiplications <= _ALL_UP_TO

    def _all_at_once(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Return the weighted sum [T, M] of every expert's output for every token, with weight 0
        for those not chosen: for small experts on the CPU backend, which calls the BLAS for each
        pair."""
        T, E = x.shape[0], self.count
        dense = mx.put_along_axis(mx.zeros((T, E)), chosen, weights, axis=1)
        out = (x @ self.gate_up_proj.weight.flatten(0, 1).T).reshape(T, E, -1)
        geglu_of = _trained_weighted_geglu if is_training() else _weighted_geglu
        gate, up = mx.split(out, 2, axis=-1)
        weighted = cast(mx.array, geglu_of(gate, up, dense[..., None]))  # [T, E, F]
        return (weighted.swapaxes(0, 1) @ self.down_proj.weight.swapaxes(1, 2)).sum(axis=0)


@compiled_per_shape
def _weighted_sum(out: mx.array, weights: mx.array) -> mx.array:
    """Map out [T, k, M], weights float32 [T, k] to float32 [T, M]. One kernel adds in pairs, so
    that no product of the size of `out` is written."""
    terms = [out[:, i].astype(mx.float32) * weights[:, i : i + 1] for i in range(out.shape[1])]
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


@compiled_per_shape
def _weighted_geglu(gate: mx.array, up: mx.array, weights: mx.array) -> mx.array:
    """Return weighted geglu, exactly 0 where the weight is 0, even if that expert's output is not
    finite."""
    return mx.where(weights == 0, 0.0, geglu(gate, up) * weights)


@mx.custom_function
def _trained_weighted_geglu(gate: mx.array, up: mx.array, weights: mx.array) -> mx.array:
    return _weighted_geglu(gate, up, weights)


@_trained_weighted_geglu.vjp
def _trained_weighted_geglu_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    gate, up, weights = primals
    to_gate, to_up = geglu_gradients(gate, up, cotangent * weights)
    to_weights = (cotangent * _geglu_again(gate, up)).sum(axis=-1, keepdims=True)
    return to_gate, to_up, to_weights


@compiled_per_shape
def _geglu_again(gate: mx.array, up: mx.array) -> mx.array:
    return geglu(gate, up)
