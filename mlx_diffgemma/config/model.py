"""The checkpoint's configuration: its keys and their checks. Imports no mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .formats import foreign_format, mlx_block, refusal, source_of
from .generation import GenerationSettings
from .generation_file import read_settings
from .images import DEFAULT_BUDGET, budget_of
from .quantization import QuantizationConfig
from .reading import (
    LARGEST,
    Raw,
    integer,
    positive,
    read_json,
    refuse_other_tokens,
    refuse_unless,
    warn_unknown,
)
from .vision import VisionConfig

LayerType = Literal["sliding_attention", "full_attention"]

GLOBAL_HEAD_DIM = 512  # transformers' fallback if config.json has neither spelling
PAD_TOKEN_ID = 0
# Settings of ours that suit a checkpoint, in config.json: transformers refuses unknown keys in
# generation_config.json.
_OWN = "mlx_diffgemma"
_MOST_LAYERS = 10_000  # bounds the lists that a damaged file makes us build

# Keys of published files that a text runtime does not need. One warning names all other unknown
# keys.
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
    are_images_bidirectional: bool = True  # use_bidirectional_attention: "vision", not null

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> TextConfig:
        """Read `text_config`, with either spelling of the per-layer keys. Unknown keys warn;
        unsupported values are refused."""
        counts = {
            name: integer(raw, name, where)
            for name in (
                "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "num_key_value_heads head_dim sliding_window num_experts top_k_experts "
                "moe_intermediate_size max_position_embeddings"
            ).split()
        }
        made = {"layers", "rope", "are_images_bidirectional"}
        warn_unknown(raw, {f.name for f in fields(cls)} - made | _INERT_TEXT, where)
        refuse_unless(
            raw, "hidden_activation", ("gelu_pytorch_tanh",), where, default="gelu_pytorch_tanh"
        )
        refuse_unless(raw, "use_bidirectional_attention", ("vision", None), where, default=None)
        refuse_unless(raw, "attention_bias", (False,), where, default=False)
        refuse_unless(raw, "tie_word_embeddings", (True,), where, default=True)
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
        if widest > LARGEST:
            raise ConfigError(
                f"{where}: heads times head size, or twice moe_intermediate_size, is {widest}, "
                f"more than the {LARGEST} that MLX can count"
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
            rms_norm_eps=positive(raw, "rms_norm_eps", where, 1e-6),
            final_logit_softcapping=positive(raw, "final_logit_softcapping", where, 30.0),
            are_images_bidirectional=raw.get("use_bidirectional_attention") == "vision",
        )


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
    vision: VisionConfig | None  # None: the model reads no images
    image_token_id: int | None  # the soft token; one of `image_token_ids`
    image_tokens: int = DEFAULT_BUDGET  # the most of an image, from the processor's files

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @classmethod
    def from_dict(
        cls, raw: Raw, generation: Raw | None = None, *, where: str = "config.json"
    ) -> ModelConfig:
        """Read config.json and `generation` (generation_config.json); without the latter, the copy
        that mlx-vlm puts into config.json. The settings of `mlx_diffgemma` in config.json come
        before those of generation_config.json."""
        if raw.get("model_type") != "diffusion_gemma":
            raise ConfigError(
                f"{where}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'"
            )
        if not isinstance(raw.get("text_config"), Mapping):
            raise ConfigError(f"{where}: text_config is missing")
        if found := foreign_format(raw):
            raise ConfigError(f"{where}: {refusal(found, source_of(Path(where).parent))}")
        warn_unknown(raw, _INERT_TOP | {_OWN}, where)
        refuse_unless(raw, "tie_word_embeddings", (True,), where, default=True)
        text = TextConfig.from_dict(raw["text_config"], where=f"{where}, text_config")
        generation = generation if generation is not None else raw.get("generation_config") or {}
        if not isinstance(generation, Mapping):
            raise ConfigError(f"{where}: generation_config must be an object, got {generation!r}")
        own = raw.get(_OWN) or {}
        if not isinstance(own, Mapping):
            raise ConfigError(f"{where}: {_OWN} must be an object, got {own!r}")
        suits = read_settings(own, where=f"{where}, {_OWN}")
        eos: set[int] = set()
        for name, block in (
            (where, raw),
            (f"{where}, text_config", raw["text_config"]),
            ("generation_config.json", generation),
        ):
            ids = block.get("eos_token_id")
            ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            for token in ids:
                refuse_other_tokens(token, text.vocab_size, f"{name}: eos_token_id")
            eos.update(ids)
        pad = next(
            (
                b["pad_token_id"]
                for b in (generation, raw, raw["text_config"])
                if b.get("pad_token_id") is not None
            ),
            PAD_TOKEN_ID,
        )
        refuse_other_tokens(pad, text.vocab_size, f"{where}: pad_token_id")
        image_keys = ("boi_token_id", "image_token_id", "eoi_token_id")
        image_ids = [(key, raw[key]) for key in image_keys if raw.get(key) is not None]
        for key, token in image_ids:
            refuse_other_tokens(token, text.vocab_size, f"{where}: {key}")
        vision = raw.get("vision_config") or None
        if not isinstance(vision, Mapping | None):
            raise ConfigError(f"{where}: vision_config must be an object, got {vision!r}")
        quantization = mlx_block(raw)
        return cls(
            text=text,
            canvas_length=integer(raw, "canvas_length", where),
            image_token_ids=tuple(token for _, token in image_ids),
            eos_token_ids=tuple(sorted(eos)),
            pad_token_id=pad,
            quantization=QuantizationConfig.from_dict(quantization, where=where)
            if quantization
            else None,
            generation=replace(
                read_settings(generation, where="generation_config.json"),
                **{name: value for name, value in vars(suits).items() if value not in (None, ())},
            ),
            vision=None
            if vision is None
            else VisionConfig.from_dict(vision, where=f"{where}, vision_config"),
            image_token_id=raw.get("image_token_id"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read config.json and, where they are, generation_config.json and the processor's files.

        Raises:
          ConfigError: if a file is missing, is not JSON, or holds an impossible value.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no config.json; a DiffusionGemma checkpoint folder is expected"
            )
        generation = folder / "generation_config.json"
        config = cls.from_dict(
            read_json(path),
            read_json(generation) if generation.is_file() else None,
            where=str(path),
        )
        return replace(config, image_tokens=budget_of(folder))


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
    """Return head sizes per layer, from `per_layer_config` or from `global_head_dim` and
    `num_global_key_value_heads`."""
    has_old = "global_head_dim" in raw or raw.get("num_global_key_value_heads") is not None
    global_head_dim = (
        integer(raw, "global_head_dim", where) if "global_head_dim" in raw else GLOBAL_HEAD_DIM
    )
    global_kv_heads = kv_heads
    if raw.get("num_global_key_value_heads") is not None:
        global_kv_heads = integer(raw, "num_global_key_value_heads", where)
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
            integer(
                {**base, **by_index.get(i, {})},
                "head_dim",
                f"{where}, per_layer_config of layer {i}",
            ),
            integer(
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
    refuse_unless(rope, "rope_type", ("default", "proportional"), where, default=None)
    if unknown := sorted(set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}):
        raise ConfigError(f"{where}: {unknown} is not supported")
    factor = positive(rope, "partial_rotary_factor", where, 1.0)
    if factor > 1 or (rope["rope_type"] == "default" and factor != 1):
        raise ConfigError(
            f"{where}: partial_rotary_factor {factor} is not possible "
            f"with rope_type {rope['rope_type']}"
        )
    if "rope_theta" not in rope:
        raise ConfigError(f"{where}: rope_theta is missing")
    return RopeConfig(rope["rope_type"], positive(rope, "rope_theta", where, 1.0), factor)
