"""Readers of the published layouts: float tensors under our names, a few rows at a time.

Each layout is recognised from config.json and the headers. An unsupported one is refused with the
reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.headers import FLOATS, TensorInfo
from mlx_diffgemma.checkpoint.layouts import MLX, layout_of
from mlx_diffgemma.checkpoint.names import ACTIVATIONS, Ignored, keep_as
from mlx_diffgemma.checkpoint.tied import assign, check_copies, read_stored
from mlx_diffgemma.config.formats import mlx_block
from mlx_diffgemma.config.quantization import Quantization, QuantizationConfig
from mlx_diffgemma.config.reading import read_json
from mlx_diffgemma.errors import ConfigError, WeightsError

# Under the decoder's name or the encoder's, which share their experts.
_EXPERT = re.compile(
    r"model\.(?:decoder|encoder\.language_model)\.(layers\.\d+\.experts\.[0-9]{1,6}\."
    r"(?:gate|up|down)_proj\.(?:weight|weight_scale|weight_scale_2))"
)
_OURS = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(gate|up|down)_proj\.(\w+)")
# e2m1, the four-bit float: sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_NVFP4_BLOCK = 16  # inputs that share a scale


class Source(Protocol):
    """A float tensor in one of the layouts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Return the stored tensors that it consists of."""

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows [start, stop) along the first axis, as a float array; a scalar is one row."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain tensor."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    def read(self, start: int, stop: int) -> mx.array:
        return read_rows(self.info, start, stop)


@dataclass(frozen=True, slots=True)
class Packed:
    """MLX's grouped quantization."""

    weight: TensorInfo
    scales: TensorInfo
    biases: TensorInfo | None
    setting: Quantization

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, words = self.weight.shape
        return (*rows, words * 32 // self.setting.bits)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.weight, self.scales, self.biases) if info is not None)

    def packed(self, start: int, stop: int, dtype: mx.Dtype) -> list[mx.array]:
        """Return rows as they are packed; float scales and biases in another type."""
        rows = [read_rows(info, start, stop) for info in self.infos]
        return [
            array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            for array in rows
        ]

    def read(self, start: int, stop: int) -> mx.array:
        scales = read_rows(self.scales, start, stop)
        if self.biases is None:
            biases, dtype = None, mx.float32
        else:  # in float32: with scales in bfloat16, MLX rounds the product and then the sum
            scales, dtype = scales.astype(mx.float32), None
            biases = read_rows(self.biases, start, stop).astype(mx.float32)
        return mx.dequantize(
            read_rows(self.weight, start, stop),
            scales,
            biases,
            group_size=self.setting.group_size,
            bits=self.setting.bits,
            mode=self.setting.mode,
            dtype=dtype,
        )


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """ModelOpt NVFP4: e2m1 pairs, low half first, times an e4m3 scale per block, times one
    float."""

    weight: TensorInfo  # U8 [rows, columns / 2]
    scale: TensorInfo  # F8_E4M3 [rows, columns / 16]
    scale_2: TensorInfo  # F32 []

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[0], 2 * self.weight.shape[1])

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return (self.weight, self.scale, self.scale_2)

    def read(self, start: int, stop: int) -> mx.array:
        packed = _raw_rows(self.weight, start, stop, np.uint8)
        values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
        values[..., 0::2], values[..., 1::2] = _E2M1[packed & 15], _E2M1[packed >> 4]
        scale = e4m3(_raw_rows(self.scale, start, stop, np.uint8))
        scale = scale * np.frombuffer(_bytes(self.scale_2, 0, 4), np.float32)[0]
        return mx.array(values * np.repeat(scale, _NVFP4_BLOCK, axis=-1))


@dataclass(frozen=True, slots=True)
class Fp8:
    """e4m3 weights with one scale per output row."""

    weight: TensorInfo  # F8_E4M3 [rows, columns]
    scale: TensorInfo  # float [rows] or [rows, 1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return (self.weight, self.scale)

    def read(self, start: int, stop: int) -> mx.array:
        values = mx.array(e4m3(_raw_rows(self.weight, start, stop, np.uint8)))
        scale = read_rows(self.scale, start, stop).astype(mx.float32)
        return values * scale.reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True, slots=True)
class Stacked:
    """Experts stored one by one: [experts, rows of all parts, columns]; gate comes before up."""

    experts: tuple[tuple[Source, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        parts = self.experts[0]
        return (len(self.experts), sum(part.shape[0] for part in parts), parts[0].shape[1])

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(info for parts in self.experts for part in parts for info in part.infos)

    def read(self, start: int, stop: int) -> mx.array:
        return mx.stack(
            [
                mx.concatenate([part.read(0, part.shape[0]) for part in parts])
                for parts in self.experts[start:stop]
            ]
        )


@dataclass(frozen=True)
class Checkpoint:
    """A source in which every stored tensor is used or left out for a reason."""

    folder: Path
    layout: str
    config: dict[str, Any]
    tensors: Mapping[str, Source]  # our name -> its source
    ignored: Mapping[str, str]  # stored name -> why it is left out
    stored: Mapping[str, TensorInfo]  # everything in the files


def open_checkpoint(folder: Path, *, compare: bool = True) -> Checkpoint:
    """Recognise the layout and list the tensors, from headers alone.

    Args:
      folder: of the checkpoint.
      compare: read tensors that are stored under several names, to check that they are equal.

    Raises:
      DiffGemmaError: if the folder is not a checkpoint in a layout that can be read.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None:
        raise ConfigError(f"{folder} has no config.json; a checkpoint folder is expected")
    stored = read_stored(folder)
    try:
        layout = layout_of(config, stored)
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from error
    assigned = assign(stored, _target)
    if compare:
        check_copies(stored, assigned.copies)
    ignored = dict(assigned.ignored)
    ignored |= {
        copy: f"equal to {kept}, to which it is tied" for copy, kept in assigned.copies.items()
    }
    experts: dict[tuple[str, int, str], dict[str, TensorInfo]] = defaultdict(dict)
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    names: dict[str, str] = {}  # our module -> stored module
    for name, info in {**assigned.used, **assigned.vision}.items():
        if match := _OURS.fullmatch(name):
            experts[match[1], int(match[2]), match[3]][match[4]] = info
        else:
            module, _, leaf = name.rpartition(".")
            modules[module][leaf] = info
            names[module] = assigned.sources[name].removesuffix(f".{leaf}")
    quantization = None
    if layout == MLX:
        block = mlx_block(config)
        if not isinstance(block, Mapping):
            raise ConfigError(f"{folder} holds packed tensors, but config.json does not say how")
        quantization = QuantizationConfig.from_dict(block, where=str(folder / "config.json"))
    tensors: dict[str, Source] = {}
    for module, leaves in modules.items():
        setting = quantization.for_module(names[module], module) if quantization else None
        _add_module(tensors, module, leaves, setting)
    _add_experts(tensors, experts)
    return Checkpoint(folder, layout, config, tensors, ignored, stored)


def _target(name: str) -> str | Ignored:
    """Return our name of a stored tensor; packed formats and single experts have more names."""
    if match := _EXPERT.fullmatch(name):
        return f"model.decoder.{match[1]}"
    module, _, leaf = name.rpartition(".")
    if leaf == "input_scale" and not isinstance(keep_as(name), Ignored):
        return Ignored(ACTIVATIONS)  # of vision, which is copied
    if leaf not in ("weight_scale", "weight_scale_2"):
        return keep_as(name)
    kept = keep_as(f"{module}.weight")
    return kept if isinstance(kept, Ignored) else f"{kept.removesuffix('.weight')}.{leaf}"


def read_rows(info: TensorInfo, start: int, stop: int) -> mx.array:
    """Return rows of a stored tensor in its own type."""
    if info.dtype == "BF16":
        return mx.array(_raw_rows(info, start, stop, np.uint16)).view(mx.bfloat16)
    kinds = {"F32": np.float32, "F16": np.float16, "U32": np.uint32, "U8": np.uint8}
    return mx.array(_raw_rows(info, start, stop, kinds[info.dtype]))


def e4m3(raw: np.ndarray) -> np.ndarray:
    """Return F8_E4M3 as float32: sign, four bits of exponent with bias 7, three of mantissa, no
    infinity."""
    return _E4M3[raw]


def _e4m3_table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    value[(code & 127) == 127] = np.nan
    return np.where(code >= 128, -value, value).astype(np.float32)


_E4M3 = _e4m3_table()


def _add_module(
    tensors: dict[str, Source],
    module: str,
    leaves: dict[str, TensorInfo],
    setting: Quantization | None,
) -> None:
    if "scales" in leaves:
        if setting is None or "weight" not in leaves:
            raise WeightsError(f"{module}.scales is there, but nothing says how it is packed")
        packed = Packed(leaves["weight"], leaves["scales"], leaves.get("biases"), setting)
        _check_packed(module, packed)
        tensors[f"{module}.weight"] = packed
        return
    if leaves.keys() & {"weight_scale", "weight_scale_2"}:
        tensors[f"{module}.weight"] = _scaled(module, leaves)
        return
    for leaf, info in leaves.items():
        if info.dtype not in FLOATS:
            raise WeightsError(
                f"{module}.{leaf} has type {info.dtype}, expected {' or '.join(sorted(FLOATS))}"
            )
        tensors[f"{module}.{leaf}"] = Plain(info)


def _check_packed(module: str, source: Packed) -> None:
    if len(source.weight.shape) < 2:
        raise WeightsError(f"{module}.weight is packed, but no matrix: {source.weight.shape}")
    setting, (*rows, words) = source.setting, source.weight.shape
    width = words * 32 // setting.bits
    expected = (*rows, width // setting.group_size)
    is_affine = setting.mode == "affine"
    float_scales = source.scales.dtype in FLOATS if is_affine else source.scales.dtype == "U8"
    biases = source.biases
    if (
        source.weight.dtype != "U32"
        or words * 32 % setting.bits
        or width % setting.group_size
        or source.scales.shape != expected
        or not float_scales
        or (biases is not None) != is_affine
        or (biases is not None and (biases.shape != expected or biases.dtype not in FLOATS))
    ):
        raise WeightsError(
            f"{module} is not packed as its config says, {setting.bits}-bit {setting.mode} in "
            f"groups of {setting.group_size}: weight {source.weight.dtype} "
            f"{list(source.weight.shape)}, scales {source.scales.dtype} {list(source.scales.shape)}"
        )


def _fp8(module: str, weight: TensorInfo, scale: TensorInfo) -> Fp8:
    rows = weight.shape[0] if weight.shape else 0
    if (
        weight.dtype != "F8_E4M3"
        or len(weight.shape) != 2
        or scale.dtype not in FLOATS
        or scale.shape not in ((rows,), (rows, 1))
    ):
        raise WeightsError(
            f"{module}: FP8 with one scale per output row is expected, found weight "
            f"{weight.dtype} {list(weight.shape)} and scale {scale.dtype} {list(scale.shape)}"
        )
    return Fp8(weight, scale)


def _add_experts(
    tensors: dict[str, Source], experts: Mapping[tuple[str, int, str], dict[str, TensorInfo]]
) -> None:
    """Combine experts stored one by one into the two fused tensors of their layer."""
    by_layer: dict[str, dict[int, dict[str, Source]]] = defaultdict(lambda: defaultdict(dict))
    for (layer, expert, projection), leaves in experts.items():
        path = f"{layer}.{expert}.{projection}_proj"
        by_layer[layer][expert][projection] = _scaled(path, leaves)
    for layer, found in by_layer.items():
        if sorted(found) != list(range(len(found))):
            raise WeightsError(f"{layer}: experts {sorted(found)[:8]}... are not numbered 0, 1, 2")
        for parts in found.values():
            if missing := {"gate", "up", "down"} - set(parts):
                raise WeightsError(f"{layer}: {sorted(missing)[0]}_proj of an expert is missing")
        ordered = [found[i] for i in range(len(found))]
        for target, wanted in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            stacked = Stacked(tuple(tuple(parts[p] for p in wanted) for parts in ordered))
            shapes = {tuple(part.shape for part in parts) for parts in stacked.experts}
            if len(shapes) != 1 or len({shape[1] for shape in next(iter(shapes))}) != 1:
                raise WeightsError(f"{layer}.{target}: experts have different shapes")
            if f"{layer}.{target}.weight" in tensors:
                raise WeightsError(f"{layer}.{target} is stored both fused and one by one")
            tensors[f"{layer}.{target}.weight"] = stacked


def _scaled(path: str, leaves: dict[str, TensorInfo]) -> Source:
    """Return a matrix, with scales if its leaves include them."""
    weight, scale, scale_2 = (leaves.get(k) for k in ("weight", "weight_scale", "weight_scale_2"))
    if weight is None or len(weight.shape) != 2:
        raise WeightsError(f"{path}.weight is missing or not a matrix")
    if scale is None:
        if weight.dtype not in FLOATS or scale_2 is not None:
            raise WeightsError(f"{path}.weight has type {weight.dtype}, but no weight_scale")
        return Plain(weight)
    if scale_2 is None:
        return _fp8(path, weight, scale)
    rows, half = weight.shape
    if (
        weight.dtype != "U8"
        or scale.dtype != "F8_E4M3"
        or scale.shape != (rows, 2 * half // _NVFP4_BLOCK)
        or 2 * half % _NVFP4_BLOCK
        or scale_2.dtype != "F32"
        or scale_2.elements != 1
    ):
        raise WeightsError(
            f"{path}: NVFP4 is expected, found weight {weight.dtype} {list(weight.shape)}, "
            f"scale {scale.dtype} {list(scale.shape)}, scale_2 {scale_2.dtype}"
        )
    return Nvfp4(weight, scale, scale_2)


def _raw_rows(info: TensorInfo, start: int, stop: int, dtype: Any) -> np.ndarray:
    rows, *rest = info.shape or (1,)  # a scalar is one row
    row_bytes = info.nbytes // rows if rows else 0
    raw = _bytes(info, start * row_bytes, (stop - start) * row_bytes)
    return np.frombuffer(raw, dtype).reshape(stop - start, *rest)


def _bytes(info: TensorInfo, offset: int, count: int) -> bytes:
    try:
        with info.file.open("rb") as file:
            file.seek(info.start + offset)
            raw = file.read(count)
    except OSError as error:
        raise WeightsError(f"{info.file} cannot be read: {error.strerror}") from error
    if len(raw) != count:
        raise WeightsError(f"{info.file} has become shorter while it was read")
    return raw
