"""LoRA adapters in mlx-lm's format: `adapters.safetensors` and `adapter_config.json` in a folder.

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
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..config.training import DEFAULT_KEYS, LoraParameters
from ..errors import ConfigError, SourceError
from ..model import DiffusionGemma
from .headers import read_header

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_ADAPTABLE = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


def add_adapters(model: DiffusionGemma, *, num_layers: int, lora: LoraParameters) -> None:
    """Puts adapters, which change nothing yet, on the modules that `lora.keys` names, and freezes
    all other weights.

    Args:
      model: not fused.
      num_layers: only on the last ones, and outside of layers nowhere; -1 for all.
      lora: rank, scale, dropout and keys: `self_attn.q_proj` is every layer's, a path from the
        root is one module.

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
        if key in within or num_layers == -1:  # outside of layers nothing, where some are chosen
            keys.add(key)
    if not keys:
        raise SourceError("adapters: none of the keys names a module of these layers")
    model.freeze()
    linear_to_lora_layers(
        model,
        count,
        {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys},
    )


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of all that have an adapter."""
    return {name: m for name, m in model.named_modules() if "lora_a" in m}


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder of adapters says of itself.

    Raises:
      SourceError: if there is none, or it is none of ours or mlx-lm's.
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
    """Puts the adapters, or the weights that were trained, of a folder into a model that is not
    fused.

    Raises:
      SourceError: if files are missing or cannot be read, or do not fit the model.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    if not path.is_file():
        raise SourceError(f"{path} is missing")
    tensors = read_header(path)
    is_full = config.get("fine_tune_type", "lora") == "full"
    if not is_full:
        add_adapters(
            model, num_layers=_num_layers(config, model, folder), lora=lora_of(config, folder)
        )
    own = dict(tree_flatten(model.parameters()))
    expected = {
        n: a for n, a in own.items() if is_full or n.rpartition(".")[2] in ("lora_a", "lora_b")
    }
    for name, info in tensors.items():
        if name not in expected:
            raise SourceError(f"{path}: {name} is not a weight that this model trains")
        if info.shape != tuple(expected[name].shape):
            raise SourceError(
                f"{path}: {name} has shape {list(info.shape)}, "
                f"expected {list(expected[name].shape)}; was it made for another model?"
            )
    if not is_full and (missing := sorted(set(expected) - set(tensors))):
        raise SourceError(f"{path}: {missing[0]} is missing, which {CONFIG} asks for")
    weights = cast(dict[str, mx.array], mx.load(str(path)))
    if is_full:  # trained in the model's own type
        weights = {name: array.astype(own[name].dtype) for name, array in weights.items()}
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())


def _num_layers(config: Mapping[str, Any], model: DiffusionGemma, folder: Any) -> int:
    count = config.get("num_layers", -1)
    if not isinstance(count, int) or not (count == -1 or 1 <= count <= len(model.layers)):
        raise SourceError(
            f"{folder}: num_layers of {count!r} does not fit a model of {len(model.layers)} layers"
        )
    return count


def lora_of(config: Mapping[str, Any], folder: str | os.PathLike[str]) -> LoraParameters:
    """What an adapter_config.json says about its adapters.

    Raises:
      SourceError: if it says something else than mlx-lm would.
    """
    try:
        return LoraParameters.from_dict(config.get("lora_parameters"))
    except ConfigError as error:
        raise SourceError(f"{Path(folder) / CONFIG}: {error}") from error
