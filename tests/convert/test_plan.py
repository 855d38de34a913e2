from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import DiffGemmaError
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.convert import plan as plan_module
from mlx_diffgemma.convert.write import prepare
from mlx_diffgemma.errors import ConfigError, WeightsError
from tests.checkpoints import draw_tensors
from tests.convert.cases import bf16, is_expert, load_all, official, tiny_config
from tests.convert.test_sources import put, rewrite

EXPERTS = "model.decoder.layers.0.experts.down_proj"
NARROW = {"moe_intermediate_size": 32}  # experts.down_proj is 32 wide


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return official(tmp_path_factory.mktemp("plan") / "source")


def kinds(plan) -> dict[str, str]:
    return {move.target.removesuffix(".weight"): move.describe() for move in plan.moves}


def test_mixed_packs_matrices_of_the_text_part_only(source):
    found = kinds(prepare(source, quantize=True))
    assert found[EXPERTS] == "4-bit affine g64"
    assert found["model.decoder.layers.0.router.proj"] == "8-bit affine g64"
    assert found["model.decoder.embed_tokens"] == "8-bit affine g64"
    assert found["model.decoder.layers.0.input_layernorm"] == "BF16"
    assert found["model.decoder.layers.0.router.scale"] == "BF16"
    assert {kind for name, kind in found.items() if "vision" in name} == {"BF16"}


def test_the_config_says_experts_first_and_what_differs_as_mlx_community_does(source):
    block = prepare(source, quantize=True, q_mode="mxfp4").config["quantization"]
    assert (block["group_size"], block["bits"], block["mode"]) == (32, 4, "mxfp4")
    # no mode: affine, in every published repository
    assert block["model.decoder.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 8}
    assert EXPERTS not in block and not any("vision" in path for path in block)
    # embedding, self-conditioning, routers, dense MLP, attention with and without v_proj
    assert len(block) == 3 + (1 + 3 + 2 + 6 + 4 + 3)


def test_uniform_writes_no_override_and_a_toml_mode_is_spelled_out(source, tmp_path):
    block = prepare(source, quantize=True, recipe="uniform", q_bits=5).config["quantization"]
    assert block == {"group_size": 64, "bits": 5, "mode": "affine"}
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[[rule]]\npattern = "*.experts.*"\nbits = 4\ngroup_size = 64\n'
        '[[rule]]\npattern = "*.mlp.*"\nbits = 8\ngroup_size = 32\nmode = "mxfp8"\n'
    )
    block = prepare(source, quantize=True, recipe=str(recipe)).config["quantization"]
    up = "model.decoder.layers.0.mlp.up_proj"
    assert block[up] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert "model.decoder.embed_tokens" not in block  # no rule: left as it is


def test_the_result_config_is_one_that_loads_and_keeps_what_the_source_said(source):
    plan = prepare(source, quantize=True, dtype="float16")
    before = json.loads((source / "config.json").read_text())
    assert dict(plan.config) == before | {
        "dtype": "float16",
        "quantization": plan.config["quantization"],
        "quantization_config": plan.config["quantization"],
    }
    assert ModelConfig.from_dict(plan.config).quantization is not None


def test_both_spellings_of_head_sizes_are_in_the_result(tmp_path):
    source = official(tmp_path / "source", per_layer=True)
    text = prepare(source).config["text_config"]
    assert text["per_layer_config"] == {"1": {"head_dim": 32, "num_key_value_heads": 1}}
    assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (32, 1)


def test_a_group_that_the_user_named_must_divide(tmp_path):
    source = official(tmp_path / "source", **NARROW)
    with pytest.raises(ConfigError, match=r"groups of 64 at 4 bits do not divide .*down_proj, wh"):
        prepare(source, quantize=True, q_group_size=64)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rule]]\npattern = "*.experts.*"\nbits = 4\ngroup_size = 64\n')
    with pytest.raises(ConfigError, match="which is 32 wide"):
        prepare(source, quantize=True, recipe=str(recipe))


def test_a_default_gives_way_and_is_listed(tmp_path):
    source = official(tmp_path / "source", **NARROW)
    plan = prepare(source, quantize=True)
    assert plan.left == (EXPERTS, EXPERTS.replace(".0.", ".1."))
    assert kinds(plan)[EXPERTS] == "BF16"
    assert kinds(plan)[EXPERTS.replace("down", "gate_up")] == "4-bit affine g64"
    assert prepare(source, quantize=True, q_mode="nvfp4").left == ()  # 16 divides 32


def test_a_pattern_that_matches_nothing_is_refused(source, tmp_path):
    recipe = tmp_path / "mine.toml"
    for pattern in ("*.expert.*", "*visions*", "*layernorm*", "*.self_attn.*_proj.linear"):
        recipe.write_text(f'[[rule]]\npattern = "{pattern}"\nbits = 4\ngroup_size = 64\n')
        with pytest.raises(ConfigError, match="matches no module that can be packed"):
            prepare(source, quantize=True, recipe=str(recipe))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_bits": 4}, r"need -q \(--quantize\)"),
        ({"q_bits": 0}, r"need -q \(--quantize\)"),
        ({"recipe": "uniform"}, r"need -q \(--quantize\)"),
        ({"quantize": True, "q_bits": 0}, "at least 1"),
        ({"quantize": True, "dequantize": True}, "give one of them"),
        ({"dequantize": True}, "is not packed"),
        ({"dtype": "int8"}, "'int8' is not one of bfloat16, float16, float32"),
    ],
)
def test_requests_that_make_no_sense_are_refused(source, arguments, message):
    with pytest.raises(ConfigError, match=message):
        prepare(source, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.decoder.norm.weight"), r"norm.weight is missing .*shape \[64\]"),
        (put("model.decoder.norm.weight", bf16(np.ones(63))), r"\[63\], expected \[64\]"),
        (put("model.decoder.layers.7.layer_scalar", bf16(np.ones(1))), "describes no such tensor"),
        (put("model.decoder.norm.weight", ("F64", (64,), bytes(512))), "of type F64"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    folder = official(tmp_path / "source")
    rewrite(folder, change)
    with pytest.raises(WeightsError, match=message):
        prepare(folder)


def test_a_generation_config_that_would_not_load_is_refused_before_any_work(tmp_path):
    folder = official(tmp_path / "source")
    (folder / "generation_config.json").write_text('{"eos_token_id": 64}')
    with pytest.raises(DiffGemmaError, match="eos_token_id 64 is outside the vocabulary"):
        prepare(folder)


@pytest.mark.parametrize("change", [{"vocab_size": 2**31}, {"moe_intermediate_size": 10**30}])
def test_sizes_that_mlx_cannot_build_are_refused(tmp_path, change):
    folder = official(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="more than the 2147483647"):
        prepare(folder)


def test_every_source_tensor_is_moved_once_or_left_out_by_name(tmp_path):
    config = tiny_config()
    folder = official(tmp_path / "source")
    embedding = draw_tensors(config, 0)["model.decoder.embed_tokens.weight"]
    rewrite(folder, put("lm_head.weight", bf16(embedding)))
    plan = prepare(folder, quantize=True)
    moved = [id(info) for move in plan.moves for info in move.source.infos]
    assert len(moved) == len(set(moved)) == len(plan.checkpoint.stored) - 1
    assert plan.checkpoint.ignored == {
        "lm_head.weight": "equal to model.decoder.embed_tokens.weight, to which it is tied"
    }
    assert config["tie_word_embeddings"]


def test_outputs_have_the_sizes_of_the_format(source):
    plan = prepare(source, quantize=True)
    (move,) = [m for m in plan.moves if m.target == f"{EXPERTS}.weight"]
    assert [(o.name.rpartition(".")[2], o.dtype, o.shape) for o in move.outputs] == [
        ("weight", "U32", (2, 64, 8)),
        ("scales", "BF16", (2, 64, 1)),
        ("biases", "BF16", (2, 64, 1)),
    ]
    assert sum(o.nbytes for o in move.outputs) == 2 * 64 * (32 + 2 + 2)
    plan = prepare(source, quantize=True, q_mode="nvfp4")
    (move,) = [m for m in plan.moves if m.target == f"{EXPERTS}.weight"]
    assert [(o.dtype, o.shape) for o in move.outputs] == [("U32", (2, 64, 8)), ("U8", (2, 64, 4))]


def test_shards_are_filled_in_order_up_to_their_limit(source, monkeypatch):
    whole = prepare(source)
    assert whole.shard_names == ("model.safetensors",)
    monkeypatch.setattr(plan_module, "SHARD_BYTES", whole.tensor_bytes // 3)
    plan = prepare(source)
    count = len(plan.shards)
    assert count >= 3 and plan.shard_names[0] == f"model-00001-of-{count:05d}.safetensors"
    assert plan.moves == whole.moves
    for shard in plan.shards:
        nbytes = sum(o.nbytes for m in shard for o in m.outputs)
        assert nbytes <= plan_module.SHARD_BYTES or len(shard) == 1


def test_a_digest_knows_settings_and_source(source, tmp_path):
    digests = {
        prepare(source).digest(),
        prepare(source, dtype="float32").digest(),
        prepare(source, quantize=True).digest(),
        prepare(source, quantize=True, q_bits=8).digest(),
        prepare(official(tmp_path / "other", num_experts=3)).digest(),
    }
    assert len(digests) == 5
    same = official(tmp_path / "elsewhere")  # where it lies does not matter
    assert prepare(same).digest() == prepare(source).digest()


def test_a_plan_comes_from_headers_alone(tmp_path, monkeypatch):
    folder = official(tmp_path / "source")
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:  # a sparse file: all tensors read as zeros
        length = int.from_bytes(file.read(8), "little")
        file.truncate(8 + length)
        file.truncate(size)
    monkeypatch.setattr("mlx_diffgemma.convert.sources._bytes", None)
    assert len(prepare(folder, quantize=True).moves) == len(prepare(folder).checkpoint.stored)


def test_a_move_larger_than_a_slice_is_cut_into_rows(source, monkeypatch):
    (move,) = [m for m in prepare(source).moves if m.target == "model.decoder.embed_tokens.weight"]
    assert move.rows_at_a_time >= 64
    monkeypatch.setattr(plan_module, "SLICE_BYTES", 4 * 64 * 5)
    assert move.rows_at_a_time == 5
    assert all(m.rows_at_a_time >= 1 for m in prepare(source).moves if is_expert(m.target))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.encoder.vision_tower.encoder.layers.0.input_layernorm.weight", None, "is missing"),
        ("model.encoder.embed_vision.embedding_projection.weight", (1, 1), "has shape"),
        (
            "model.encoder.vision_tower.encoder.layers.7.input_layernorm.weight",
            (8,),
            "no such tensor",
        ),
    ],
)
def test_vision_is_whole_or_not_there(tmp_path, name, shape, said):
    """mlx-vlm would not load it otherwise."""
    source = official(tmp_path / "source")
    arrays = load_all(source)
    if shape is None:
        del arrays[name]
    else:
        arrays[name] = mx.zeros(shape, dtype=mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    with pytest.raises(WeightsError, match=said):
        prepare(source)
    text_only = {key: value for key, value in arrays.items() if "vision" not in key}
    mx.save_safetensors(str(source / "model.safetensors"), text_only)
    prepare(source)
