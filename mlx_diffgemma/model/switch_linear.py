"""Linear layers of experts, in three-dimensional arrays: each row of the input goes through the
layer of the expert that is named for it.

mlx-lm has such layers under the same names, for all its models. They are not used, since mlx-lm
imports transformers, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _Experts(nn.Module):
    """What both layers have."""

    def to_lora(self, **arguments: Any) -> nn.Module:
        """Return the layer with mlx-lm's adapter around it; mlx-lm calls this."""
        from mlx_lm.tuner.lora import LoRASwitchLinear  # imports transformers

        return LoRASwitchLinear.from_base(self, **arguments)

    @property
    def num_experts(self) -> int:
        return int(self.weight.shape[0])

    @property
    def output_dims(self) -> int:
        return int(self.weight.shape[1])


class SwitchLinear(_Experts):
    """Plain weights [E, outputs, inputs], without a bias."""

    def __init__(self, inputs: int, outputs: int, experts: int) -> None:
        super().__init__()
        limit = inputs**-0.5
        self.weight = mx.random.uniform(-limit, limit, (experts, outputs, inputs))

    @property
    def input_dims(self) -> int:
        return int(self.weight.shape[2])

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x [..., 1, inputs] and each row's expert to [..., 1, outputs]."""
        return mx.gather_mm(
            x, self.weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=sorted_indices
        )

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine"
    ) -> QuantizedSwitchLinear:
        """Return the layer with packed weights; mlx calls this."""
        return QuantizedSwitchLinear(self.weight, group_size, bits, mode)


class QuantizedSwitchLinear(_Experts):
    """Packed weights, which are not trained."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        self.biases = biases[0] if biases else None
        self.freeze()

    @property
    def input_dims(self) -> int:
        return int(self.scales.shape[2] * self.group_size)

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x [..., 1, inputs] and each row's expert to [..., 1, outputs]."""
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
