"""PEFT's adapters against weights merged by hand, in numpy, by its documented rule: W + alpha / r
B A. Run against peft 0.21.2 itself once: logits of transformers' model under its adapters differ
from ours by 7e-6 at most, unmerged with equal sides, and merged with the decoder's alone."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.adapters import CONFIG, WEIGHTS
from mlx_diffgemma.checkpoint.peft import PEFT_WEIGHTS
from mlx_diffgemma.errors import SourceError
from mlx_diffgemma.train.fuse import fuse_checkpoint
from tests.checkpoint.adapter_cases import logits_of, plain_model

LAYER = "model.decoder.layers.0"
# Module -> (outputs, inputs); a sliding layer's and a full one's, and what the decoder has alone.
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (64, 64),
    f"{LAYER}.self_attn.v_proj": (32, 64),
    f"{LAYER}.mlp.up_proj": (64, 64),
    f"{LAYER}.router.proj": (4, 64),
    "model.decoder.layers.1.self_attn.o_proj": (64, 64),
    "model.decoder.self_conditioning.down_proj": (64, 64),
}
TARGETS = ["q_proj", "v_proj", "up_proj", "proj", "o_proj", "down_proj"]
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain") / "model")


def drawn(ranks: dict[str, int] | None = None, shapes: dict | None = None) -> Tensors:
    """A [r, inputs] and B [outputs, r] of each module, under transformers' names."""
    rng, tensors = np.random.default_rng(3), {}
    for module, (outputs, inputs) in (SHAPES if shapes is None else shapes).items():
        rank = (ranks or {}).get(module, 4)
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.1, (rank, inputs)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, rank)).astype(np.float32)
    return tensors


def write(folder: Path, tensors: Tensors, prefix: str = "base_model.model.", **config) -> Path:
    folder.mkdir(exist_ok=True)
    arrays = {prefix + name: mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), arrays)
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    (folder / CONFIG).write_text(json.dumps(known | config))
    return folder


def both_sides(tensors: Tensors) -> Tensors:
    twins = {
        name.replace("decoder.layers", "encoder.language_model.layers"): array
        for name, array in tensors.items()
    }
    return twins | tensors


def merged(source: Path, folder: Path, deltas: Tensors) -> Path:
    """A checkpoint with deltas added to its weights, by their names there."""
    weights = mx.load(str(source / "model.safetensors"))
    for name, delta in deltas.items():
        was = np.array(weights[name].astype(mx.float32))
        assert was.shape == delta.shape, name
        weights[name] = mx.array(was + delta)
    shutil.copytree(source, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def deltas_of(tensors: Tensors, scales: dict[str, float], scale: float) -> Tensors:
    """scale B A."""
    return {
        f"{module}.weight": scales.get(module, scale)
        * (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"])
        for module in SHAPES
    }


QUERY, OUT = f"{LAYER}.self_attn.q_proj", "model.decoder.layers.1.self_attn.o_proj"
ENDS = {"layers.1.self_attn.o_proj": 2}


@pytest.mark.parametrize(
    ("config", "scales", "scale"),
    [
        ({}, {}, 2.0),
        ({"use_rslora": True}, {}, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 10}}, {QUERY: 2.5}, 1.5),
        ({"rank_pattern": {r"layers\.1\..*o_proj": 2}}, {OUT: 4.0}, 2.0),
        (
            {
                "use_rslora": True,
                "rank_pattern": ENDS | {"k_proj": 9},
                "alpha_pattern": {"o_proj": 3},
            },
            {OUT: 3 / 2**0.5},
            4.0,
        ),
    ],
    ids=["alpha / r", "rank-stabilised", "alpha by pattern", "rank by pattern", "all of it"],
)
def test_an_adapter_adds_what_peft_says(plain, tmp_path, config, scales, scale):
    tensors = drawn({OUT: 2} if "rank_pattern" in config else None)
    adapter = write(tmp_path / "adapter", both_sides(tensors), **config)
    expected = merged(plain, tmp_path / "merged", deltas_of(tensors, scales, scale))
    by_hand = logits_of(load_model(expected))
    assert np.abs(by_hand - logits_of(load_model(plain))).max() > 0.5
    for fused in (True, False):
        found = logits_of(load_model(plain, adapter_path=adapter, fused=fused))
        np.testing.assert_allclose(found, by_hand, atol=2e-4)
    written = fuse_checkpoint(plain, adapter, tmp_path / "fused")
    assert written.changed == len(SHAPES)
    np.testing.assert_allclose(logits_of(load_model(written.folder)), by_hand, atol=2e-4)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: name,
        lambda name: f"base_model.model.{name.removeprefix('model.')}",  # trained without the head
        lambda name: f"base_model.model.{name.replace('.weight', '.default.weight')}",
    ],
    ids=["as saved", "bare", "no head", "with the adapter's name"],
)
@pytest.mark.parametrize("has_both", [True, False], ids=["both sides", "the decoder's"])
def test_names_of_every_kind_are_read(plain, tmp_path, rename, has_both):
    tensors = drawn()
    named = {rename(n): a for n, a in (both_sides(tensors) if has_both else tensors).items()}
    adapter = write(tmp_path / "adapter", named, prefix="")
    expected = merged(plain, tmp_path / "merged", deltas_of(tensors, {}, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of: the config names no side
        found = logits_of(load_model(plain, adapter_path=adapter))
    np.testing.assert_allclose(found, logits_of(load_model(expected)), atol=2e-4)


@pytest.mark.parametrize("is_nested", [True, False], ids=["both arrays", "one array"])
def test_adapters_on_experts_are_those_of_target_parameters(plain, tmp_path, is_nested):
    """Shapes and order as peft's ParamWrapper: A [E r, inputs], B [outputs, r E]."""
    count, ranks = 4, {"down_proj": 3, "gate_up_proj": 4}
    sizes = {"down_proj": (64, 64), "gate_up_proj": (128, 64)}  # outputs, inputs
    names = {"down_proj": "experts", "gate_up_proj": "experts.base_layer"}
    if not is_nested:
        names = {"gate_up_proj": "experts"}
    rng, tensors, deltas = np.random.default_rng(8), {}, {}
    for leaf, name in names.items():
        (outputs, inputs), rank = sizes[leaf], ranks[leaf]
        a = rng.normal(0, 0.1, (count * rank, inputs)).astype(np.float32)
        b = rng.normal(0, 0.1, (outputs, rank * count)).astype(np.float32)
        tensors |= {f"{LAYER}.{name}.lora_A.weight": a, f"{LAYER}.{name}.lora_B.weight": b}
        of_expert = b.reshape(outputs, rank, count), a.reshape(count, rank, inputs)
        deltas[f"{LAYER}.experts.{leaf}"] = 8 / rank * np.einsum("ore,eri->eoi", *of_expert)
    config = {"target_parameters": list(names), "rank_pattern": {"experts.down_proj": 3}}
    adapter = write(tmp_path / "adapter", both_sides(tensors), **config)
    expected = merged(plain, tmp_path / "merged", deltas)
    by_hand = logits_of(load_model(expected))
    assert np.abs(by_hand - logits_of(load_model(plain))).max() > 0.1
    found = logits_of(load_model(plain, adapter_path=adapter))
    np.testing.assert_allclose(found, by_hand, atol=2e-4)
    written = fuse_checkpoint(plain, adapter, tmp_path / "fused")
    np.testing.assert_allclose(logits_of(load_model(written.folder)), by_hand, atol=2e-4)


ENCODER = "model.encoder.language_model.layers.0"
Q = {QUERY: SHAPES[QUERY]}


def test_sides_that_differ_are_refused(plain, tmp_path):
    tensors = both_sides(drawn(shapes=Q))
    name = f"{ENCODER}.self_attn.q_proj.lora_B.weight"
    tensors[name] = tensors[name] + 1e-3
    adapter = write(tmp_path / "adapter", tensors)
    with pytest.raises(SourceError, match="have different adapters; the two share their weights"):
        load_model(plain, adapter_path=adapter)
    with pytest.raises(SourceError, match="have different adapters"):
        fuse_checkpoint(plain, adapter, tmp_path / "fused")
    equal = both_sides(drawn(shapes=Q))
    pattern = {r"encoder.*q_proj": 5}
    with pytest.raises(SourceError, match="have different adapters"):
        load_model(plain, adapter_path=write(adapter, equal, alpha_pattern=pattern))


def test_an_adapter_of_the_encoder_alone_is_refused(plain, tmp_path):
    tensors = both_sides(drawn(shapes=Q))
    alone = {name: array for name, array in tensors.items() if "encoder" in name}
    adapter = write(tmp_path / "adapter", alone)
    with pytest.raises(SourceError, match="acts where text is read and not on the canvas"):
        load_model(plain, adapter_path=adapter)
    some = drawn() | alone
    with pytest.raises(SourceError, match="has none, while other modules have both"):
        load_model(plain, adapter_path=write(adapter, some))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*decoder.*q_proj"},
        {"target_modules": [QUERY]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*encoder.*"},
    ],
    ids=["expression", "whole name", "encoder excluded"],
)
def test_an_adapter_that_means_the_decoder_alone_warns(plain, tmp_path, config):
    adapter = write(tmp_path / "adapter", drawn(shapes=Q), **config)
    with pytest.warns(UserWarning, match="adapts the decoder alone"):
        load_model(plain, adapter_path=adapter)


def only(name: str, *shape: int) -> Tensors:
    return {name: np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({}, {"peft_type": "ADALORA"}, "peft_type 'ADALORA' is not supported, only LORA"),
        ({}, {"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({}, {"use_dora": True}, "no support for DoRA, got use_dora True"),
        ({}, {"modules_to_save": ["lm_head"]}, "no support for modules trained as a whole, got"),
        ({}, {"trainable_token_indices": [1]}, "no support for embeddings of new tokens, got"),
        ({}, {"bias": "all"}, "no support for trained biases, got bias 'all'"),
        ({}, {"alora_invocation_tokens": [3]}, "no support for activated LoRA, got"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "changed the base model too"),
        ({}, {"r": 8}, "says rank 8 for .*, but its factors have rank 4"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "says rank 2 for .*q_proj"),
        ({}, {"lora_alpha": "16"}, "lora_alpha must be a number above 0, got '16'"),
        ({}, {"alpha_pattern": {"q_proj": 0}}, "alpha_pattern 'q_proj' must be a number above 0"),
        ({}, {"alpha_pattern": {"(": 1}}, r"alpha_pattern '\('"),
        ({}, {"rank_pattern": [1]}, "rank_pattern must be an object"),
        (only(f"{QUERY}.lora_magnitude_vector", 64), {}, "is DoRA, which is not supported"),
        (only("lm_head.modules_to_save.weight", 384, 64), {}, "is a module trained as a whole"),
        (only(f"{QUERY}.lora_B.bias", 64), {}, "is a bias, which is not supported"),
        (only("model.decoder.embed_tokens.lora_embedding_A", 4, 9), {}, "adapter on an embedding"),
        (only(f"{QUERY}.lora_A.other.weight", 4, 64), {}, "holds several adapters, None, other"),
        (only(f"{LAYER}.mlp.down_proj.lora_A.weight", 4, 64), {}, "has no other half"),
        (only(f"{QUERY}.lora_A.weight", 4, 63), {}, "do not fit its weights of"),
        (only(f"{QUERY}.lora_A.weight", 3, 64), {}, "do not belong together"),
        (
            drawn(shapes={"model.decoder.layers.1.self_attn.v_proj": (32, 64)}),
            {},
            "layers.1.self_attn.v_proj is not a module here that takes an adapter",
        ),
        (drawn(shapes={"lm_head": (384, 64)}), {}, "lm_head is not a module here"),
        (
            drawn(shapes={"model.encoder.vision_tower.encoder.layers.0.mlp.up_proj": (8, 8)}),
            {},
            "is of the vision tower, of which adapters are not read",
        ),
        (
            drawn(shapes={f"{LAYER}.experts": (100, 64)}),
            {},
            "fit neither gate_up_proj nor down_proj here",
        ),
    ],
)
def test_what_cannot_be_added_is_named(plain, tmp_path, tensors, config, says):
    adapter = write(tmp_path / "adapter", drawn(shapes=Q) | tensors, **config)
    with pytest.raises(SourceError, match=says):
        load_model(plain, adapter_path=adapter)
    with pytest.raises(SourceError, match=says):
        fuse_checkpoint(plain, adapter, tmp_path / "fused")


def test_files_that_are_missing_are_named(plain, tmp_path):
    adapter = write(tmp_path / "adapter", drawn())
    (adapter / PEFT_WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"adapter_model\.bin is pickled, which is not read"):
        load_model(plain, adapter_path=adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors is missing"):
        load_model(plain, adapter_path=adapter)


def test_a_folder_with_both_kinds_of_keys_is_mlx_lms(plain, tmp_path):
    """As OptiQ writes: PEFT's keys too, but mlx-lm's file."""
    a, b = (np.random.default_rng(1).normal(0, 0.1, (64, 64)).astype(np.float32) for _ in "ab")
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 8, "scale": 0.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG).write_text(json.dumps(config))
    module = "model.decoder.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_a": mx.array(a), f"{module}.lora_b": mx.array(b)}
    mx.save_safetensors(str(adapter / WEIGHTS), factors)
    expected = merged(plain, tmp_path / "merged", {f"{module}.weight": 0.5 * (a @ b).T})
    found = logits_of(load_model(plain, adapter_path=adapter))
    np.testing.assert_allclose(found, logits_of(load_model(expected)), atol=2e-4)
