from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import DiffGemmaError, load_model
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.sources import e4m3, open_checkpoint
from mlx_diffgemma.errors import ConfigError, WeightsError
from tests.convert.cases import (
    bf16,
    f32,
    fp4,
    fp8_dynamic,
    load_all,
    nvfp4,
    official,
    same,
    tiny_config,
    u8,
    write_folder,
    write_safetensors,
)
from tests.convert.cases import fp8 as fp8_by_hand

EXPERT = "model.decoder.layers.0.experts.0.up_proj"
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj"


def nearest_bf16(values: np.ndarray) -> mx.array:
    """Float64 rounded once; the products here have few enough bits for float32 to hold them."""
    _, shape, raw = bf16(values.astype(np.float32))
    return mx.array(np.frombuffer(raw, np.uint16).reshape(shape)).view(mx.bfloat16)


def rewrite(folder: Path, change) -> None:
    """`change` sees the stored tensors of the folder's first file."""
    path = sorted(folder.glob("*.safetensors"))[0]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    tensors = {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            raw[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }
    change(tensors)
    write_safetensors(path, tensors)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()


def test_e4m3_has_the_values_of_its_definition():
    found = e4m3(np.arange(256, dtype=np.uint8))
    expected = [fp8_by_hand(c) for c in range(256) if c & 127 != 127]
    assert [float(v) for c, v in enumerate(found) if c & 127 != 127] == expected
    assert np.isnan(found[[127, 255]]).all()
    # largest, one, smallest normal, smallest subnormal, minus two
    assert found[[0x7E, 0x38, 0x08, 0x01, 0xC0]].tolist() == [448, 1, 2**-6, 2**-9, -2]


def test_nvfp4_becomes_what_its_definition_says(tmp_path):
    folder, meaning = nvfp4(tmp_path / "source")
    assert open_checkpoint(folder).layout == "nvfp4"
    convert(folder, tmp_path / "out")
    found = load_all(tmp_path / "out")
    assert len(meaning) == 4
    for name, values in meaning.items():
        assert same(found[name], nearest_bf16(values)), name
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["ignored"][f"{EXPERT}.input_scale"].startswith("scales activations")
    sources = record["tensors"]["model.decoder.layers.0.experts.gate_up_proj.weight"]["from"]
    assert sources[:4] == [
        *(f"{EXPERT.replace('up', 'gate')}.{leaf}" for leaf in LEAVES),
        f"{EXPERT}.weight",
    ]
    assert "quantization" not in json.loads((tmp_path / "out/config.json").read_text())


LEAVES = ("weight", "weight_scale", "weight_scale_2")


def test_nvfp4_by_hand_low_half_first_and_block_and_tensor_scale_multiplied(tmp_path):
    folder, _ = nvfp4(tmp_path / "source")

    def change(tensors):
        for part, scale_2 in (("gate", 0.5), ("up", 0.25)):
            path = f"model.decoder.layers.0.experts.0.{part}_proj"
            packed, scale = np.zeros((64, 32), np.uint8), np.full((64, 4), 0x38, np.uint8)  # 1.0
            packed[0, 0], packed[0, 8] = 0x7A, 0x01  # -1 and 6; in the next block 0.5 and 0
            scale[0, 1] = 0x40  # 2.0
            tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"] = (
                u8(packed),
                u8(scale, "F8_E4M3"),
            )
            tensors[f"{path}.weight_scale_2"] = f32(np.array(scale_2))

    rewrite_all_into_one(folder, change)
    convert(folder, tmp_path / "out")
    found = load_all(tmp_path / "out")["model.decoder.layers.0.experts.gate_up_proj.weight"][0]
    gate, up = found[0].tolist(), found[64].tolist()
    assert gate[:2] == [-0.5, 3.0] and gate[16:18] == [0.5, 0.0]
    assert up[:2] == [-0.25, 1.5] and up[16:18] == [0.25, 0.0]
    assert np.count_nonzero(np.array(found.astype(mx.float32))) == 6


def rewrite_all_into_one(folder: Path, change) -> None:
    """As `rewrite`, where the tensors lie in two shards."""
    merged = {}
    for path in sorted(folder.glob("*.safetensors")):
        (folder / "one").mkdir(exist_ok=True)
        path.rename(folder / "one" / path.name)
    for path in sorted((folder / "one").iterdir()):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            begin, end = entry["data_offsets"]
            merged[name] = (
                entry["dtype"],
                tuple(entry["shape"]),
                raw[8 + length + begin : 8 + length + end],
            )
    change(merged)
    write_safetensors(folder / "model.safetensors", merged)
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("flat_scale", [False, True], ids=["scale [rows, 1]", "scale [rows]"])
def test_fp8_dynamic_becomes_what_its_definition_says(tmp_path, flat_scale):
    folder, meaning = fp8_dynamic(tmp_path / "source", flat_scale=flat_scale)
    assert open_checkpoint(folder).layout == "fp8"
    convert(folder, tmp_path / "out")
    found = load_all(tmp_path / "out")
    assert len(meaning) == 2 * 2 + (4 + 3) + (3 + 3)  # no v_proj in the full layer
    for name, values in meaning.items():
        assert same(found[name], nearest_bf16(values)), name


def test_fp8_packs_to_what_its_meaning_packs_to(tmp_path):
    folder, meaning = fp8_dynamic(tmp_path / "source")
    convert(folder, tmp_path / "out", quantize=True)
    found = load_all(tmp_path / "out")
    name = "model.decoder.layers.1.experts.down_proj"
    expected = mx.quantize(nearest_bf16(meaning[f"{name}.weight"]), group_size=64, bits=4)
    for leaf, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert same(found[f"{name}.{leaf}"], array)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, stored):
    return lambda tensors: tensors.update({name: stored})


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (nvfp4, put(f"{EXPERT}.weight", u8(np.zeros((64, 31)))), "NVFP4 is expected, found"),
        (nvfp4, put(f"{EXPERT}.weight_scale", u8(np.zeros((64, 4)))), "declares.*NVFP4.*MXFP4"),
        (
            nvfp4,
            put(f"{EXPERT}.weight_scale", u8(np.zeros((64, 3)), "F8_E4M3")),
            r"F8_E4M3 \[64, 3\]",
        ),
        (nvfp4, put(f"{EXPERT}.weight_scale_2", bf16(np.ones(1))), "scale_2 BF16"),
        (nvfp4, put(f"{EXPERT}.weight_scale_2", f32(np.ones(2))), "NVFP4 is expected"),
        (nvfp4, drop(f"{EXPERT}.weight_scale"), "but no weight_scale"),
        (nvfp4, drop(f"{EXPERT}.weight"), "missing or not a matrix"),
        (nvfp4, put(f"{EXPERT}.weight", u8(np.zeros(64))), "missing or not a matrix"),
        (
            nvfp4,
            put(f"{EXPERT.replace('s.0.u', 's.5.u')}.weight", bf16(np.zeros((64, 64)))),
            "not numbered",
        ),
        (fp8_dynamic, put(f"{Q_PROJ}.weight_scale", bf16(np.ones(3))), "one scale per output row"),
        (fp8_dynamic, put(f"{Q_PROJ}.weight_scale", u8(np.ones(64))), "packed as MXFP8"),
        (fp8_dynamic, put(f"{Q_PROJ}.weight", u8(np.ones((64, 64)), "I8")), "packed as INT8"),
        (fp8_dynamic, drop(f"{Q_PROJ}.weight_scale"), "has type F8_E4M3"),
        (fp8_dynamic, drop(f"{Q_PROJ}.weight"), "q_proj.weight is missing"),
        (fp8_dynamic, put(f"{EXPERT}.weight", bf16(np.ones((64, 64)))), "weight BF16"),
    ],
)
def test_a_packed_tensor_that_is_not_as_its_layout_says_is_refused(
    tmp_path, layout, change, message
):
    folder, _ = layout(tmp_path / "source")
    (rewrite_all_into_one if layout is nvfp4 else rewrite)(folder, change)
    with pytest.raises(WeightsError, match=message):
        convert(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]  # nothing was begun


def test_experts_without_all_their_parts_are_refused(tmp_path):
    folder, _ = fp8_dynamic(tmp_path / "source")
    rewrite(folder, lambda t: (t.pop(f"{EXPERT}.weight"), t.pop(f"{EXPERT}.weight_scale")))
    with pytest.raises(WeightsError, match="up_proj of an expert is missing"):
        open_checkpoint(folder)


def test_experts_of_different_shapes_are_refused(tmp_path):
    folder, _ = fp8_dynamic(tmp_path / "source")

    def change(tensors):
        tensors[f"{EXPERT}.weight"] = u8(np.zeros((32, 64)), "F8_E4M3")
        tensors[f"{EXPERT}.weight_scale"] = bf16(np.ones(32))

    rewrite(folder, change)
    with pytest.raises(WeightsError, match="experts have different shapes"):
        open_checkpoint(folder)


def test_experts_stored_fused_and_one_by_one_are_refused(tmp_path):
    folder, _ = fp8_dynamic(tmp_path / "source")
    fused = "model.decoder.layers.0.experts.down_proj"
    rewrite(folder, put(fused, bf16(np.zeros((2, 64, 64)))))
    with pytest.raises(WeightsError, match="both fused and one by one"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        (f"{Q_PROJ}.weight_packed", u8(np.zeros((64, 32))), "weight_packed.*packed integers"),
        (f"{Q_PROJ}.qweight", ("I32", (1,), b"0000"), "qweight is there: .* as GPTQ or AWQ"),
        (f"{Q_PROJ}.weight_scale_inv", bf16(np.ones((1, 1))), "as FP8 in blocks"),
        (
            f"{Q_PROJ}.weight",
            ("F8_E5M2", (64, 64), bytes(4096)),
            "q_proj.weight is of type F8_E5M2",
        ),
    ],
)
def test_tensors_that_cannot_be_read_are_named_where_the_config_says_nothing(
    tmp_path, name, stored, message
):
    folder = official(tmp_path / "source")
    rewrite(folder, put(name, stored))
    with pytest.raises(WeightsError, match=message) as caught:
        open_checkpoint(folder)
    assert "ModelOpt NVFP4 and FP8" in str(caught.value)


def test_a_declared_format_decides_whatever_the_tensors_look_like(tmp_path):
    """FP8 in blocks may look like FP8 per channel, where a matrix has few columns."""
    folder, _ = fp8_dynamic(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [1, 64]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="packed as FP8 in blocks cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit cannot be"),
        ({"quant_method": "other"}, "quant_method 'other' cannot be read"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4, but no tensor is"),
    ],
)
def test_a_quantized_config_over_plain_tensors_is_refused(tmp_path, block, message):
    folder = official(tmp_path / "source")
    config = tiny_config() | {"quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_block_is_found_wherever_tools_put_it(tmp_path, where):
    """And the result says nothing of it, so that it loads."""
    folder, _ = nvfp4(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    if where == "text_config":
        config["text_config"]["quantization_config"] = block
    else:
        config[where] = block
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"ModelOpt NVFP4.*mlx_diffgemma\.convert --hf-path"):
        load_model(folder)
    convert(folder, tmp_path / "out", quantize=True)
    load_model(tmp_path / "out")


@pytest.mark.parametrize("scheme", [None, {"num_bits": 8, "type": "float"}])
def test_scales_of_a_quantized_kv_cache_are_left_out(tmp_path, scheme):
    """With packed weights and without."""
    if scheme is None:
        folder, _ = fp8_dynamic(tmp_path / "source")
    else:
        folder = official(tmp_path / "source")
        config = json.loads((folder / "config.json").read_text())
        block = {"quant_method": "compressed-tensors", "config_groups": {}}
        config["quantization_config"] = block | {"kv_cache_scheme": scheme}
        (folder / "config.json").write_text(json.dumps(config))
    name = "model.decoder.layers.0.self_attn.k_scale"
    rewrite(folder, put(name, bf16(np.ones(1))))
    convert(folder, tmp_path / "out", quantize=True)
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["ignored"][name].startswith("scales a quantized KV cache")
    if scheme is not None:
        load_model(folder)


def test_nvfp4_is_read_outside_of_the_experts_too(tmp_path):
    folder, _ = nvfp4(tmp_path / "source")
    codes = np.arange(64 * 32, dtype=np.uint8).reshape(64, 32)

    def change(tensors):
        tensors[f"{Q_PROJ}.weight"] = u8(codes)
        tensors[f"{Q_PROJ}.weight_scale"] = u8(np.full((64, 4), 0x38), "F8_E4M3")  # 1
        tensors[f"{Q_PROJ}.weight_scale_2"] = f32(np.array(0.5))
        tensors[f"{Q_PROJ}.input_scale"] = f32(np.array(3.0))

    rewrite_all_into_one(folder, change)
    convert(folder, tmp_path / "out")
    expected = [
        [fp4(codes[r, c // 2] >> (4 * (c % 2)) & 15) / 2 for c in range(64)] for r in range(64)
    ]
    found = load_all(tmp_path / "out")[f"{Q_PROJ}.weight"]
    assert same(found, nearest_bf16(np.array(expected)))


def test_a_tensor_under_two_names_is_refused(tmp_path):
    folder = official(tmp_path / "source")
    name = "model.decoder.layers.0.experts.down_proj"
    rewrite(folder, put(f"{name}.weight", bf16(np.zeros((2, 64, 64)))))
    with pytest.raises(WeightsError, match="hold different values"):
        open_checkpoint(folder)


def test_a_tensor_of_something_else_is_refused(tmp_path):
    folder = official(tmp_path / "source")
    rewrite(folder, put("model.decoder.layers.0.lora_a", bf16(np.zeros((2, 2)))))
    with pytest.raises(WeightsError, match="lora_a is not part of DiffusionGemma"):
        open_checkpoint(folder)


def test_a_folder_without_config_and_packed_tensors_without_block_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json; a checkpoint folder"):
        open_checkpoint(tmp_path)
    source = official(tmp_path / "source")
    convert(source, tmp_path / "packed", quantize=True)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not say how"):
        open_checkpoint(tmp_path / "packed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "not packed as its config says, 8-bit affine"),
        ({"group_size": 32}, "in groups of 32"),
        ({"mode": "mxfp4", "group_size": 32}, "4-bit mxfp4"),
        ({"bits": 7}, "cannot pack"),
        ({f"{Q_PROJ}": False}, "nothing says how it is packed"),
    ],
)
def test_mlx_packing_must_be_as_the_config_says(tmp_path, change, message):
    convert(official(tmp_path / "source"), tmp_path / "packed", quantize=True, recipe="uniform")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization"] |= change
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(DiffGemmaError, match=message):
        open_checkpoint(tmp_path / "packed")


def test_scalars_of_the_vision_part_are_copied(tmp_path):
    config = tiny_config()
    folder = official(tmp_path / "source")
    name = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    rewrite(folder, put(name, bf16(np.array(3.0))))
    assert config["vision_config"]
    convert(folder, tmp_path / "out", quantize=True)
    found = load_all(tmp_path / "out")[name]
    assert found.shape == () and found.item() == 3


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    folder = official(tmp_path / "source")
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(WeightsError, match="has become shorter"):
        next(iter(checkpoint.tensors.values())).read(0, 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        next(iter(checkpoint.tensors.values())).read(0, 1)


def test_write_folder_of_the_test_is_what_mlx_reads(tmp_path):
    tensors = {"a": bf16(np.array([1.0, 1 + 2**-9, -3.0])), "b": f32(np.array(2.5))}
    write_folder(tmp_path / "x", {}, tensors)
    found = load_all(tmp_path / "x")
    assert found["a"].tolist() == [1.0, 1.0, -3.0] and found["b"].item() == 2.5
