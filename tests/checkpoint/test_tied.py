"""One weight under several names: equal copies are left out, all others are refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import bundled_model
from mlx_diffgemma import load_model as load_any
from mlx_diffgemma.checkpoint import tied
from mlx_diffgemma.checkpoint.info import describe
from mlx_diffgemma.errors import WeightsError

load_model = functools.partial(load_any, fused=False)
Tensors = dict[str, mx.array]
EMBEDDING, HEAD = "model.decoder.embed_tokens", "lm_head"
QUERY, ENCODERS_QUERY = (
    f"model.{stack}.layers.0.self_attn.q_proj" for stack in ("decoder", "encoder.language_model")
)
PACKING = {"group_size": 64, "bits": 4}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return mx.load(str(bundled_model() / "model.safetensors"))


def save(folder: Path, tensors: Tensors, quantization: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads((bundled_model() / "config.json").read_text())
    if quantization is not None:
        config["quantization"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(bundled_model() / "generation_config.json", folder)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def encoders(name: str) -> str:
    is_shared = name.startswith("model.decoder.") and not any(
        word in name for word in ("layer_scalar", "self_conditioning")
    )
    return name.replace("decoder", "encoder.language_model", 1) if is_shared else name


def packed(module: str, weight: mx.array, **setting: int) -> Tensors:
    arrays = mx.quantize(weight, **(PACKING | setting))
    leaves = ("weight", "scales", "biases")
    return {f"{module}.{leaf}": array for leaf, array in zip(leaves, arrays, strict=True)}


def same(one: Path, two: Path) -> bool:
    a, b = (dict(tree_flatten(load_model(folder).parameters())) for folder in (one, two))
    return a.keys() == b.keys() and all(mx.array_equal(a[n], b[n]).item() for n in a)


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- plain ---


def test_shared_weights_load_under_the_encoders_names_alone_and_beside_the_decoders(
    tmp_path, tensors
):
    renamed = {encoders(name): array for name, array in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) > 50
    for kind, found in (("alone", renamed), ("both", tensors | renamed)):
        assert same(save(tmp_path / kind, found), bundled_model()), kind


def test_the_encoder_keeps_layer_scalars_of_its_own(tmp_path, tensors):
    name = "model.encoder.language_model.layers.0.layer_scalar"
    other = tensors | {name: mx.array([0.25], mx.bfloat16)}
    model = dict(tree_flatten(load_model(save(tmp_path / "x", other)).parameters()))
    assert model[name].item() == 0.25
    assert model["model.decoder.layers.0.layer_scalar"].item() == (
        tensors["model.decoder.layers.0.layer_scalar"].item()
    )
    del other[name]
    assert f"tensor {name} is missing" in refusal(save(tmp_path / "y", other))


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.encoder.language_model.embed_tokens.weight",
        "model.encoder.language_model.norm.weight",
        "model.encoder.language_model.layers.1.self_attn.k_norm.weight",
        "model.encoder.language_model.layers.1.mlp.up_proj.weight",
        "model.encoder.language_model.layers.1.router.scale",
        "model.encoder.language_model.layers.1.experts.gate_up_proj",
    ],
)
def test_a_copy_is_left_out_and_another_value_at_its_end_is_refused(
    tmp_path, tensors, name, monkeypatch
):
    monkeypatch.setattr(tied, "_PIECE", 1000)  # elements: most tensors take several pieces
    original = name.replace("encoder.language_model", "decoder").replace(HEAD, EMBEDDING)
    copy = mx.array(tensors[original])
    assert same(save(tmp_path / "copy", tensors | {name: copy}), bundled_model())
    flat = mx.flatten(copy)
    flat[-1] = flat[-1] + 1
    message = refusal(save(tmp_path / "x", tensors | {name: flat.reshape(copy.shape)}))
    assert f"{name} and {original} hold different values" in message


def test_copies_of_another_float_type_are_compared_by_value(tmp_path, tensors):
    embedding = tensors[f"{EMBEDDING}.weight"].astype(mx.float32)
    head = f"{HEAD}.weight"
    assert same(save(tmp_path / "copy", tensors | {head: embedding}), bundled_model())
    embedding[-1, -1] = embedding[-1, -1] * (1 + 2**-20)  # bfloat16 would not show it
    assert "hold different values" in refusal(save(tmp_path / "x", tensors | {head: embedding}))


def test_a_copy_of_another_shape_is_refused(tmp_path, tensors):
    head = {f"{HEAD}.weight": mx.zeros((384, 127), mx.bfloat16)}
    message = refusal(save(tmp_path / "x", tensors | head))
    assert "are tied, but stored in different forms: BF16 [384, 127] and BF16 [384, 128]" in message


def test_nothing_is_held_of_what_is_compared(tmp_path, monkeypatch):
    """The largest read is one piece, whatever the tensor's size."""
    rows = np.zeros((3000, 100), np.float32)
    from safetensors.numpy import save_file

    from mlx_diffgemma.checkpoint.headers import read_header

    save_file({"a": rows, "b": rows}, tmp_path / "model.safetensors")
    found = read_header(tmp_path / "model.safetensors")
    sizes = []
    real = tied._read

    def read(*arguments):
        raw = real(*arguments)
        sizes.append(len(raw))
        return raw

    monkeypatch.setattr(tied, "_read", read)
    monkeypatch.setattr(tied, "_PIECE", 4096)
    tied.check_copies(found, {"a": "b"})
    assert max(sizes) == 4 * 4096 and sum(sizes) == 2 * rows.nbytes


# --- packed ---


def test_packed_copies_are_left_out_and_others_refused(tmp_path, tensors):
    weight = tensors[f"{QUERY}.weight"]
    base = {n: a for n, a in tensors.items() if n != f"{QUERY}.weight"} | packed(QUERY, weight)
    ours = save(tmp_path / "ours", base, PACKING)
    copy = packed(ENCODERS_QUERY, weight)
    assert same(save(tmp_path / "copy", base | copy, PACKING), ours)
    scales = f"{ENCODERS_QUERY}.scales"
    other = save(tmp_path / "x", base | copy | {scales: copy[scales] * 2}, PACKING)
    assert f"{scales} and {QUERY}.scales hold different values" in refusal(other)


def test_a_packed_module_under_the_encoders_name_alone_is_unpacked_as_that_name_says(
    tmp_path, tensors
):
    weight = tensors[f"{QUERY}.weight"]
    rest = {n: a for n, a in tensors.items() if n != f"{QUERY}.weight"}
    ours = save(tmp_path / "a", rest | packed(QUERY, weight, bits=8), PACKING | {QUERY: EIGHT})
    theirs = rest | packed(ENCODERS_QUERY, weight, bits=8)
    assert same(save(tmp_path / "b", theirs, PACKING | {ENCODERS_QUERY: EIGHT}), ours)
    assert same(save(tmp_path / "c", theirs, PACKING | {QUERY: EIGHT}), ours)
    assert describe(tmp_path / "b").parameters == describe(tmp_path / "a").parameters


EIGHT = {"group_size": 64, "bits": 8}


@pytest.mark.parametrize("is_head", [True, False])
def test_a_packed_copy_of_a_plain_weight_is_refused(tmp_path, tensors, is_head):
    ours, other = (EMBEDDING, HEAD) if is_head else (QUERY, ENCODERS_QUERY)
    found = tensors | packed(other, tensors[f"{ours}.weight"])
    message = refusal(save(tmp_path / "x", found, PACKING))
    assert f"only one of them comes with {other}.biases" in message


# --- what info counts ---


def test_a_weight_under_two_names_counts_once(tmp_path, tensors):
    renamed = {encoders(name): array for name, array in tensors.items()}
    head = {f"{HEAD}.weight": tensors[f"{EMBEDDING}.weight"]}
    info = describe(save(tmp_path / "x", tensors | renamed | head))
    plain = describe(bundled_model())
    assert info.parameters == plain.parameters
    assert info.active_parameters == plain.active_parameters
    assert info.loaded_bytes == plain.loaded_bytes
    assert info.disk_bytes > 1.7 * plain.disk_bytes
