"""The checkpoint's configuration: every key it may hold, every check. Imports no mlx."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .formats import foreign_format, mlx_block, refusal, source_of
from .generation import GenerationSettings, warn_unknown

LayerType = Literal["sliding_attention", "full_attention"]
Raw = Mapping[str, Any]

GLOBAL_HEAD_DIM = 512  # transformers' fallback where config.json has neither spelling
PAD_TOKEN_ID = 0
_LARGEST = 2**31 - 1  # of a dimension
_MOST_LAYERS = 10_000  # a damaged file must not make us build a list without end

# bits and group sizes that MLX packs, per mode
QUANTIZATION_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}

# Keys of published files that say nothing to a text runtime. Any other unknown key is named in one
# warning.
_INERT_TOP = frozenset(
    "architectures dtype torch_dtype initializer_range transformers_version "
    "vision_soft_tokens_per_image audio_config audio_token_id video_token_id generation_config "
    "quantization quantization_config compression_config vision_config model_type _name_or_path "
    "tie_word_embeddings text_config canvas_length boi_token_id image_token_id eoi_token_id "
    "eos_token_id pad_token_id bos_token_id is_encoder_decoder return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward id2label label2id problem_type use_cache".split()
)
_INERT_TEXT = frozenset(
    "attention_dropout dtype torch_dtype initializer_range model_type bos_token_id use_cache "
    "_name_or_path architectures is_encoder_decoder return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward id2label label2id problem_type "
    "attention_bias use_bidirectional_attention tie_word_embeddings eos_token_id pad_token_id "
    "layer_types rope_parameters hidden_activation global_head_dim num_global_key_value_heads "
    "per_layer_config".split()
)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Attention of one layer. Layers of one type are alike."""

    type: LayerType
    head_dim: int
    num_key_value_heads: int

    @property
    def is_sliding(self) -> bool:
        return self.type == "sliding_attention"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one layer type: all of a head ("default"), or its first part
    ("proportional")."""

    rope_type: Literal["default", "proportional"]
    rope_theta: float
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`text_config` of config.json. Names are the checkpoint's keys."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    rope: Mapping[LayerType, RopeConfig]
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> TextConfig:
        """Both spellings of the per-layer keys are read; unknown keys warn, values we cannot
        honour are refused."""
        counts = {
            name: _integer(raw, name, where)
            for name in (
                "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "num_key_value_heads head_dim sliding_window num_experts top_k_experts "
                "moe_intermediate_size max_position_embeddings"
            ).split()
        }
        warn_unknown(raw, {f.name for f in fields(cls)} - {"layers", "rope"} | _INERT_TEXT, where)
        _refuse_unless(
            raw, "hidden_activation", ("gelu_pytorch_tanh",), where, default="gelu_pytorch_tanh"
        )
        _refuse_unless(raw, "use_bidirectional_attention", ("vision", None), where, default=None)
        _refuse_unless(raw, "attention_bias", (False,), where, default=False)
        _refuse_unless(raw, "tie_word_embeddings", (True,), where, default=True)
        if counts["top_k_experts"] > counts["num_experts"]:
            raise ConfigError(
                f"{where}: top_k_experts is {counts['top_k_experts']}, "
                f"but there are only {counts['num_experts']} experts"
            )
        types = _layer_types(raw, counts["num_hidden_layers"], where)
        layers = _layers(raw, types, counts["head_dim"], counts["num_key_value_heads"], where)
        widest = max(
            2 * counts["moe_intermediate_size"],
            *(counts["num_attention_heads"] * layer.head_dim for layer in layers),
        )
        if widest > _LARGEST:
            raise ConfigError(
                f"{where}: heads times head size, or twice moe_intermediate_size, is {widest}, "
                f"more than the {_LARGEST} that MLX can count"
            )
        for layer in layers:
            if counts["num_attention_heads"] % layer.num_key_value_heads:
                raise ConfigError(
                    f"{where}: {counts['num_attention_heads']} attention heads cannot share "
                    f"{layer.num_key_value_heads} key/value heads ({layer.type}); "
                    "the first must be a multiple of the second"
                )
            if layer.head_dim % 2:
                raise ConfigError(
                    f"{where}: head size {layer.head_dim} ({layer.type}) must be even "
                    "for rotary embedding"
                )
        return cls(
            **counts,
            layers=layers,
            rope={
                kind: _rope(raw, kind, where) for kind in ("sliding_attention", "full_attention")
            },
            rms_norm_eps=_positive(raw, "rms_norm_eps", where, 1e-6),
            final_logit_softcapping=_positive(raw, "final_logit_softcapping", where, 30.0),
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one module is packed."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> Quantization:
        """`{"group_size": 64, "bits": 4}` is affine: a missing mode never means the file's global
        one."""
        mode = raw.get("mode", "affine")
        if not isinstance(mode, str) or mode not in QUANTIZATION_MODES:
            raise ConfigError(
                f"{where}: quantization mode {mode!r} is not one of {', '.join(QUANTIZATION_MODES)}"
            )
        bits, group_size = _integer(raw, "bits", where), _integer(raw, "group_size", where)
        legal_bits, legal_groups = QUANTIZATION_MODES[mode]
        if bits not in legal_bits or group_size not in legal_groups:
            raise ConfigError(
                f"{where}: {mode} cannot pack {bits} bits in groups of {group_size}; "
                f"bits {list(legal_bits)} and groups {list(legal_groups)} exist"
            )
        return cls(group_size, bits, mode)


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization` block: a setting for every module, and overrides by module path."""

    default: Quantization
    overrides: Mapping[str, Quantization | None]  # None: the module is left as it is

    def for_module(self, *paths: str) -> Quantization | None:
        """Return the setting of a module whose weights come with scales, under any of its names."""
        named = next((path for path in paths if path in self.overrides), None)
        return self.default if named is None else self.overrides[named]

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> QuantizationConfig:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: quantization must be an object, got {raw!r}")
        overrides: dict[str, Quantization | None] = {}
        for path, value in raw.items():
            if isinstance(value, Mapping):
                overrides[path] = Quantization.from_dict(
                    value, where=f"{where}: quantization of {path}"
                )
            elif isinstance(value, bool):
                overrides[path] = Quantization.from_dict(raw, where=where) if value else None
        return cls(Quantization.from_dict(raw, where=f"{where}: quantization"), overrides)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A checkpoint's config.json and generation_config.json together."""

    text: TextConfig
    canvas_length: int
    image_token_ids: tuple[int, ...]  # begin, soft token, end
    eos_token_ids: tuple[int, ...]  # the union of both files
    pad_token_id: int
    quantization: QuantizationConfig | None
    generation: GenerationSettings
    has_vision: bool

    @classmethod
    def from_dict(
        cls, raw: Raw, generation: Raw | None = None, *, where: str = "config.json"
    ) -> ModelConfig:
        """`generation` is generation_config.json; without it, the copy that mlx-vlm puts into
        config.json is read."""
        if raw.get("model_type") != "diffusion_gemma":
            raise ConfigError(
                f"{where}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'"
            )
        if not isinstance(raw.get("text_config"), Mapping):
            raise ConfigError(f"{where}: text_config is missing")
        if found := foreign_format(raw):
            raise ConfigError(f"{where}: {refusal(found, source_of(Path(where).parent))}")
        warn_unknown(raw, _INERT_TOP, where)
        _refuse_unless(raw, "tie_word_embeddings", (True,), where, default=True)
        text = TextConfig.from_dict(raw["text_config"], where=f"{where}, text_config")
        generation = generation if generation is not None else raw.get("generation_config") or {}
        if not isinstance(generation, Mapping):
            raise ConfigError(f"{where}: generation_config must be an object, got {generation!r}")
        eos: set[int] = set()
        for name, block in (
            (where, raw),
            (f"{where}, text_config", raw["text_config"]),
            ("generation_config.json", generation),
        ):
            ids = block.get("eos_token_id")
            ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            for token in ids:
                if not _is_token(token, text.vocab_size):
                    raise ConfigError(
                        f"{name}: eos_token_id {token!r} is outside "
                        f"the vocabulary of {text.vocab_size}"
                    )
            eos.update(ids)
        pad = next(
            (
                b["pad_token_id"]
                for b in (generation, raw, raw["text_config"])
                if b.get("pad_token_id") is not None
            ),
            PAD_TOKEN_ID,
        )
        if not _is_token(pad, text.vocab_size):
            raise ConfigError(
                f"{where}: pad_token_id {pad!r} is outside the vocabulary of {text.vocab_size}"
            )
        image_keys = ("boi_token_id", "image_token_id", "eoi_token_id")
        image_ids = [(key, raw[key]) for key in image_keys if raw.get(key) is not None]
        for key, token in image_ids:
            if not _is_token(token, text.vocab_size):
                raise ConfigError(
                    f"{where}: {key} {token!r} is outside the vocabulary of {text.vocab_size}"
                )
        quantization = mlx_block(raw)
        return cls(
            text=text,
            canvas_length=_integer(raw, "canvas_length", where),
            image_token_ids=tuple(token for _, token in image_ids),
            eos_token_ids=tuple(sorted(eos)),
            pad_token_id=pad,
            quantization=QuantizationConfig.from_dict(quantization, where=where)
            if quantization
            else None,
            generation=GenerationSettings.from_dict(generation, where="generation_config.json"),
            has_vision=bool(raw.get("vision_config")),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads config.json and, where there is one, generation_config.json.

        Raises:
          ConfigError: if a file is missing, is not JSON, or holds an impossible value.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no config.json; a DiffusionGemma checkpoint folder is expected"
            )
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_json(path),
            read_json(generation) if generation.is_file() else None,
            where=str(path),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ConfigError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless digits or nesting
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _integer(raw: Raw, key: str, where: str) -> int:
    value = raw.get(key)
    if value is None:
        raise ConfigError(f"{where}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")
    if value > _LARGEST:
        raise ConfigError(f"{where}: {key} is {value}, more than the {_LARGEST} that MLX can count")
    return value


def _is_token(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _positive(raw: Raw, key: str, where: str, default: float) -> float:
    value = raw.get(key, default)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not 0 < value <= sys.float_info.max
    ):
        raise ConfigError(f"{where}: {key} must be a number above 0, got {value!r}")
    return float(value)


def _refuse_unless(
    raw: Raw, key: str, allowed: tuple[Any, ...], where: str, *, default: Any
) -> None:
    value = raw.get(key, default)
    if value not in allowed:
        raise ConfigError(
            f"{where}: {key} is {value!r}; only {' or '.join(map(repr, allowed))} is supported"
        )


def _layer_types(raw: Raw, count: int, where: str) -> tuple[LayerType, ...]:
    if count > _MOST_LAYERS:
        raise ConfigError(f"{where}: num_hidden_layers is {count}, more than {_MOST_LAYERS}")
    types = raw.get("layer_types")
    if types is None:  # five sliding layers, then a full one
        types = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)
        ]
    if not isinstance(types, list) or len(types) != count:
        size = len(types) if isinstance(types, list) else repr(types)
        raise ConfigError(f"{where}: layer_types lists {size} layers, num_hidden_layers is {count}")
    if unknown := sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"}):
        raise ConfigError(
            f"{where}: layer_types holds {unknown}; sliding_attention and full_attention exist"
        )
    return (
        *types[:-1],
        "full_attention",
    )  # transformers forces the last one, whatever the file says


def _layers(
    raw: Raw, types: tuple[LayerType, ...], head_dim: int, kv_heads: int, where: str
) -> tuple[LayerConfig, ...]:
    """Head sizes per layer from `per_layer_config`, or from `global_head_dim` and
    `num_global_key_value_heads`."""
    has_old = "global_head_dim" in raw or raw.get("num_global_key_value_heads") is not None
    global_head_dim = (
        _integer(raw, "global_head_dim", where) if "global_head_dim" in raw else GLOBAL_HEAD_DIM
    )
    global_kv_heads = kv_heads
    if raw.get("num_global_key_value_heads") is not None:
        global_kv_heads = _integer(raw, "num_global_key_value_heads", where)
    old = tuple(
        LayerConfig(kind, head_dim, kv_heads)
        if kind == "sliding_attention"
        else LayerConfig(kind, global_head_dim, global_kv_heads)
        for kind in types
    )
    if "per_layer_config" not in raw:
        return old
    overrides = raw["per_layer_config"]
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{where}: per_layer_config must be an object, got {overrides!r}")
    indices = {str(i) for i in range(len(types))}
    for key, value in overrides.items():
        if str(key) not in indices or not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}: per_layer_config has {key!r}: {value!r}; "
                f"keys are layer indices below {len(types)}"
            )
        if unknown := sorted(set(value) - {"head_dim", "num_key_value_heads"}):
            raise ConfigError(
                f"{where}: per_layer_config of layer {key} sets {unknown}, which is not supported"
            )
    by_index = {int(key): value for key, value in overrides.items()}
    base = {"head_dim": head_dim, "num_key_value_heads": kv_heads}
    new = tuple(
        LayerConfig(
            kind,
            _integer(
                {**base, **by_index.get(i, {})},
                "head_dim",
                f"{where}, per_layer_config of layer {i}",
            ),
            _integer(
                {**base, **by_index.get(i, {})},
                "num_key_value_heads",
                f"{where}, per_layer_config of layer {i}",
            ),
        )
        for i, kind in enumerate(types)
    )
    if len(set(new)) > len(set(types)):
        raise ConfigError(
            f"{where}: per_layer_config gives layers of one type different head sizes or heads"
        )
    for given, wanted, key in (
        ("global_head_dim" in raw, global_head_dim, "head_dim"),
        (raw.get("num_global_key_value_heads") is not None, global_kv_heads, "num_key_value_heads"),
    ):
        found = next(getattr(layer, key) for layer in new if not layer.is_sliding)
        if has_old and given and found != wanted:
            raise ConfigError(
                f"{where}: the two spellings disagree: full layers have {key} {found} "
                f"in per_layer_config "
                f"and {wanted} in the global key"
            )
    return new


def _rope(raw: Raw, kind: LayerType, where: str) -> RopeConfig:
    defaults: dict[str, dict[str, Any]] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
        },
    }
    table = raw.get("rope_parameters")
    table = defaults if table is None else table
    if not isinstance(table, Mapping) or not isinstance(table.get(kind), Mapping):
        raise ConfigError(f"{where}: rope_parameters has no entry for {kind}")
    rope, where = table[kind], f"{where}, rope_parameters of {kind}"
    _refuse_unless(rope, "rope_type", ("default", "proportional"), where, default=None)
    if unknown := sorted(set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}):
        raise ConfigError(f"{where}: {unknown} is not supported")
    factor = _positive(rope, "partial_rotary_factor", where, 1.0)
    if factor > 1 or (rope["rope_type"] == "default" and factor != 1):
        raise ConfigError(
            f"{where}: partial_rotary_factor {factor} is not possible "
            f"with rope_type {rope['rope_type']}"
        )
    if "rope_theta" not in rope:
        raise ConfigError(f"{where}: rope_theta is missing")
    return RopeConfig(rope["rope_type"], _positive(rope, "rope_theta", where, 1.0), factor)
