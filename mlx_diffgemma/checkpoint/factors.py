"""The factors and the scale that an adapter adds to one module's weights, in mlx-lm's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import SourceError
from .headers import FLOATS, TensorInfo, read_header

# Path of a module that takes an adapter -> shape of its weights, unpacked.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's factors: of a linear module a [inputs, r] and b [r, outputs]; of experts a [E,
    r, inputs] and b [E, outputs, r]."""

    a: mx.array
    b: mx.array
    scale: float

    @property
    def is_whole(self) -> bool:
        """Whether both have the same rank and the same number of experts."""
        if self.a.ndim != self.b.ndim or self.a.ndim not in (2, 3):
            return False
        if self.a.ndim == 2:
            return self.a.shape[1] == self.b.shape[0]
        return self.a.shape[:2] == (self.b.shape[0], self.b.shape[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the adapted weights: [outputs, inputs] or [E, outputs, inputs]."""
        if self.a.ndim == 2:
            return self.b.shape[1], self.a.shape[0]
        return self.b.shape[0], self.b.shape[1], self.a.shape[2]

    def added_to(self, weight: mx.array) -> mx.array:
        """Return float32 weights plus the scaled product of the factors."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        return weight + ((self.scale * b) @ a if a.ndim == 3 else (self.scale * b.T) @ a.T)

    def equals(self, other: Factors) -> bool:
        """Return whether both are equal, bit by bit."""
        if self.scale != other.scale:
            return False
        pairs = ((self.a, other.a), (self.b, other.b))
        return all(a.shape == b.shape and mx.array_equal(a, b).item() for a, b in pairs)


def read_float_header(file: Path) -> dict[str, TensorInfo]:
    """Read the header of a file that holds only float tensors.

    Raises:
      SourceError: if there is none, or a tensor has another type.
    """
    if not file.is_file():
        raise SourceError(f"{file} is missing")
    tensors = read_header(file)
    if not tensors:
        raise SourceError(f"{file} holds no tensors")
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise SourceError(
                f"{file}: {name} has type {info.dtype}, expected {' or '.join(sorted(FLOATS))}"
            )
    return tensors


def check_fit(factors: Mapping[str, Factors], shapes: Shapes, file: Path) -> None:
    """Check that every pair of factors fits its module's weights. Ranks may differ.

    Raises:
      SourceError: if a pair does not.
    """
    for path, own in factors.items():
        if path not in shapes:
            raise SourceError(
                f"{file}: {path} is not a module here that takes an adapter; "
                "was it made for another model?"
            )
        given = f"factors of shapes {list(own.a.shape)} and {list(own.b.shape)}"
        if not own.is_whole:
            raise SourceError(f"{file}: {path} has {given}, which do not belong together")
        if own.shape != shapes[path]:
            raise SourceError(
                f"{file}: {path} has {given}, which do not fit its weights of "
                f"{list(shapes[path])}; was it made for another model?"
            )
