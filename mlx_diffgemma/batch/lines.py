"""The lines of an input file: JSON objects, of which some may be broken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not empty."""

    number: int  # of the line in the file, from 1
    content: bytes

    def object(self) -> dict[str, Any]:
        """Return its JSON object.

        Raises:
          DataError: if it is none.
        """
        try:
            value = json.loads(self.content.decode("utf-8-sig"), parse_constant=_refuse)
        except RecursionError:
            raise DataError(f"line {self.number} is nested too deep") from None
        except ValueError as error:  # of JSON, or not UTF-8
            raise DataError(f"line {self.number} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"line {self.number} is no JSON object")
        return value


def lines_of(file: Path) -> Iterator[Line]:
    """Yield the lines of a file.

    Raises:
      DataError: if it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            for number, content in enumerate(opened, 1):
                if content.strip():
                    yield Line(number, content)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a file is, and a digest of it."""

    nbytes: int
    sha256: str
    lines: int = 0  # that are not empty

    def begins(self, file: Path) -> bool:
        """Return whether a file begins with what this was made from."""
        return extent_of(file, self.nbytes).sha256 == self.sha256


def extent_of(file: Path, most: int | None = None) -> Extent:
    """Return the extent of a file, or of its first bytes.

    Raises:
      DataError: if it cannot be read.
    """
    digest, left, count = hashlib.sha256(), most, 0
    try:
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE if left is None else min(_PIECE, left)):
                digest.update(piece)
                count += len(piece)
                left = None if left is None else left - len(piece)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    lines = sum(1 for _ in lines_of(file)) if most is None else 0
    return Extent(count, digest.hexdigest(), lines)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
