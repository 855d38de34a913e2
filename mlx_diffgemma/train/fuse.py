"""A checkpoint and its adapters -> a checkpoint: shard by shard, under the source's names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..checkpoint.adapters import WEIGHTS, read_adapter_config, read_factors
from ..checkpoint.factors import Shapes, read_float_header
from ..checkpoint.files import SIDE_PATTERNS, resolve
from ..checkpoint.headers import INDEX, TensorInfo
from ..checkpoint.names import Ignored, translate
from ..checkpoint.tied import check_copies, read_assigned
from ..config.model import ModelConfig
from ..config.quantization import Quantization
from ..config.reading import read_json
from ..errors import SourceError

_SHARD_BYTES = 5 << 30


@dataclass(slots=True)
class Fused:
    """What was written."""

    folder: Path
    changed: int = 0  # modules
    nbytes: int = 0
    # What packing again lost of each fused module's weights: the root of the sum of squares, as a
    # share of the weights'.
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor of the result."""

    name: str
    nbytes: int
    make: Callable[[], mx.array]


def fuse_checkpoint(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    save_path: Path,
    *,
    dequantize: bool = False,
    revision: str | None = None,
) -> Fused:
    """Writes a checkpoint whose weights hold what adapters added.

    Args:
      model: folder or repo id of what was trained.
      adapter_path: folder of adapters, or of weights trained in full.
      save_path: folder of the result, which must not be there yet.
      dequantize: unpack everything; the result is in the official layout then.
      revision: of a repository.

    Returns:
      What was written. Packed modules that have an adapter are unpacked, fused and packed again,
      which loses a little; `errors` says how much.

    Raises:
      SourceError: if the adapters do not fit the checkpoint, or the result cannot be written.
    """
    source = resolve(model, revision)
    if save_path.exists():
        raise SourceError(f"{save_path} is there already; name another folder")
    config, raw = ModelConfig.from_folder(source), read_json(source / "config.json")
    fused = Fused(save_path)
    outputs = list(_outputs(source, config, Path(adapter_path), fused, dequantize=dequantize))
    if dequantize:
        raw = {k: v for k, v in raw.items() if not k.startswith("quantization")}
    try:
        _write_folder(source, outputs, _shareable(raw), save_path)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{save_path} cannot be written: {error}") from error
    fused.nbytes = sum(output.nbytes for output in outputs)
    return fused


def _write_folder(
    source: Path, outputs: list[_Output], config: Mapping[str, Any], save_path: Path
) -> None:
    """Write all files, and give them the folder's name when all are there."""
    folder = save_path.with_name(f"{save_path.name}.partial")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise SourceError(
            f"{folder} is there already, perhaps from a run that was cut off; remove it"
        ) from error
    try:
        _write(outputs, folder)
        for pattern in SIDE_PATTERNS:
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        os.replace(folder, save_path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the place where the model once lay on somebody's disk."""
    return {
        key: _shareable(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "_name_or_path" or not os.path.isabs(str(value))
    }


def _outputs(
    source: Path, config: ModelConfig, adapters: Path, fused: Fused, *, dequantize: bool
) -> Iterator[_Output]:
    """Every tensor of the result, not yet computed."""
    tensors, assigned = read_assigned(source)
    check_copies(tensors, assigned.copies)
    kept = dict(assigned.sources) | {name: name for name in assigned.ignored}
    modules: dict[str, dict[str, str]] = {}  # path -> leaf -> name in the source
    for target, name in sorted(kept.items(), key=lambda item: item[1]):
        path, _, leaf = target.rpartition(".")
        modules.setdefault(path, {})[leaf] = name
    shapes = {
        f"{path}.{leaf}": tensors[name]
        for path, names in modules.items()
        for leaf, name in names.items()
    }
    changes = _changes(adapters, shapes, _weight_shapes(modules, tensors, config))
    read = partial(_read, tensors)
    for path, names in modules.items():
        packing = None
        if "scales" in names and config.quantization is not None:
            stored = names["weight"].rpartition(".")[0]
            packing = config.quantization.for_module(stored, path)
        change = changes.pop(f"{path}.weight", None)
        fused.changed += change is not None
        if packing is None:
            for leaf, name in names.items():
                own = change if leaf == "weight" else changes.pop(f"{path}.{leaf}", None)
                make = partial(_plain, read, name, own)
                yield _Output(_official(name) if dequantize else name, tensors[name].nbytes, make)
        elif dequantize:
            info = tensors[names["weight"]]
            make = partial(_unpacked, read, names, packing, change)
            nbytes = 2 * (info.elements * 32 // packing.bits)
            yield _Output(_official(names["weight"]), nbytes, make)
        elif change is None:
            for name in names.values():
                yield _Output(name, tensors[name].nbytes, partial(_plain, read, name, None))
        else:
            again = _Repacked(read, names, packing, change, path, fused)
            for leaf, name in names.items():
                yield _Output(name, tensors[name].nbytes, partial(again.take, leaf))
    assert not changes, sorted(changes)


# float32 weights -> what they become.
_Change = Callable[[mx.array], mx.array]


def _changes(
    adapters: Path, shapes: Mapping[str, TensorInfo], weights: Shapes
) -> dict[str, _Change]:
    """By our name of a weight, what the adapters do to it.

    Raises:
      SourceError: if they do not fit.
    """
    settings = read_adapter_config(adapters)
    if settings.get("fine_tune_type") == "full":
        return _replacements(adapters / WEIGHTS, shapes)
    factors = read_factors(adapters, settings, weights)
    return {f"{path}.weight": own.added_to for path, own in factors.items()}


def _weight_shapes(
    modules: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the weights, unpacked, of all modules that take an adapter."""
    found = {}
    for path, names in modules.items():
        if "weight" not in names or isinstance(translate(f"{path}.weight"), Ignored):
            continue
        *rest, width = tensors[names["weight"]].shape
        if "scales" in names and config.quantization is not None:
            packing = config.quantization.for_module(names["weight"].rpartition(".")[0], path)
            assert packing is not None
            width = width * 32 // packing.bits
        if rest and "embed_tokens" not in path:
            found[path] = (*rest, width)
    return found


def _replacements(file: Path, shapes: Mapping[str, TensorInfo]) -> dict[str, _Change]:
    for name, info in read_float_header(file).items():
        if name not in shapes or shapes[name].shape != info.shape:
            raise SourceError(f"{file}: {name} with shape {list(info.shape)} is not the model's")
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    return {name: partial(_replaced, array) for name, array in arrays.items()}


def _replaced(array: mx.array, _: mx.array) -> mx.array:
    return array.astype(mx.float32)


# A tensor of the source, by its name there.
_Read = Callable[[str], mx.array]


def _read(tensors: Mapping[str, TensorInfo], name: str) -> mx.array:
    """One tensor; the file's others stay unread, and this one is held by its taker alone."""
    return cast(dict[str, mx.array], mx.load(str(tensors[name].file)))[name]


def _plain(read: _Read, name: str, change: _Change | None) -> mx.array:
    array = read(name)
    return array if change is None else change(array.astype(mx.float32)).astype(array.dtype)


def _unpacked(
    read: _Read,
    names: Mapping[str, str],
    packing: Quantization,
    change: _Change | None,
    dtype: mx.Dtype | None = mx.bfloat16,
) -> mx.array:
    """The weights of a packed module, changed, in float32 and then in `dtype`."""
    scales, biases = read(names["scales"]), None
    if packing.mode == "affine":  # bfloat16 would round what is unpacked
        scales, biases = scales.astype(mx.float32), read(names["biases"]).astype(mx.float32)
    weight = mx.dequantize(
        read(names["weight"]),
        scales,
        biases,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        dtype=mx.float32,
    )
    weight = weight if change is None else change(weight)
    return weight if dtype is None else weight.astype(dtype)


class _Repacked:
    """A packed module, changed and packed again. Its parts are made together."""

    def __init__(
        self,
        read: _Read,
        names: Mapping[str, str],
        packing: Quantization,
        change: _Change,
        path: str,
        fused: Fused,
    ):
        self._arguments = read, names, packing, change
        self._path, self._fused = path, fused
        self._parts: dict[str, mx.array] = {}

    def take(self, leaf: str) -> mx.array:
        if not self._parts:
            self._make()
        return self._parts.pop(leaf)

    def _make(self) -> None:
        read, names, packing, change = self._arguments
        weight = _unpacked(read, names, packing, change, None)
        dtype = read(names["scales"]).dtype if packing.mode == "affine" else mx.bfloat16
        how: dict[str, Any] = {
            "group_size": packing.group_size,
            "bits": packing.bits,
            "mode": packing.mode,
        }
        packed = mx.quantize(weight.astype(dtype), **how)
        back = mx.dequantize(*packed, **how, dtype=mx.float32)
        lost, whole = mx.square(back - weight).sum(), mx.square(weight).sum()
        mx.eval(packed, lost, whole)
        self._fused.errors[self._path] = cast(
            float, mx.sqrt(lost / mx.maximum(whole, 1e-30)).item()
        )
        self._parts = dict(zip(("weight", "scales", "biases"), packed, strict=False))


def _official(name: str) -> str:
    """The official name: experts are bare arrays there."""
    return name.removesuffix(".weight") if ".experts." in name else name


def _write(outputs: list[_Output], folder: Path) -> None:
    """One file, or shards and an index."""
    shards: list[list[_Output]] = [[]]
    held = 0
    for output in outputs:
        if shards[-1] and held + output.nbytes > _SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(output)
        held += output.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        arrays = {output.name: output.make() for output in shard}
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        weight_map |= {output.name: file for output in shard}
        del arrays
        mx.clear_cache()
    if len(shards) > 1:
        total = sum(output.nbytes for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
