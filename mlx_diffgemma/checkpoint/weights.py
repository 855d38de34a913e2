"""Loading of weights, strict both ways: every tensor is used or ignored by name, every parameter is
filled once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config.model import ModelConfig
from ..config.quantization import Quantization
from ..errors import PromptError, WeightsError
from ..model import DiffusionGemma
from ..model.vision import Vision
from .headers import FLOATS, TensorInfo
from .names import FOREIGN_VISION, is_bound
from .tied import Assigned, check_copies, read_assigned

# Arrays are materialised in groups of this size: large enough to keep the disk busy, small enough
# to bound the memory that is used twice.
_GROUP_BYTES = 1 << 28


def load_weights(model: DiffusionGemma, config: ModelConfig, folder: Path) -> None:
    """Fill the model from a folder, and pack the modules that come with scales; vision only where
    the model has it already.

    On the CPU backend all weights that are not packed become float32, the only type of its
    gathered product.

    Raises:
      WeightsError: if a tensor is missing, unknown, or has the wrong shape or type, or is stored
      twice with different values; nothing is loaded then.
    """
    _fill(model, *fit_weights(model, config, folder))


def load_vision(config: ModelConfig, folder: Path) -> Vision:
    """Return what reads images, from a folder whose config describes it.

    Raises:
      WeightsError: as `load_weights`.
      PromptError: if the folder has no vision.
    """
    _, assigned = read_assigned(folder)
    tensors = _of_vision(config, assigned, folder)
    assert config.vision is not None
    root, vision = nn.Module(), Vision(config.vision, config.text.hidden_size)
    root.model = nn.Module()  # so that names are those of the whole model
    root.model.encoder = vision
    _fill(root, *_fit(root, config, tensors, assigned.sources))
    vision.freeze()  # a tower that is to be trained is loaded with the model
    return vision


def _fill(
    model: nn.Module,
    tensors: Mapping[str, TensorInfo],
    sources: Mapping[str, str],
    packed: Mapping[str, Quantization],
) -> None:
    """Read the tensors into a model, of which everything is filled."""
    expected = dict(tree_flatten(model.parameters()))
    as_float32 = set()
    if mx.default_device() == mx.cpu:
        as_float32 = {name for name in tensors if name.rpartition(".")[0] not in packed}
    for name, array in _read(tensors, sources, as_float32):
        module, _, leaf = name.rpartition(".")
        _owner(model, module)[leaf] = array
        expected.pop(name)
    assert not expected, f"not filled: {sorted(expected)}"
    # Arrays must be evaluated before use: gathered products have read lazy slices as zeros.
    mx.eval(model.parameters())


def fit_weights(
    model: DiffusionGemma, config: ModelConfig, folder: Path
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str], dict[str, Quantization]]:
    """Check a folder against the model, and pack the modules that come packed.

    Reads only headers, and tensors that are stored twice, to compare them.

    Returns:
      Tensors under our names, our name -> source name, and module path -> its packing.

    Raises:
      WeightsError: if a tensor is missing, unknown, or has the wrong shape or type.
    """
    stored, assigned = read_assigned(folder)
    tensors = assigned.used
    if model.has_vision:
        tensors = {**tensors, **_of_vision(config, assigned, folder)}
    fitting = _fit(model, config, tensors, assigned.sources)
    check_copies(stored, assigned.copies)
    return fitting


def vision_tensors(config: ModelConfig, folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of vision under our names, from headers alone.

    Raises:
      WeightsError: if files are damaged.
      PromptError: if the folder has no vision.
    """
    return _of_vision(config, read_assigned(folder)[1], folder)


def _of_vision(config: ModelConfig, assigned: Assigned, folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of vision that the config says are used."""
    if config.vision is None or not assigned.vision:
        other = [name for name, why in assigned.ignored.items() if why == FOREIGN_VISION]
        found = f": {other[0]} is {FOREIGN_VISION}" if other else " in its files"
        raise PromptError(f"{folder} has no vision tower{found}, so that it reads no images")
    has_bounds = config.vision is not None and config.vision.use_clipped_linears
    return {n: info for n, info in assigned.vision.items() if has_bounds or not is_bound(n)}


def _fit(
    model: nn.Module,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    sources: Mapping[str, str],
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str], dict[str, Quantization]]:
    """Check tensors against a model, and pack the modules that come packed."""
    packed = _packed_modules({name: sources[name] for name in tensors}, config)
    if packed:
        _check_packed(model, tensors, packed)
        nn.quantize(
            model,
            class_predicate=lambda path, module: (
                {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}
                if (q := packed.get(path))
                else False
            ),
        )
    _check_fit(tensors, dict(tree_flatten(model.parameters())), packed)
    return tensors, sources, packed


def _packed_modules(sources: Mapping[str, str], config: ModelConfig) -> dict[str, Quantization]:
    """Return the packing of every module that comes with scales, by path."""
    packed = {}
    for name, stored in sources.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "scales":
            continue
        if config.quantization is None:
            raise WeightsError(f"{stored} is there, but config.json has no quantization block")
        stored_module = stored.rpartition(".")[0]
        if (setting := config.quantization.for_module(stored_module, module)) is None:
            raise WeightsError(
                f"{stored} is there, but config.json says that {stored_module} is not quantized"
            )
        packed[module] = setting
    return packed


def _check_packed(
    model: nn.Module, tensors: Mapping[str, TensorInfo], packed: Mapping[str, Quantization]
) -> None:
    """Compare packed shapes with the model's, before MLX builds such modules."""
    modules = dict(model.named_modules())
    for path, setting in packed.items():
        if path not in modules or not hasattr(modules[path], "to_quantized"):
            raise WeightsError(
                f"{path}.scales is there, but {path} is not a module "
                "of this model that can be packed"
            )
        *rest, width = modules[path].weight.shape
        expected = {
            "weight": (*rest, width * setting.bits // 32),
            "scales": (*rest, width // setting.group_size),
            "biases": (*rest, width // setting.group_size) if setting.mode == "affine" else None,
        }
        if width % setting.group_size:
            raise WeightsError(
                f"{path}: groups of {setting.group_size} do not divide its width of {width}"
            )
        for leaf, shape in expected.items():
            info = tensors.get(f"{path}.{leaf}")
            if (shape is None) != (info is None):
                state = "missing" if info is None else "there"
                raise WeightsError(
                    f"{path}.{leaf} is {state}, but its packing is {_describe(setting)}"
                )
            if info is not None and shape is not None and info.shape != shape:
                raise WeightsError(
                    f"{path}.{leaf} has shape {list(info.shape)}, expected {list(shape)} "
                    f"for {_describe(setting)}"
                )


def _check_fit(
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, mx.array],
    packed: Mapping[str, Quantization],
) -> None:
    """Check names, shapes and types, from headers alone."""
    if missing := sorted(set(expected) - set(tensors)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(
            f"tensor {missing[0]}{more} is missing, "
            f"expected shape {list(expected[missing[0]].shape)}"
        )
    if extra := sorted(set(tensors) - set(expected)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise WeightsError(
            f"tensor {extra[0]}{more} is there, but the config describes a model without it"
        )
    for name, info in tensors.items():
        if info.shape != tuple(expected[name].shape):
            raise WeightsError(
                f"{name} has shape {list(info.shape)}, expected {list(expected[name].shape)}"
            )
        module, _, leaf = name.rpartition(".")
        allowed = FLOATS
        if module in packed and leaf != "biases":
            is_float_scale = leaf == "scales" and packed[module].mode == "affine"
            allowed = FLOATS if is_float_scale else frozenset({"U32" if leaf == "weight" else "U8"})
        if info.dtype not in allowed:
            raise WeightsError(
                f"{name} has type {info.dtype}, expected {' or '.join(sorted(allowed))}"
            )


def _read(
    tensors: Mapping[str, TensorInfo], sources: Mapping[str, str], as_float32: set[str]
) -> Iterator[tuple[str, mx.array]]:
    """Yield arrays under our names, file by file, evaluated in groups; the caller owns and frees a
    group."""
    by_file: dict[Path, list[str]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append(name)
    for file, names in by_file.items():
        try:
            lazy = cast(dict[str, mx.array], mx.load(str(file)))
        except RuntimeError as error:  # such as a type unknown to MLX, in a tensor that is ignored
            raise WeightsError(f"{file} cannot be read: {error}") from error
        group: list[tuple[str, mx.array]] = []
        held = 0
        for name in sorted(names, key=lambda n: tensors[n].start):
            array = lazy.pop(sources[name])
            group.append((name, array.astype(mx.float32) if name in as_float32 else array))
            del array
            held += tensors[name].nbytes
            if held >= _GROUP_BYTES:
                mx.eval([array for _, array in group])
                yield from group
                group, held = [], 0
        mx.eval([array for _, array in group])
        yield from group


def _owner(model: nn.Module, path: str) -> nn.Module:
    module = model
    for part in path.split("."):
        module = module[int(part)] if part.isdecimal() else module[part]
    return module


def _describe(setting: Quantization) -> str:
    return f"{setting.bits}-bit {setting.mode} in groups of {setting.group_size}"
