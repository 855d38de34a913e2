"""LoRA adapters in PEFT's format: `adapter_model.safetensors` and a config with `peft_type`.

Source: peft 0.21.2, tuners/lora/layer.py (Linear and ParamWrapper: `scaling`, `get_delta_weight`)
and tuners/lora/model.py (`rank_pattern`, `alpha_pattern`).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..errors import SourceError
from .factors import Factors, Shapes, read_float_header

PEFT_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_ENCODER, _DECODER = "model.encoder.language_model.layers.", "model.decoder.layers."
_EXPERTS = ("gate_up_proj", "down_proj")
# Options under which an adapter is more than two factors and a scale.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "repeating layers",
    "modules_to_save": "modules trained as a whole",
    "trainable_token_indices": "embeddings of new tokens",
    "lora_bias": "a bias on the factors",
    "fan_in_fan_out": "transposed weights",
}
# Initialisations that change the base model, which the adapter's file does not contain.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of tensors that are not factors of a linear module or of experts, by a part of their names.
_OTHER = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapter on an embedding",
    ".bias": "a bias",
    "modules_to_save": "a module trained as a whole",
}


def is_peft(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> bool:
    """Return whether a folder is in PEFT's format. Some trainers write its keys beside mlx-lm's,
    with mlx-lm's file: that is mlx-lm's format."""
    if "lora_parameters" in config or "fine_tune_type" in config:
        return False
    return "peft_type" in config or any(
        (Path(folder) / n).exists() for n in (PEFT_WEIGHTS, _PICKLED)
    )


def read_peft(
    folder: str | os.PathLike[str], config: Mapping[str, Any], shapes: Shapes
) -> dict[str, Factors]:
    """Read the factors of each module, by our paths. Encoder and decoder share their weights here,
    so an adapter must be equal on both, or be on the decoder alone, which warns unless it was
    certainly trained on shared weights.

    Args:
      folder: with both files.
      config: its adapter_config.json.
      shapes: of the model's weights, which tell which of an expert block's arrays is meant.

    Raises:
      SourceError: if the adapter is not supported or does not fit these weights.
    """
    file = Path(folder) / PEFT_WEIGHTS
    _check_config(config, Path(folder) / "adapter_config.json")
    if not file.exists() and file.with_name(_PICKLED).is_file():
        raise SourceError(
            f"{folder}: {_PICKLED} is pickled, which is not read; "
            "save the adapter again as safetensors"
        )
    names = _paired(file)
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    found: dict[str, Factors] = {}
    for module, (a, b) in names.items():
        path, factors = _factors(module, arrays[a], arrays[b], config, shapes, file)
        if path in found:
            raise SourceError(f"{file}: {path} has two adapters, and only one is read")
        found[path] = factors
    return _shared(found, config, file)


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise SourceError(f"{path}: peft_type {kind!r} is not supported, only LORA")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise SourceError(f"{path}: no support for {what}, got {key} {config[key]!r}")
    if (bias := config.get("bias", "none")) != "none":
        raise SourceError(f"{path}: no support for trained biases, got bias {bias!r}")
    begins = config.get("init_lora_weights", True)
    if isinstance(begins, str) and begins.startswith(_CHANGES_BASE):
        raise SourceError(
            f"{path}: init_lora_weights {begins!r} changed the base model too; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it one of the original"
        )


def _paired(file: Path) -> dict[str, tuple[str, str]]:
    """Return the names of each module's two factors."""
    halves: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in read_float_header(file):
        match = _FACTOR.fullmatch(name)
        if match is None or "lora_embedding_" in name:
            other = next((what for part, what in _OTHER.items() if part in name), None)
            reason = f"{other}, which is not supported" if other else "not a factor of an adapter"
            raise SourceError(f"{file}: {name} is {reason}")
        adapters.add(match["adapter"])
        halves.setdefault(match["module"], {})[match["side"]] = name
    if len(adapters) > 1:
        raise SourceError(
            f"{file} holds several adapters, {', '.join(sorted(map(str, adapters)))}; "
            "save one alone"
        )
    for both in halves.values():
        if len(both) < 2:
            raise SourceError(f"{file}: {next(iter(both.values()))} has no other half")
    return {module: (both["A"], both["B"]) for module, both in halves.items()}


def _factors(
    name: str, a: mx.array, b: mx.array, config: Mapping[str, Any], shapes: Shapes, file: Path
) -> tuple[str, Factors]:
    """Return a module's path under transformers' names, and its factors. PEFT's are A [r, inputs]
    and B [outputs, r], of experts A [E r, inputs] and B [outputs, r E]."""
    path = _path(name)
    if "vision" in path:
        raise SourceError(f"{file}: {path} is of the vision tower, of which adapters are not read")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise SourceError(
            f"{file}: {name} has factors of shapes {list(a.shape)} and {list(b.shape)}, "
            "which do not belong together"
        )
    if not path.endswith(".experts"):
        scale = _scale(path, a.shape[0], config, file)
        return path, Factors(a.T, b.T, scale)
    for leaf in _EXPERTS:
        shape = shapes.get(_decoder_path(f"{path}.{leaf}"))
        if shape is None or shape[1:] != (b.shape[0], a.shape[1]) or a.shape[0] % shape[0]:
            continue
        count, rank = shape[0], a.shape[0] // shape[0]
        scale = _scale(f"{path}.{leaf}", rank, config, file)
        # In B's columns the expert index runs fastest, in A's rows the rank index.
        b = b.reshape(-1, rank, count).transpose(2, 0, 1)
        return f"{path}.{leaf}", Factors(a.reshape(count, rank, -1), b, scale)
    raise SourceError(
        f"{file}: {name} has factors of shapes {list(a.shape)} and {list(b.shape)}, which fit "
        f"neither {' nor '.join(_EXPERTS)} here; was it made for another model?"
    )


def _path(name: str) -> str:
    """Return the path in transformers' model. PEFT nests wrappers for several arrays of one
    module."""
    path = name.removeprefix("base_model.model.")
    if path.startswith(("decoder.", "encoder.")):  # trained without the head
        path = f"model.{path}"
    return re.sub(r"(\.base_layer)+$", "", path)


def _decoder_path(path: str) -> str:
    return _DECODER + path[len(_ENCODER) :] if path.startswith(_ENCODER) else path


def _scale(path: str, rank: int, config: Mapping[str, Any], file: Path) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rank-stabilised adapters; patterns may set both."""
    where = file.with_name("adapter_config.json")
    r = _by_pattern(config, "rank_pattern", "r", 8, path, where)
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", 8, path, where)
    if r != rank:
        raise SourceError(f"{where} says rank {r:g} for {path}, but its factors have rank {rank}")
    return float(alpha / r**0.5 if config.get("use_rslora") else alpha / r)


def _by_pattern(
    config: Mapping[str, Any], patterns: str, key: str, default: int, path: str, where: Path
) -> float:
    """Return the value of the first pattern that matches the end of the path, else the common
    one."""
    chosen = config.get(patterns) or {}
    if not isinstance(chosen, Mapping):
        raise SourceError(f"{where}: {patterns} must be an object, got {chosen!r}")
    value = config.get(key, default)
    for pattern, own in chosen.items():
        try:
            is_match = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise SourceError(f"{where}: {patterns} {pattern!r}: {error}") from error
        if is_match:
            value, key = own, f"{patterns} {pattern!r}"
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise SourceError(f"{where}: {key} must be a number above 0, got {value!r}")
    return value


def _shared(
    found: Mapping[str, Factors], config: Mapping[str, Any], file: Path
) -> dict[str, Factors]:
    """Return one adapter for both sides of shared weights."""
    decoder = {path: own for path, own in found.items() if not path.startswith(_ENCODER)}
    for path in found:
        if not path.startswith(_ENCODER):
            continue
        twin = _decoder_path(path)
        if twin not in decoder:
            raise SourceError(
                f"{file}: {path} has an adapter and {twin} has none, so that it acts where text "
                "is read and not on the canvas; the two share their weights here"
            )
        if not found[path].equals(decoder[twin]):
            raise SourceError(
                f"{file}: {path} and {twin} have different adapters; the two share their weights "
                "here, so only equal ones can be used"
            )
    alone = [path for path in decoder if _twin(path) and _twin(path) not in found]
    if any(_twin(path) in found for path in decoder) and alone:
        raise SourceError(
            f"{file}: {alone[0]} has an adapter and {_twin(alone[0])} has none, while other "
            "modules have both; the two share their weights here"
        )
    if any(not _is_targeted(_twin(path), config) for path in alone):
        warnings.warn(
            f"{file} adapts the decoder alone; encoder and decoder share their weights here, so "
            "it acts on both, as after PEFT's merge_and_unload; PEFT without merging leaves the "
            "encoder as it was",
            stacklevel=2,
        )
    return decoder


def _twin(path: str) -> str:
    """Return the encoder's name of a shared module; empty if only the decoder has it."""
    return _ENCODER + path[len(_DECODER) :] if path.startswith(_DECODER) else ""


def _is_targeted(path: str, config: Mapping[str, Any]) -> bool:
    """Return whether PEFT would put an adapter on a module of transformers' model. If it would, and
    there is none, the trainer's model shared that module with the decoder."""
    if _matches(path, config.get("exclude_modules")):
        return False
    return any(_matches(path, config.get(key)) for key in ("target_modules", "target_parameters"))


def _matches(path: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    names: Iterable[str] = targets or ()
    return any(path == name or path.endswith(f".{name}") for name in names)
