"""Recognition of a checkpoint's layout, from its config.json and its tensors.

Imports no mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.formats import (
    FP8,
    NVFP4,
    SUPPORTED,
    PackedFormat,
    foreign_format,
    refusal,
    source_of,
)
from ..errors import WeightsError
from .headers import FLOATS, TensorInfo
from .names import part_of

PLAIN, MLX = "bf16", "mlx"
_READABLE = {
    NVFP4: PackedFormat("ModelOpt NVFP4", (NVFP4,)),
    FP8: PackedFormat("FP8 with one scale per channel", (FP8,)),
}
# Suffixes of unsupported formats.
_SUFFIXES = {
    ".weight_global_scale": "compressed-tensors NVFP4",
    ".weight_packed": "compressed-tensors packed integers",
    ".weight_zero_point": "compressed-tensors integers",
    ".pre_quant_scale": "ModelOpt AWQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_scale_inv": "FP8 in blocks",
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    "_proj_blocks": "MXFP4",
}


def layout_of(config: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> str:
    """Return the packing of a checkpoint's weights, as one of the converter's layouts.

    Raises:
      WeightsError: if it is another one, or the tensors are not packed as config.json declares.
    """
    declared = foreign_format(config)
    if declared is not None and not declared.layouts:
        raise WeightsError(_cannot(declared))
    shown, example = _shown(stored)
    says = f"config.json declares {declared.name}, but " if declared is not None else ""
    if isinstance(shown, PackedFormat):
        raise WeightsError(f"{says}{example} is there: {_cannot(shown)}")
    if declared is not None and shown not in declared.layouts:
        found = f"{example} is not packed like that" if example else "no tensor is packed"
        raise WeightsError(f"{says}{found}")
    if shown == PLAIN and (odd := next((n for n in stored if stored[n].dtype not in FLOATS), None)):
        raise WeightsError(
            f"{odd} is of type {stored[odd].dtype}, and nothing says how it is packed: {SUPPORTED}"
        )
    return shown


def check_loads(stored: Mapping[str, TensorInfo], folder: Path) -> None:
    """Check that no tensor is in a format that does not load, if config.json declares none.

    Raises:
      WeightsError: with the command that converts it, where there is one.
    """
    shown, example = _shown({n: i for n, i in stored.items() if part_of(n) != "vision"})
    if isinstance(shown, str):
        if shown not in _READABLE:
            return
        shown = _READABLE[shown]
    raise WeightsError(f"{example} in {folder}: {refusal(shown, source_of(folder))}")


def _cannot(found: PackedFormat) -> str:
    return f"weights packed as {found.name} cannot be read: {SUPPORTED}"


def _shown(stored: Mapping[str, TensorInfo]) -> tuple[str | PackedFormat, str | None]:
    """Return the layout that suffixes and types of tensors imply, and a tensor as example."""
    examples: dict[str, str] = {}
    for name, info in stored.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is not None:
            return PackedFormat(_SUFFIXES[suffix], ()), name
        if name.endswith(".scales"):
            examples.setdefault(MLX, name)
        elif name.endswith(".weight_scale_2"):
            examples.setdefault(NVFP4, name)
        elif name.endswith(".weight_scale"):
            weight = stored.get(name.removesuffix("_scale"))
            if weight is not None and (kind := _odd_scale(weight, info)):
                return PackedFormat(kind, ()), name
            examples.setdefault(FP8, name)
    layout = next((layout for layout in (MLX, NVFP4, FP8) if layout in examples), PLAIN)
    return layout, examples.get(layout)


def _odd_scale(weight: TensorInfo, scale: TensorInfo) -> str | None:
    """Return the format of a weight with such a `weight_scale`, if it is unsupported."""
    if weight.dtype == "I8":
        return "INT8"
    if scale.dtype in ("U8", "F8_E8M0"):  # powers of two
        return "MXFP4" if weight.dtype == "U8" else "MXFP8"
    if weight.dtype == "F8_E4M3" and scale.elements == 1 and weight.shape[:1] != (1,):
        return "FP8 with one scale per tensor"
    return None
