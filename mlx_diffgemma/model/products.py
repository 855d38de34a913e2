"""Products with weights that may be packed. The CPU backend unpacks packed weights to float32 slice
by slice; elsewhere MLX's kernels multiply them packed."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from .backend import is_cpu
from .switch_linear import QuantizedSwitchLinear, SwitchLinear

# Of unpacked weights at a time: large enough for the BLAS, small enough that several in flight take
# little memory.
SLICE_BYTES = 32 << 20

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding


def linear(module: nn.Module, x: mx.array) -> mx.array:
    """Return x @ W.T for a linear module: [..., inputs] -> [..., outputs]."""
    if is_cpu() and isinstance(module, nn.QuantizedLinear):
        return _times_rows(x, module)
    if "lora_a" in module:  # mlx-lm's LoRALinear, around a module that may be packed
        z = (module.dropout(x) @ module.lora_a) @ module.lora_b
        return linear(module.linear, x) + (module.scale * z).astype(x.dtype)
    return module(x)


def head(table: nn.Module, x: mx.array) -> mx.array:
    """Return x @ E.T for the embedding table: [B, L, M] -> [B, L, V]."""
    if is_cpu() and isinstance(table, nn.QuantizedEmbedding):
        return _times_rows(x, table)
    return table.as_linear(x)


def weighted_rows(table: nn.Module, weights: mx.array) -> mx.array:
    """Return weights @ E, the weighted sum of the table's rows: [B, L, V] -> [B, L, M]."""
    if not isinstance(table, nn.QuantizedEmbedding):
        return weights @ table.weight
    if is_cpu():
        total = mx.zeros((), weights.dtype)
        for start, rows in _slices(table):
            total = total + weights[..., start : start + rows.shape[0]] @ rows
            if rows.shape[0] < table.weight.shape[0]:
                mx.eval(total)  # or every slice would be unpacked before the first is used
        return total
    return mx.quantized_matmul(
        weights,
        table.weight,
        table.scales,
        table.get("biases"),
        transpose=False,
        group_size=table.group_size,
        bits=table.bits,
        mode=table.mode,  # another mode than the table's own gives wrong values without an error
    )


def expert_matrix(module: nn.Module, expert: int) -> mx.array:
    """Return the weights of one expert, [outputs, inputs], unpacked to float32 if they are
    packed."""
    if "lora_a" in module:
        delta = (module.scale * module.lora_b[expert]) @ module.lora_a[expert]
        return expert_matrix(module.linear, expert) + delta
    if not isinstance(module, QuantizedSwitchLinear):
        return module.weight[expert]
    return _unpack(module, slice(expert, expert + 1))[0]


def unpacked(module: nn.Module) -> nn.Module:
    """Return a plain module with a packed linear module's weights in float32, as this file
    multiplies them."""
    weight = _unpack(module, slice(None))
    plain: nn.Module
    if isinstance(module, QuantizedSwitchLinear):
        experts, outputs, inputs = weight.shape
        plain = SwitchLinear(inputs, outputs, experts)
    else:
        outputs, inputs = weight.shape
        plain = nn.Linear(inputs, outputs, bias=False)
    plain.weight = weight
    return plain


def _times_rows(x: mx.array, module: Packed) -> mx.array:
    parts = []
    for _, rows in _slices(module):
        parts.append(x @ rows.T)
        if rows.shape[0] < module.weight.shape[0]:
            mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _slices(module: Packed) -> Iterator[tuple[int, mx.array]]:
    """Yield (first row, some rows unpacked to float32) for all of the weights."""
    outputs = module.weight.shape[0]
    inputs = module.scales.shape[-1] * module.group_size
    step = max(1, SLICE_BYTES // (4 * inputs))
    for start in range(0, outputs, step):
        yield start, _unpack(module, slice(start, start + step))


def _unpack(module: nn.Module, rows: slice) -> mx.array:
    scales, biases = module.scales[rows], module.get("biases")
    if biases is not None:  # bfloat16 would round the weights; other modes' scales are codes
        scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
    return mx.dequantize(
        module.weight[rows],
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        dtype=mx.float32,
    )
