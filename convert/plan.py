"""The plan of a conversion, from headers alone: every source and every target is covered once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any

from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.headers import TYPES
from mlx_diffgemma.checkpoint.memory import needed_bytes
from mlx_diffgemma.checkpoint.names import VISION, is_bound, part_of
from mlx_diffgemma.config.formats import without_packing
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.config.quantization import Quantization
from mlx_diffgemma.config.reading import read_json
from mlx_diffgemma.config.vision import VisionConfig
from mlx_diffgemma.errors import ConfigError, WeightsError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.model.vision import Vision

from .origin import without_paths
from .recipe import Recipe, Rule
from .sources import Checkpoint, Packed, Source

SHARD_BYTES = 5_000_000_000
SLICE_BYTES = 64 << 20  # of float32, read at a time
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DEFAULT_DTYPE = "bfloat16"
_FORMAT = 1  # of plans and journals


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Move:
    """One source tensor and its one, two or three outputs: weight, scales, biases."""

    target: str
    source: Source
    setting: Quantization | None
    outputs: tuple[Output, ...]

    @property
    def rows(self) -> int:
        return self.source.shape[0] if self.source.shape else 1  # a scalar is one row

    @property
    def rows_at_a_time(self) -> int:
        row_bytes = 4 * math.prod(self.source.shape[1:])
        return max(1, SLICE_BYTES // max(1, row_bytes))

    @property
    def source_bytes(self) -> int:
        return sum(info.nbytes for info in self.source.infos)

    @property
    def parameters(self) -> int:
        return math.prod(self.source.shape)

    @property
    def part(self) -> str:
        return part_of(self.target)

    def describe(self) -> str:
        if self.setting is None:
            return self.outputs[0].dtype
        s = self.setting
        return f"{s.bits}-bit {s.mode} g{s.group_size}"


@dataclass(frozen=True)
class Plan:
    """All moves of a conversion, before the first is carried out."""

    checkpoint: Checkpoint
    recipe: Recipe | None
    dtype: str
    shards: tuple[tuple[Move, ...], ...]
    config: Mapping[str, Any]  # config.json of the result
    left: tuple[str, ...]  # modules whose width the recipe's groups do not divide
    model: ModelConfig

    @property
    def moves(self) -> tuple[Move, ...]:
        return tuple(move for shard in self.shards for move in shard)

    @property
    def tensor_bytes(self) -> int:
        return sum(output.nbytes for move in self.moves for output in move.outputs)

    def running_bytes(self, context_tokens: int) -> int:
        """Return an estimate of the memory that the result needs, without its vision part."""
        vision = sum(output.nbytes for m in self.moves if m.part == VISION for output in m.outputs)
        return needed_bytes(
            self.model.text,
            self.tensor_bytes - vision,
            context_tokens,
            self.model.canvas_length,
        )

    @property
    def shard_names(self) -> tuple[str, ...]:
        count = len(self.shards)
        if count == 1:
            return ("model.safetensors",)
        return tuple(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))

    def digest(self) -> str:
        """Return a digest that is equal for conversions to the same bytes."""
        facts = {
            "format": _FORMAT,
            "versions": versions(),
            "config": self.config,
            "recipe": self.recipe.as_object() if self.recipe else None,
            "dtype": self.dtype,
            "source": {
                name: [info.file.name, info.dtype, info.shape, info.start]
                for name, info in self.checkpoint.stored.items()
            },
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that the bytes of a result depend on."""
    return {name: metadata.version(name) for name in ("mlx", "mlx-diffgemma")}


def make_plan(
    checkpoint: Checkpoint, *, recipe: Recipe | None, dtype: str | None, dequantize: bool
) -> Plan:
    """Return the plan, with moves in the order of the source's bytes on disk.

    Raises:
      DiffGemmaError: if the request does not suit this source.
    """
    if recipe is not None and dequantize:
        raise ConfigError("-q packs and --dequantize unpacks; give one of them")
    if checkpoint.layout == "mlx" and recipe is None and not dequantize:
        raise ConfigError(
            f"{checkpoint.folder} is packed already; -q packs it again, --dequantize unpacks it"
        )
    if checkpoint.layout == "bf16" and dequantize:
        raise ConfigError(f"{checkpoint.folder} is not packed; --dequantize has no use")
    dtype = dtype or DEFAULT_DTYPE
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    plain = without_packing(without_paths(checkpoint.config))
    generation = checkpoint.folder / "generation_config.json"
    config = ModelConfig.from_dict(
        plain,
        read_json(generation) if generation.is_file() else None,
        where=str(checkpoint.folder / "config.json"),
    )
    _check_targets(checkpoint, config)
    if recipe is not None:
        _check_patterns(checkpoint, recipe)
    moves: list[Move] = []
    left: list[str] = []
    for target, source in checkpoint.tensors.items():
        if part_of(target) == VISION:
            setting = _vision_setting(target, source, recipe, dequantize=dequantize)
        else:
            setting = _setting(target, source, recipe, left)
        moves.append(Move(target, source, setting, _outputs(target, source, setting, dtype)))
    return Plan(
        checkpoint,
        recipe,
        dtype,
        _shards(moves),
        _result_config(plain, config, moves, dtype),
        tuple(left),
        config,
    )


def _check_targets(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check that every parameter has one source of its shape; vision may be missing as a whole."""
    parameters = dict(tree_flatten(DiffusionGemma(config).parameters()))
    expected = {name: tuple(array.shape) for name, array in parameters.items()}
    found = {name for name in checkpoint.tensors if not is_bound(name)}
    if any(part_of(name) == VISION for name in found):
        if config.vision is None:
            raise ConfigError("there are vision tensors, but config.json has no vision_config")
        expected |= vision_shapes(config.vision, config.text.hidden_size)
    if missing := sorted(set(expected) - found):
        raise WeightsError(
            f"tensor {missing[0]} is missing in {checkpoint.folder}, "
            f"expected shape {list(expected[missing[0]])}"
        )
    if extra := sorted(found - set(expected)):
        raise WeightsError(f"tensor {extra[0]} is there, but the config describes no such tensor")
    for name, wanted in expected.items():
        if (shape := checkpoint.tensors[name].shape) != wanted:
            raise WeightsError(f"{name} has shape {list(shape)}, expected {list(wanted)}")
    used = [i for source in checkpoint.tensors.values() for i in source.infos]
    assert len(used) + len(checkpoint.ignored) == len(checkpoint.stored)


def vision_shapes(config: VisionConfig, text_width: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the vision tower and its projection, without bounds."""
    parameters = dict(tree_flatten(Vision(config, text_width).parameters()))
    return {
        f"model.encoder.{name}": tuple(array.shape)
        for name, array in parameters.items()
        if not is_bound(name)
    }


def _check_patterns(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a rule that matches no module, since it is probably misspelt."""
    modules = [
        name.rpartition(".")[0]
        for name, source in checkpoint.tensors.items()
        if _can_be_packed(name, source)
    ]
    for rule in recipe.rules:
        if not any(_applies(rule, module) for module in modules):
            raise ConfigError(
                f"recipe {recipe.name}: pattern {rule.pattern!r} matches no module that can be "
                f"packed, such as {modules[0]}"
            )


def _can_be_packed(target: str, source: Source) -> bool:
    return target.endswith(".weight") and len(source.shape) >= 2


def _applies(rule: Rule, module: str) -> bool:
    """Return whether a rule is about a module. Those of vision are meant only where they are
    named."""
    is_meant = part_of(module) != VISION or VISION in rule.pattern
    return is_meant and fnmatchcase(module, rule.pattern)


def _vision_setting(
    target: str, source: Source, recipe: Recipe | None, *, dequantize: bool
) -> Quantization | None:
    """Return how a tensor of vision is packed: as it is, unless a rule names it or everything is
    unpacked."""
    module = target.removesuffix(".weight")
    if not _can_be_packed(target, source) or dequantize:
        return None
    rules = recipe.rules if recipe is not None else ()
    rule = next((rule for rule in rules if _applies(rule, module)), None)
    if rule is None:
        return source.setting if isinstance(source, Packed) else None
    if rule.setting is not None:
        _check_width(module, source, rule.setting)
    return rule.setting


def _check_width(module: str, source: Source, setting: Quantization) -> None:
    """Refuse a packing that the user chose for a width that it does not divide."""
    if not _fits(source, setting):
        raise ConfigError(
            f"groups of {setting.group_size} at {setting.bits} bits do not divide {module}, "
            f"which is {source.shape[-1]} wide"
        )


def _fits(source: Source, setting: Quantization) -> bool:
    # Rows of packed words must end on a word as well.
    width = source.shape[-1]
    return width % setting.group_size == 0 and width * setting.bits % 32 == 0


def _setting(
    target: str, source: Source, recipe: Recipe | None, left: list[str]
) -> Quantization | None:
    if recipe is None or not _can_be_packed(target, source):
        return None
    module = target.removesuffix(".weight")
    rule = recipe.rule(module)
    if rule is None or rule.setting is None:
        return None
    if _fits(source, rule.setting):
        return rule.setting
    if rule.named:
        _check_width(module, source, rule.setting)
    left.append(module)
    return None


def _outputs(
    target: str, source: Source, setting: Quantization | None, dtype: str
) -> tuple[Output, ...]:
    if setting is None:
        return (Output(target, DTYPES[dtype], source.shape),)
    module = target.removesuffix(".weight")
    *rows, width = source.shape
    groups = (*rows, width // setting.group_size)
    is_affine = setting.mode == "affine"
    packed = [
        Output(target, "U32", (*rows, width * setting.bits // 32)),
        Output(f"{module}.scales", DTYPES[dtype] if is_affine else "U8", groups),
    ]
    if is_affine:
        packed.append(Output(f"{module}.biases", DTYPES[dtype], groups))
    return tuple(packed)


def _shards(moves: list[Move]) -> tuple[tuple[Move, ...], ...]:
    shards: list[list[Move]] = [[]]
    filled = 0
    for move in moves:
        nbytes = sum(output.nbytes for output in move.outputs)
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(move)
        filled += nbytes
    return tuple(tuple(shard) for shard in shards)


def _result_config(
    raw: Mapping[str, Any], config: ModelConfig, moves: list[Move], dtype: str
) -> dict[str, Any]:
    """Return the source's config.json with both spellings of head sizes, and the packing per
    module."""
    full = next(layer for layer in config.text.layers if not layer.is_sliding)
    text = {
        **raw["text_config"],
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads,
    }
    result = {**raw, "text_config": text, "dtype": dtype}
    packed = {m.target.removesuffix(".weight"): m.setting for m in moves if m.setting is not None}
    if packed:
        experts = [setting for path, setting in packed.items() if ".experts." in path]
        default = experts[0] if experts else next(iter(packed.values()))
        block: dict[str, Any] = {
            "group_size": default.group_size,
            "bits": default.bits,
            "mode": default.mode,
        }
        for path, setting in packed.items():
            if setting != default:
                block[path] = {"group_size": setting.group_size, "bits": setting.bits}
                if setting.mode != "affine":  # an entry without a mode is affine
                    block[path]["mode"] = setting.mode
        result["quantization"] = block
        result["quantization_config"] = block
    return result
