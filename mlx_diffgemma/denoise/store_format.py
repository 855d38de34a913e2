"""The bytes of a file of contexts: a safetensors file whose arrays are bits, since numpy has no
bfloat16. Knows no folder."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of keys and values in a file."""

    name: str
    exponent: int  # its bits


TYPES = {
    mx.float32: FileType("F32", 0x7F800000),
    mx.float16: FileType("F16", 0x7C00),
    mx.bfloat16: FileType("BF16", 0x7F80),
}
_BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2", "I32": "<i4"}


Arrays = dict[str, tuple[str, np.ndarray]]  # name -> type in the file, bits of the values


class RefusedError(Exception):
    """A file that is not what its name says."""


def content_hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]


def bits_of(array: mx.array) -> np.ndarray:
    """Return a copy of an array's values as unsigned numbers of the same size: numpy has no
    bfloat16."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    return np.array(array.view(unsigned), order="C")


def are_finite(arrays: Arrays) -> bool:
    """Return whether all numbers are finite: the exponents of others have all bits set."""
    exponents = {kind.name: kind.exponent for kind in TYPES.values()}
    return not any(
        ((bits & exponents[type_]) == exponents[type_]).any()
        for type_, bits in arrays.values()
        if type_ in exponents
    )


def header_of(metadata: Mapping[str, str], arrays: Arrays) -> bytes:
    """Return the header of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (type_, bits) in arrays.items():
        stop = start + bits.nbytes
        entries[name] = {"dtype": type_, "shape": bits.shape, "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def parsed(raw: bytes) -> tuple[Any, Arrays]:
    """Return the metadata and arrays of a safetensors file."""
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        metadata, arrays = entries.pop("__metadata__"), {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            data = memoryview(raw)[8 + length :][start:stop]
            bits = np.frombuffer(data, _BITS[entry["dtype"]]).reshape(entry["shape"])
            arrays[name] = entry["dtype"], bits
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"it is no safetensors file of contexts ({error})") from error
    return metadata, arrays
