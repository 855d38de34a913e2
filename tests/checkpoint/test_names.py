"""The table of tensor names against all 1,047 names of the official checkpoint."""

from __future__ import annotations

import re

import pytest

from mlx_diffgemma.checkpoint.names import (
    FOREIGN_VISION,
    RULES,
    VISION,
    Ignored,
    is_bound,
    keep_as,
    part_of,
    translate,
)
from mlx_diffgemma.errors import WeightsError

LAYERS, FULL_LAYERS, VISION_LAYERS = 30, (5, 11, 17, 23, 29), 27
NORMS = (
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm "
    "pre_feedforward_layernorm_2 post_feedforward_layernorm_1 post_feedforward_layernorm_2"
).split()


def official_names() -> list[str]:
    """Names of the published 26B checkpoint, from the rules that its layers follow."""
    decoder, encoder = "model.decoder.", "model.encoder."
    names = [decoder + "embed_tokens.weight", decoder + "norm.weight"]
    names += [f"{decoder}self_conditioning.{n}.weight" for n in ("pre_norm", *_mlp())]
    for i in range(LAYERS):
        layer = f"{decoder}layers.{i}."
        attention = "qko" if i in FULL_LAYERS else "qkvo"  # full layers have no v_proj
        names += [layer + "layer_scalar", f"{encoder}language_model.layers.{i}.layer_scalar"]
        names += [f"{layer}{norm}.weight" for norm in NORMS]
        names += [f"{layer}self_attn.{x}_proj.weight" for x in attention]
        names += [f"{layer}self_attn.{x}_norm.weight" for x in "qk"]
        names += [f"{layer}mlp.{x}.weight" for x in _mlp()]
        names += [f"{layer}router.{x}" for x in ("proj.weight", "scale", "per_expert_scale")]
        names += [f"{layer}experts.{x}" for x in ("gate_up_proj", "down_proj")]
    tower = encoder + "vision_tower."
    names += [encoder + "embed_vision.embedding_projection.weight"]
    names += [tower + "std_bias", tower + "std_scale"]
    names += [f"{tower}patch_embedder.{x}" for x in _patches()]
    for i in range(VISION_LAYERS):
        layer = f"{tower}encoder.layers.{i}."
        names += [f"{layer}self_attn.{x}_proj.linear.weight" for x in "qkvo"]
        names += [f"{layer}self_attn.{x}_norm.weight" for x in "qk"]
        names += [f"{layer}mlp.{x}.linear.weight" for x in _mlp()]
        names += [f"{layer}{norm}.weight" for norm in NORMS[:4]]
    return names


def _mlp() -> tuple[str, ...]:
    return ("gate_proj", "up_proj", "down_proj")


def _patches() -> tuple[str, ...]:
    return ("input_proj.weight", "position_embedding_table")


def test_all_1047_official_names_are_used():
    names = official_names()
    assert len(names) == len(set(names)) == 1047
    results = [translate(name) for name in names]
    assert all(isinstance(result, str) for result in results)
    assert len(set(results)) == len(results), "two tensors would become one"


def test_only_the_bare_expert_arrays_are_renamed_and_renaming_twice_changes_nothing():
    for name in official_names():
        target = translate(name)
        if isinstance(target, Ignored):
            continue
        assert target == name + (".weight" if ".experts." in name else "")
        assert translate(target) == target


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_every_matrix_may_come_packed(leaf):
    for name in official_names():
        module = translate(name)
        if not module.endswith(".weight"):
            continue
        if "norm" in module:
            continue
        packed = module.removesuffix("weight") + leaf
        assert translate(packed) == packed


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.0.self_attn.k_scale",
        "model.decoder.layers.0.self_attn.v_proj.v_scale",
        "model.encoder.language_model.layers.11.self_attn.q_scale",
        "model.decoder.layers.0.experts.7.up_proj.input_scale",
        "model.decoder.layers.0.mlp.up_proj.input_global_scale",
        "model.decoder.rotary_emb.inv_freq",
        "model.decoder.layers.0.self_attn.rotary_emb.inv_freq",
        "model.encoder.language_model.rotary_emb.full_attention_original_inv_freq",
        "model.encoder.vision_tower.rotary_emb.inv_freq",
        "model.encoder.embed_vision.embedding.weight",
    ],
)
def test_tensors_that_other_programs_add_are_ignored_with_a_reason(name):
    result = translate(name)
    assert isinstance(result, Ignored) and result.reason


def vision_spellings(module: str) -> tuple[str, ...]:
    """The names of a module of vision that programs give it."""
    below = module.removeprefix("model.encoder.")
    flat = below.removesuffix(".linear")
    return (module, f"model.{below}", f"encoder.{below}", below, f"model.encoder.{flat}", flat)


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_vision_has_one_name_however_programs_call_it(leaf):
    for name in official_names():
        if ("vision" in name and name.endswith("proj.weight")) or name.endswith("linear.weight"):
            module = name.removesuffix(".weight")
            for spelling in vision_spellings(module):
                assert translate(f"{spelling}.{leaf}") == f"{module}.{leaf}", spelling


def test_bounds_of_the_towers_numbers_belong_to_it():
    for bound in ("input_min", "input_max", "output_min", "output_max"):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.encoder.vision_tower.encoder.layers.3.{part}.{bound}"
            assert translate(name) == name and part_of(name) == VISION and is_bound(name)


@pytest.mark.parametrize(
    "leaf",
    "weight_scale weight_scale_2 input_scale weight_packed "
    "weight_global_scale weight_zero_point qweight qzeros g_idx weight.absmax SCB".split(),
)
def test_vision_in_a_foreign_packing_is_left_out_and_copied(leaf):
    modules = {n.removesuffix(".weight") for n in official_names() if "vision" in n}
    for module in modules:
        for name in vision_spellings(module):
            assert translate(f"{name}.{leaf}") == Ignored(FOREIGN_VISION), name
            assert keep_as(f"{name}.{leaf}") == f"{name}.{leaf}"
            assert part_of(f"{name}.{leaf}") == VISION


def test_the_encoders_names_are_those_of_the_weights_that_it_shares_with_the_decoder():
    own = ("layer_scalar", "self_conditioning")
    for name in official_names():
        if "vision" in name or "encoder" in name or any(word in name for word in own):
            continue
        encoders = name.replace("decoder", "encoder.language_model", 1)
        assert translate(encoders) == translate(name)
    for leaf in ("weight", "scales", "biases"):
        assert translate(f"lm_head.{leaf}") == f"model.decoder.embed_tokens.{leaf}"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.0.self_attn.q_proj.bias",
        "model.decoder.layers.0.self_attn.q_proj.lora_A.weight",
        "model.decoder.layers.x.layer_scalar",
        "model.decoder.layers.0.experts.5.gate_proj.weight",
        "model.decoder.layers.0.experts.gate_up_proj.weight_scale",
        "model.decoder.embed_tokens",
        "lm_head",
        "lm_head.bias",
        "model.encoder.language_model.self_conditioning.pre_norm.weight",
        "model.encoder.language_model.layers.0.self_attn.q_proj.bias",
        "model.decoder.layers.0.self_attn.vision_tower.weight",
        "model.decoder.layers.0.k_scale",
        "xmodel.decoder.norm.weight",
        "model.decoder.norm.weight\n",
        "model_decoder_norm_weight",
        "",
    ],
)
def test_a_name_that_no_rule_knows_is_refused(name):
    with pytest.raises(WeightsError, match="is not part of DiffusionGemma") as raised:
        translate(name)
    assert "\n" not in str(raised.value)


def test_no_name_matches_two_rules():
    for name in official_names():
        matching = [rule for rule in RULES if re.fullmatch(rule.pattern, name)]
        # What is left of vision is whatever no rule before takes.
        own = [rule for rule in matching if rule.reason != FOREIGN_VISION]
        assert len(own) == 1 and matching[0] is own[0], (name, matching)


def test_each_rule_leads_to_a_name_or_says_why_not():
    assert all((rule.target is None) == bool(rule.reason) for rule in RULES)


def test_every_part_of_the_model_is_told_from_its_names():
    counted: dict[str, int] = {}
    for name in official_names():
        counted[part_of(name)] = counted.get(part_of(name), 0) + 1
    assert counted == {
        "embedding": 1,
        "self-conditioning": 4,
        "attention": 25 * 4 + 5 * 3,
        "dense MLP": 90,
        "router": 90,
        "experts": 60,
        "vision": 5 + 27 * 13,
        "norms and scalars": 1 + 30 * (2 + 7 + 2),
    }
