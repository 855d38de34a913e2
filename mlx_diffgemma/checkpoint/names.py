"""The table from source tensor names to our names, or to a reason to leave them out. Data only, for
loading and converting.

Our names are those of the mlx-community checkpoints: the official ones, with `.weight` after the
names of expert arrays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import WeightsError

# Encoder and decoder share all weights but the layer scalars; transformers saves them under either
# name, or under both.
_STACK = r"model\.(?:decoder|encoder\.language_model)\."
_LAYER = r"layers\.\d+\."
_PACKED = r"\.(?:weight|scales|biases)"
# Of the encoder alone. Some programs leave out the beginning, or the `linear` of projections.
_VISION = r"(?:model\.)?(?:encoder\.)?"
_TOWER = rf"{_VISION}(vision_tower\.encoder\.layers\.\d+\."


@dataclass(frozen=True, slots=True)
class Rule:
    """Source names that match `pattern` as a whole become `target`; without a target they are left
    out, for `reason`."""

    pattern: str
    target: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ignored:
    reason: str


VISION = "vision"  # the part of the model that reads images
FOREIGN_VISION = "vision in a form that does not load"
ACTIVATIONS = "scales activations, which stay unquantized"
KV_CACHE = "scales a quantized KV cache, which stays unquantized"

RULES = (
    Rule(
        rf"{_STACK}({_LAYER}experts\.(?:gate_up_proj|down_proj))", r"model.decoder.\1.weight"
    ),  # official: bare parameters
    Rule(rf"{_STACK}({_LAYER}experts\.(?:gate_up_proj|down_proj){_PACKED})", r"model.decoder.\1"),
    Rule(rf"{_STACK}({_LAYER}self_attn\.[qkvo]_proj{_PACKED})", r"model.decoder.\1"),
    Rule(rf"{_STACK}({_LAYER}self_attn\.[qk]_norm\.weight)", r"model.decoder.\1"),
    Rule(rf"{_STACK}({_LAYER}mlp\.(?:gate|up|down)_proj{_PACKED})", r"model.decoder.\1"),
    Rule(
        rf"{_STACK}({_LAYER}router\.(?:proj{_PACKED}|scale|per_expert_scale))", r"model.decoder.\1"
    ),
    Rule(
        rf"{_STACK}({_LAYER}(?:input_layernorm|post_attention_layernorm|pre_feedforward_layernorm(?:_2)?"
        r"|post_feedforward_layernorm(?:_1|_2)?)\.weight)",
        r"model.decoder.\1",
    ),
    Rule(r"(model\.decoder\.layers\.\d+\.layer_scalar)", r"\1"),
    Rule(r"(model\.encoder\.language_model\.layers\.\d+\.layer_scalar)", r"\1"),
    Rule(rf"{_STACK}(embed_tokens{_PACKED})", r"model.decoder.\1"),
    Rule(rf"{_STACK}(norm\.weight)", r"model.decoder.\1"),
    Rule(rf"lm_head({_PACKED})", r"model.decoder.embed_tokens\1"),
    Rule(r"(model\.decoder\.self_conditioning\.pre_norm\.weight)", r"\1"),
    Rule(rf"(model\.decoder\.self_conditioning\.(?:gate|up|down)_proj{_PACKED})", r"\1"),
    Rule(
        rf"{_TOWER}(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))(?:\.linear)?({_PACKED})",
        r"model.encoder.\1.linear\2",
    ),
    Rule(
        rf"{_TOWER}(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj\.(?:in|out)put_(?:min|max))",
        r"model.encoder.\1",
    ),
    Rule(
        rf"{_TOWER}(?:self_attn\.[qk]_norm|input_layernorm|post_attention_layernorm"
        r"|pre_feedforward_layernorm|post_feedforward_layernorm)\.weight)",
        r"model.encoder.\1",
    ),
    Rule(
        rf"{_VISION}(vision_tower\.(?:std_bias|std_scale|patch_embedder\.position_embedding_table"
        rf"|patch_embedder\.input_proj{_PACKED}))",
        r"model.encoder.\1",
    ),
    Rule(rf"{_VISION}(embed_vision\.embedding_projection{_PACKED})", r"model.encoder.\1"),
    # What is left of vision does not keep the text from loading.
    Rule(rf"{_VISION}(?:vision_tower|embed_vision)\.[\w.]+", None, FOREIGN_VISION),
    Rule(rf"{_STACK}({_LAYER}(?:\w+\.)+input_(?:global_)?scale)", None, ACTIVATIONS),
    Rule(
        rf"{_STACK}({_LAYER}self_attn\.(?:[qkv]_proj\.)?(?:[qkv]|kv)_(?:scale|zero_point))",
        None,
        KV_CACHE,
    ),
    Rule(r".*rotary_emb\.(.*_)?(original_)?inv_freq", None, "computed from the config"),
)

_COMPILED = tuple((re.compile(rule.pattern), rule) for rule in RULES)


def translate(name: str) -> str | Ignored:
    """Return our name of a source tensor, or why it is left out.

    Raises:
      WeightsError: if no rule knows the name.
    """
    for pattern, rule in _COMPILED:
        if match := pattern.fullmatch(name):
            return Ignored(rule.reason) if rule.target is None else match.expand(rule.target)
    raise WeightsError(
        f"tensor {name} is not part of DiffusionGemma; "
        "was something else saved into this checkpoint?"
    )


def keep_as(name: str) -> str | Ignored:
    """Return `translate`'s name for a converted copy, in which tensors of vision that would not
    load keep their names.

    Raises:
      WeightsError: if no rule knows the name.
    """
    target = translate(name)
    return name if target == Ignored(FOREIGN_VISION) else target


def is_bound(name: str) -> bool:
    """Return whether a tensor is a bound of the vision tower's numbers, which a checkpoint has, or
    whose config says that they are not used."""
    return name.rpartition(".")[2] in ("input_min", "input_max", "output_min", "output_max")


def part_of(name: str) -> str:
    """Return the part of the model that a tensor, under its source name or ours, belongs to: a row
    of `info`'s table."""
    if "vision" in name:
        return VISION
    if ".experts." in name:
        return "experts"
    if ".router." in name:
        return "router"
    if ".self_attn." in name and "_proj" in name:
        return "attention"
    if ".mlp." in name:
        return "dense MLP"
    if ".self_conditioning." in name:
        return "self-conditioning"
    if "embed_tokens" in name or name.startswith("lm_head."):
        return "embedding"
    return "norms and scalars"
