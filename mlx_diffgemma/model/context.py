"""Keys and values of committed tokens. A value: extending returns a new one, so keeping an old one
is a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True, eq=False)
class LayerContext:
    """Keys and values of one layer, [B, K, kept, H]. Sliding layers keep the last `sliding_window
    - 1` places."""

    keys: mx.array
    values: mx.array

    def join(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """These and the ones given, along the places."""
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate(
            [self.values, values], axis=2
        )


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What the model has read. Places count the padding on the left, positions do not."""

    layers: tuple[LayerContext, ...]
    length: int  # places so far
    batch: int
    padding: mx.array | None = (
        None  # int32 [B], places on the left without a token; None where no row has any
    )

    @property
    def position(self) -> int | mx.array:
        """Position of the next token: one for all rows, or int32 [B]."""
        return self.length if self.padding is None else self.length - self.padding

    @property
    def arrays(self) -> list[mx.array]:
        """Everything to evaluate."""
        return [array for layer in self.layers for array in (layer.keys, layer.values)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)
