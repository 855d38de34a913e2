"""Adapters on a model: LoRA in mlx-lm's format (a folder with `adapters.safetensors` and
`adapter_config.json`) and in PEFT's, and weights trained in full.

The causal pass and the canvas share every weight, so they share the adapter too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..config.training import DEFAULT_KEYS, LoraParameters
from ..errors import ConfigError, SourceError
from ..model import DiffusionGemma
from ..model.backend import is_cpu
from ..model.switch_linear import QuantizedSwitchLinear, SwitchLinear
from .factors import Factors, Shapes, check_fit, read_float_header
from .headers import read_header
from .names import VISION, part_of
from .peft import PEFT_WEIGHTS, is_peft, read_peft

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_ADAPTABLE = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def add_adapters(
    model: DiffusionGemma, *, num_layers: int, lora: LoraParameters, vision: bool = False
) -> None:
    """Put new adapters, which do not change the output yet, on the modules that `lora.keys` names,
    and freeze all other weights.

    Args:
      model: not fused.
      num_layers: adapt only this many last layers, and nothing outside of layers; -1 for all.
      lora: rank, scale, dropout and keys; `self_attn.q_proj` names every layer's module, a path
        from the root a single one.
      vision: also adapt every product of the vision tower, which must be loaded.

    Raises:
      SourceError: if a key names no module of this model, or one that takes no adapter.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers  # brings mlx-lm's trainer with it

    count = len(model.layers) if num_layers == -1 else num_layers
    within = {name for layer in model.layers[-count:] for name, _ in layer.named_modules()}
    everywhere = dict(model.named_modules())
    everywhere |= {name: m for layer in model.layers for name, m in layer.named_modules()}
    keys = set()
    for key in lora.keys:
        if key not in everywhere:
            raise SourceError(
                f"adapters: no module of this model is called {key!r}; names are like "
                f"{DEFAULT_KEYS[0]!r} within layers, and like {DEFAULT_KEYS[-1]!r} elsewhere"
            )
        if not isinstance(everywhere[key], _ADAPTABLE):
            raise SourceError(f"adapters: {key!r} is not a module that takes an adapter")
        if key in within or num_layers == -1:  # with num_layers, no module outside of layers
            keys.add(key)
    if not keys:
        raise SourceError("adapters: none of the keys names a module of these layers")
    if vision:
        keys |= {name for name, module in everywhere.items() if _is_vision(name, module)}
    model.freeze()
    linear_to_lora_layers(
        model,
        count,
        {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys},
    )


def _is_vision(path: str, module: nn.Module) -> bool:
    return part_of(path) == VISION and isinstance(module, _ADAPTABLE)


def changes_vision(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder of adapters, or of weights trained in full, has some of vision."""
    file = Path(folder) / WEIGHTS
    return file.is_file() and any(part_of(name) == VISION for name in read_header(file))


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules with an adapter, by path."""
    return {name: m for name, m in model.named_modules() if "lora_a" in m}


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the config of a folder of adapters.

    Raises:
      SourceError: if there is none, or it is in no supported format.
    """
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise SourceError(f"{folder} is not a folder of adapters")
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise SourceError(f"{path} must hold an object, got {config!r}")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise SourceError(f"{path}: fine_tune_type {kind!r} is not supported, only lora and full")
    return dict(config)


def load_adapters(model: DiffusionGemma, folder: str | os.PathLike[str]) -> None:
    """Put the adapters, or the weights trained in full, of a folder into a model that is not fused.

    Args:
      model: not fused.
      folder: in mlx-lm's format or in PEFT's.

    Raises:
      SourceError: if files are missing or cannot be read, or do not fit the model.
    """
    config = read_adapter_config(folder)
    if changes_vision(folder) and not model.has_vision:
        model.take_vision(model.vision_source.bring())
    if config.get("fine_tune_type") == "full":
        _load_weights(model, Path(folder) / WEIGHTS)
        return
    factors = read_factors(folder, config, weight_shapes(model))
    if is_peft(folder, config):
        _wrap(model, factors)
    else:
        num_layers = _num_layers(config, model, folder)
        add_adapters(
            model,
            num_layers=num_layers,
            lora=lora_of(config, folder),
            vision=changes_vision(folder),
        )
        _check_modules(adapted_modules(model), factors, Path(folder) / WEIGHTS)
    for path, module in adapted_modules(model).items():
        own = factors[path]
        # The CPU backend's products of experts need float32.
        dtype = mx.float32 if is_cpu() else own.a.dtype
        module.lora_a, module.lora_b = own.a.astype(dtype), own.b.astype(dtype)
        module.scale = own.scale
    mx.eval(model.parameters())


def read_factors(
    folder: str | os.PathLike[str], config: Mapping[str, Any], shapes: Shapes
) -> dict[str, Factors]:
    """Read the factors that a folder of adapters has for each module, by the module's path. Ranks
    are those of the tensors, not the config's single one.

    Args:
      folder: in mlx-lm's format or in PEFT's.
      config: from `read_adapter_config`.
      shapes: of the weights that may be adapted.

    Raises:
      SourceError: if files are missing or cannot be read, or do not fit these weights.
    """
    if is_peft(folder, config):
        file, factors = Path(folder) / PEFT_WEIGHTS, read_peft(folder, config, shapes)
    else:
        file = Path(folder) / WEIGHTS
        factors = _read_mlx_lm(file, lora_of(config, folder))
    check_fit(factors, shapes, file)
    return factors


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the unpacked weights' shapes of all modules that take an adapter, by path."""
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, _ADAPTABLE):
            *rest, width = module.weight.shape
            shapes[path] = (*rest, width * 32 // module.bits if "scales" in module else width)
    return shapes


def _read_mlx_lm(file: Path, lora: LoraParameters) -> dict[str, Factors]:
    halves: dict[str, set[str]] = {}
    for name in read_float_header(file):
        path, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b"):
            raise SourceError(f"{file}: {name} is not a factor of an adapter")
        halves.setdefault(path, set()).add(leaf)
    for path, leaves in halves.items():
        if len(leaves) < 2:
            missing = "lora_b" if "lora_a" in leaves else "lora_a"
            raise SourceError(f"{file}: {path}.{missing} is missing, the other half of an adapter")
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    return {
        path: Factors(arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"], lora.scale)
        for path in halves
    }


def _check_modules(expected: Mapping[str, Any], factors: Mapping[str, Factors], file: Path) -> None:
    if extra := sorted(set(factors) - set(expected)):
        raise SourceError(
            f"{file}: {extra[0]} has an adapter, but {CONFIG}'s num_layers and keys leave it out"
        )
    if missing := sorted(set(expected) - set(factors)):
        raise SourceError(f"{file}: {missing[0]}.lora_a is missing, which {CONFIG} asks for")


def _wrap(model: DiffusionGemma, factors: Mapping[str, Factors]) -> None:
    """Wrap modules in mlx-lm's adapter classes, for the factors, and freeze all else."""
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    model.freeze()
    modules = dict(model.named_modules())
    for path in factors:
        plain = modules[path]
        is_linear = isinstance(plain, (nn.Linear, nn.QuantizedLinear))
        kind: Any = LoRALinear if is_linear else LoRASwitchLinear
        model.update_modules(tree_unflatten([(path, kind.from_base(plain, r=1))]))


def _load_weights(model: DiffusionGemma, file: Path) -> None:
    """Replace weights by fully trained ones, in the model's own type."""
    own = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    for name, info in read_float_header(file).items():
        if name not in own:
            raise SourceError(f"{file}: {name} is not a weight of this model")
        if info.shape != tuple(own[name].shape):
            raise SourceError(
                f"{file}: {name} has shape {list(info.shape)}, "
                f"expected {list(own[name].shape)}; was it made for another model?"
            )
    weights = cast(dict[str, mx.array], mx.load(str(file)))
    model.load_weights([(n, a.astype(own[n].dtype)) for n, a in weights.items()], strict=False)
    mx.eval(model.parameters())


def _num_layers(config: Mapping[str, Any], model: DiffusionGemma, folder: Any) -> int:
    count = config.get("num_layers", -1)
    if not isinstance(count, int) or not (count == -1 or 1 <= count <= len(model.layers)):
        raise SourceError(
            f"{folder}: num_layers of {count!r} does not fit a model of {len(model.layers)} layers"
        )
    return count


def lora_of(config: Mapping[str, Any], folder: str | os.PathLike[str]) -> LoraParameters:
    """Return the LoRA parameters of an adapter_config.json.

    Raises:
      SourceError: if they are not valid in mlx-lm's format.
    """
    try:
        return LoraParameters.from_dict(config.get("lora_parameters"))
    except ConfigError as error:
        raise SourceError(f"{Path(folder) / CONFIG}: {error}") from error
