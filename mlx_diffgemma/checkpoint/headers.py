"""Headers of safetensors files: names, types, shapes and positions of tensors, without their data.
Imports no mlx.

Source of the format: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.reading import read_json
from ..errors import WeightsError
from .files import SIDECAR, other_things

INDEX = "model.safetensors.index.json"
# bits per element
TYPES = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
FLOATS = frozenset({"BF16", "F16", "F32"})
_SAMPLE = 4096  # bytes
HEADER_LIMIT = 100_000_000  # as in the safetensors library


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor in a file, with its type and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file.

    Raises:
      WeightsError: if the file is truncated, or its header is damaged or has wrong sizes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise WeightsError(
                    f"{path} is truncated: {size} bytes are too few for a safetensors file"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, HEADER_LIMIT):
                raise WeightsError(
                    f"{path} is truncated or not a safetensors file: its header claims "
                    f"{length:,} bytes, "
                    f"{size - 8:,} follow"
                )
            raw = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless digits or nesting
        raise WeightsError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: the safetensors header is damaged: it is not a JSON object")
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null if it has no metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: the safetensors header is damaged: __metadata__ is not text")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in raw.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise WeightsError(
                f"{path}: the header lies: {name} begins at byte {info.start:,}, expected {end:,}"
            )
        end += info.nbytes
    if end != size:
        word = "truncated" if size < end else "longer than its header says"
        raise WeightsError(f"{path} is {word}: it has {size:,} bytes, its header describes {end:,}")
    return tensors


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint: one file, or shards with an index. Pickle files are never
    opened.

    Raises:
      WeightsError: if a shard is missing, or shards and index disagree.
    """
    index_path = folder / INDEX
    if index_path.is_file():
        listed = read_json(index_path).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(v, str) and re.fullmatch(r"[^/\\]+\.safetensors", v) for v in listed.values()
        ):
            raise WeightsError(
                f"{index_path}: weight_map is missing, or maps to something else than names of "
                "safetensors files"
            )
        files = sorted(set(listed.values()))
    else:
        listed = None
        files = sorted(path.name for path in folder.glob("model*.safetensors"))
        files = _all_of_a_set(folder, files)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise WeightsError(f"{folder} lacks {len(missing)} of {len(files)} weight files: {names}")
    if not files:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        found = other_things(there) or next(
            (f"{name} has another name" for name in there if name.endswith(".safetensors")), None
        )
        raise WeightsError(f"{folder} has no model*.safetensors{f': {found}' if found else ''}")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for tensor, info in read_header(folder / name).items():
            if tensor in tensors:
                raise WeightsError(
                    f"{tensor} is in {tensors[tensor].file.name} and again in {name}"
                )
            tensors[tensor] = info
    if listed is not None:
        for tensor, name in listed.items():
            if tensor not in tensors or tensors[tensor].file.name != name:
                raise WeightsError(f"{index_path} says that {tensor} is in {name}, but it is not")
        if extra := sorted(set(tensors) - set(listed)):
            raise WeightsError(
                f"{tensors[extra[0]].file.name} holds {extra[0]}, which {INDEX} does not list"
            )
    return tensors


def sampled_hash(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return a hash of tensors: their names, types and shapes, and a sample of their bytes.

    Raises:
      WeightsError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, info in sorted(tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        try:
            with info.file.open("rb") as file:
                for place in (0, info.nbytes // 2, max(0, info.nbytes - _SAMPLE)):
                    file.seek(info.start + place)
                    digest.update(file.read(min(_SAMPLE, info.nbytes - place)))
        except OSError as error:
            raise WeightsError(f"{info.file} cannot be read: {error.strerror}") from error
    return digest.digest()


def sidecars(folder: Path) -> list[Path]:
    """Return the files in which some publishers keep the vision tower beside the shards, where
    programs for text alone do not look."""
    return sorted(
        path for path in folder.glob(SIDECAR) if not path.name.startswith(("model", "adapter"))
    )


def _tensor(path: Path, name: str, entry: Any, offset: int) -> TensorInfo:
    try:
        if not isinstance(entry, Mapping):
            raise TypeError
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63
            for n in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the header entry of {name} is damaged") from error
    if not isinstance(dtype, str) or dtype not in TYPES or not whole:
        raise WeightsError(
            f"{path}: the header entry of {name} is damaged: type {dtype!r}, shape {list(shape)}"
        )
    nbytes = math.prod(shape) * TYPES[dtype] // 8
    if end - begin != nbytes:
        needed = f"{nbytes:,}" if nbytes < 2**63 else "too many"
        raise WeightsError(
            f"{path}: the header lies about {name}: {dtype} {list(shape)} needs {needed} bytes, "
            f"its offsets span {end - begin:,}"
        )
    return TensorInfo(path, dtype, shape, offset + begin, nbytes)


def _all_of_a_set(folder: Path, files: list[str]) -> list[str]:
    """Return the names of all shards: `x-00001-of-00003` implies three files, present or not."""
    for name in files:
        if match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", name):
            stem, count = match[1], int(match[2])
            full = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            if set(files) <= set(full):
                return full
    if len(files) > 1:
        raise WeightsError(
            f"{folder} has {len(files)} weight files and no {INDEX} that says which to read"
        )
    return files
