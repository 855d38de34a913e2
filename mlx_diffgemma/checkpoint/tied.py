"""The assignment of stored tensors to ours, where one weight may be stored under several names.

Encoder and decoder share all weights but the layer scalars, and the head is the embedding. A file
may hold such a weight under each of these names: equal copies are left out, others are refused,
since this model has room for one. Imports no mlx.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import WeightsError
from .headers import FLOATS, TensorInfo, read_header, read_headers, sidecars
from .layouts import check_loads
from .names import VISION, Ignored, part_of, translate

_PIECE = 1 << 22  # elements compared at a time
# Leaves that belong together: tied names must be packed alike.
_PACK = frozenset("weight scales biases weight_scale weight_scale_2".split())
_PREFERRED = "model.decoder."
_NUMPY = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Assigned:
    """The use of every stored tensor, from headers alone."""

    used: Mapping[str, TensorInfo]  # our name -> the tensor, of all but vision
    vision: Mapping[str, TensorInfo]  # our name -> the tensor, of what reads images
    sources: Mapping[str, str]  # our name -> stored name
    copies: Mapping[str, str]  # stored name -> stored name of the tensor that it must equal
    ignored: Mapping[str, str]  # stored name -> why it is left out; copies are not among them


def assign(
    tensors: Mapping[str, TensorInfo], name_of: Callable[[str], str | Ignored] = translate
) -> Assigned:
    """Assign one stored tensor to each of our names.

    Args:
      tensors: stored name -> tensor.
      name_of: our name of a stored tensor, or why it is left out.

    Raises:
      WeightsError: if a name is unknown, or two names of a weight hold different shapes or forms.
    """
    ignored: dict[str, str] = {}
    # our module or tensor -> stored module -> our name -> stored name
    claims: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for stored in tensors:
        target = name_of(stored)
        if isinstance(target, Ignored):
            ignored[stored] = target.reason
            continue
        module, _, leaf = target.rpartition(".")
        whole = module if leaf in _PACK else target
        # "x." of x.weight, "x" of a bare x
        claims[whole][stored.removesuffix(leaf)][target] = stored
    sources: dict[str, str] = {}
    copies: dict[str, str] = {}
    for claimed in claims.values():
        names = list(claimed.values())
        kept = next((n for n in names if min(n.values()).startswith(_PREFERRED)), names[0])
        sources |= kept
        for other in names:
            if other is not kept:
                copies |= _copies(other, kept, tensors)
    used = {target: tensors[stored] for target, stored in sources.items()}
    vision = {target: used.pop(target) for target in sources if part_of(target) == VISION}
    return Assigned(used, vision, sources, copies, ignored)


def read_assigned(folder: Path) -> tuple[dict[str, TensorInfo], Assigned]:
    """Read a folder's headers, and assign its tensors.

    Raises:
      WeightsError: as `assign`, or if the files are damaged, or in a format that does not load.
    """
    tensors = read_stored(folder)
    check_loads(tensors, folder)
    return tensors, assign(tensors)


def read_stored(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a folder, vision in a file of its own included.

    Raises:
      WeightsError: if files are missing or damaged, or such a file holds something else.
    """
    tensors = read_headers(folder)
    if any(part_of(name) == VISION for name in tensors):
        return tensors
    for path in sidecars(folder):
        for name, info in read_header(path).items():
            if part_of(name) != VISION:
                raise WeightsError(f"{path} holds {name}, which is no part of vision")
            if name in tensors:
                raise WeightsError(f"{name} is in {tensors[name].file.name} and in {path.name}")
            tensors[name] = info
    return tensors


def check_copies(tensors: Mapping[str, TensorInfo], copies: Mapping[str, str]) -> None:
    """Compare every copy with its original, piece by piece.

    Raises:
      WeightsError: if one holds other values, or a file cannot be read.
    """
    for copy, kept in copies.items():
        if not _equal(tensors[copy], tensors[kept]):
            raise WeightsError(
                f"{copy} and {kept} hold different values, but they are one weight of "
                "DiffusionGemma; was only one of them trained?"
            )


def _copies(
    other: Mapping[str, str], kept: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Return the stored name of each copy's original."""
    if alone := sorted(other.keys() ^ kept.keys()):
        name = other.get(alone[0]) or kept[alone[0]]
        raise WeightsError(
            f"{min(other.values())} and {min(kept.values())} are tied, but stored in different "
            f"forms: only one of them comes with {name}"
        )
    for target, copy in other.items():
        one, two = tensors[copy], tensors[kept[target]]
        is_alike = one.dtype == two.dtype or {one.dtype, two.dtype} <= FLOATS
        if one.shape != two.shape or not is_alike:
            raise WeightsError(
                f"{copy} and {kept[target]} are tied, but stored in different forms: "
                f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
            )
    return {copy: kept[target] for target, copy in other.items()}


def _equal(one: TensorInfo, two: TensorInfo) -> bool:
    """Return whether two tensors of one shape hold the same values."""
    are_floats = {one.dtype, two.dtype} <= FLOATS
    try:
        with one.file.open("rb") as first, two.file.open("rb") as second:
            for start in range(0, one.elements, _PIECE):
                stop = min(start + _PIECE, one.elements)
                a, b = _read(first, one, start, stop), _read(second, two, start, stop)
                if one.dtype == two.dtype and a == b:
                    continue
                if not are_floats:
                    return False
                if not np.array_equal(_values(a, one.dtype), _values(b, two.dtype)):
                    return False
    except OSError as error:
        raise WeightsError(f"{error.filename} cannot be read: {error.strerror}") from error
    return True


def _read(file: BinaryIO, info: TensorInfo, start: int, stop: int) -> bytes:
    """Return the bytes of elements [start, stop)."""
    size = info.nbytes // info.elements
    file.seek(info.start + start * size)
    raw = file.read((stop - start) * size)
    if len(raw) != (stop - start) * size:
        raise WeightsError(f"{info.file} has become shorter while it was read")
    return raw


def _values(raw: bytes, dtype: str) -> np.ndarray:
    """Return the values as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, _NUMPY[dtype]).astype(np.float32)
