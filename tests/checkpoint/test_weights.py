"""Weights from disk to model: complete, exact, and refused with one line where they do not fit."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import bundled_model
from mlx_diffgemma import load_model as load_any
from mlx_diffgemma.checkpoint.headers import INDEX
from mlx_diffgemma.checkpoint.names import Ignored, part_of, translate
from mlx_diffgemma.checkpoint.weights import load_weights
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.errors import WeightsError
from mlx_diffgemma.model import DiffusionGemma

EMBEDDING = "model.decoder.embed_tokens"
ROUTER = "model.decoder.layers.0.router.proj"
# Every module under its checkpoint's name.
load_model = functools.partial(load_any, fused=False)
QUERY = "model.decoder.layers.0.self_attn.q_proj"
WIDE = "model.decoder.layers.0.experts.down_proj"
EXPERTS = "model.decoder.layers.0.experts.gate_up_proj"
NORM = "model.decoder.norm.weight"
VISION = "model.encoder.vision_tower.patch_embedder.input_proj.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, mx.array]:
    return mx.load(str(bundled_model() / "model.safetensors"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the bundled model's configuration; the weights are up to the test."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(bundled_model() / name, tmp_path)
    return tmp_path


def save(folder: Path, tensors: dict[str, mx.array], name: str = "model.safetensors") -> None:
    mx.save_safetensors(str(folder / name), tensors, metadata={"format": "mlx"})


def save_shards(folder: Path, tensors: dict[str, mx.array], count: int) -> None:
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save(folder, {name: tensors[name] for name in names[i::count]}, file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_quantization(folder: Path, block: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": block}))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def refusal(folder: Path) -> str:
    """The one line that loading a folder fails with."""
    with pytest.raises(WeightsError) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_bundled_model_is_filled_exactly(tensors):
    loaded = parameters(load_model(bundled_model(), vision=True))
    used = {translate(n): a for n, a in tensors.items() if not isinstance(translate(n), Ignored)}
    assert loaded.keys() == used.keys()
    for name, array in used.items():
        assert mx.array_equal(loaded[name], array.astype(mx.float32)).item(), name
    text = parameters(load_model(bundled_model()))
    assert text.keys() == {name for name in used if part_of(name) != "vision"}


def test_one_file_and_shards_give_the_same_model(folder, tensors):
    save_shards(folder, tensors, 3)
    whole, sharded = parameters(load_model(bundled_model())), parameters(load_model(folder))
    assert whole.keys() == sharded.keys()
    assert all(mx.array_equal(whole[name], sharded[name]).item() for name in whole)


def test_numbered_shards_load_without_their_index(folder, tensors):
    save_shards(folder, tensors, 2)
    (folder / INDEX).unlink()
    assert mx.array_equal(
        parameters(load_model(folder))[NORM], tensors[NORM].astype(mx.float32)
    ).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_sources_in_half_and_single_precision_load(folder, tensors, dtype):
    save(folder, {name: array.astype(dtype) for name, array in tensors.items()})
    loaded = parameters(load_model(folder))
    expected = tensors[EMBEDDING + ".weight"].astype(dtype).astype(mx.float32)
    assert mx.array_equal(loaded[EMBEDDING + ".weight"].astype(mx.float32), expected).item()
    if mx.default_device() == mx.cpu:
        assert {array.dtype for array in loaded.values()} == {mx.float32}


def test_both_spellings_of_the_expert_arrays_load(folder, tensors):
    save(folder, {n + ".weight" * n.endswith(EXPERTS[-12:]): a for n, a in tensors.items()})
    assert mx.array_equal(
        parameters(load_model(folder))[EXPERTS + ".weight"], tensors[EXPERTS].astype(mx.float32)
    ).item()


# Source name, what becomes of it, and what the message must say.
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NORM: None}, [NORM, "missing", "[128]"]),
        (
            {ROUTER + ".weight": None, NORM: None},
            [f"{ROUTER}.weight and 1 more is missing", "[4, 128]"],
        ),
        ({"model.decoder.extra.weight": mx.zeros(1)}, ["model.decoder.extra.weight", "not part"]),
        (
            {"model.decoder.layers.6.layer_scalar": mx.zeros(1)},
            ["model.decoder.layers.6.layer_scalar", "without it"],
        ),
        (
            {"model.decoder.layers.2.self_attn.v_proj.weight": mx.zeros((64, 128))},
            ["layers.2.self_attn.v_proj.weight", "without it"],
        ),
        ({NORM: mx.zeros(127)}, [NORM, "[127]", "expected [128]"]),
        (
            {ROUTER + ".weight": mx.zeros((128, 4))},
            [ROUTER, "[128, 4]", "expected [4, 128]"],
        ),
        ({NORM: mx.zeros(128, mx.int32)}, [NORM, "I32", "BF16 or F16 or F32"]),
        ({QUERY + ".weight": mx.zeros((128, 128), mx.uint8)}, [QUERY, "U8", "BF16"]),
        ({QUERY + ".biases": mx.zeros((128, 4))}, [QUERY + ".biases", "without it"]),
        (
            {EXPERTS + ".weight": mx.zeros((4, 128, 128))},
            [EXPERTS, "hold different values"],
        ),
    ],
    ids=[
        "missing", "two missing", "unknown name", "a layer too many", "v_proj of a full layer",
        "too short", "transposed", "integers", "bytes", "biases without scales", "twice",
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named_with_what_was_expected(folder, tensors, change, said):
    changed = tensors | change
    save(folder, {name: array for name, array in changed.items() if array is not None})
    message = refusal(folder)
    assert all(part in message for part in said), message


def test_nothing_is_loaded_where_something_does_not_fit(folder, tensors):
    save(folder, {name: array for name, array in tensors.items() if name != NORM})
    config = ModelConfig.from_folder(folder)
    model = DiffusionGemma(config)
    before = parameters(model)
    with pytest.raises(WeightsError):
        load_weights(model, config, folder)
    assert all(array is before[name] for name, array in parameters(model).items())


def test_an_ignored_tensor_of_a_type_that_mlx_cannot_read_is_one_line(folder, tensors):
    save(folder, tensors)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[VISION] |= {
        "dtype": "F64",
        "shape": [len(mx.flatten(tensors[VISION])) // 4],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert "model.safetensors cannot be read" in refusal(folder)


# --- packed checkpoints, in the layout of mlx-community ---


def pack(
    tensors: dict[str, mx.array],
    setting: dict[str, object],
    overrides: dict[str, dict[str, object]],
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Packs every matrix of the text model; the packed file, and what its weights unpack to."""
    packed, unpacked = {}, {}
    for source, array in tensors.items():
        name = translate(source)
        if isinstance(name, Ignored) or array.ndim < 2 or part_of(name) == "vision":
            packed[source] = array
            continue
        module = name.removesuffix(".weight")
        how = overrides.get(module, setting)
        weight, scales, *biases = mx.quantize(array, **how)
        packed |= {name: weight, f"{module}.scales": scales}
        if biases:
            packed[f"{module}.biases"] = biases[0]
        unpacked[module] = mx.dequantize(weight, scales, *biases, **how)
    return packed, unpacked


def unpack(model: nn.Module, path: str) -> mx.array:
    module = dict(model.named_modules())[path]
    return mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


AFFINE_8 = {"group_size": 64, "bits": 8}
LAYOUTS = {
    "4-bit in 64": {"group_size": 64, "bits": 4, "mode": "affine"},
    "4-bit in 32": {"group_size": 32, "bits": 4, "mode": "affine"},
    "3-bit": {"group_size": 64, "bits": 3, "mode": "affine"},
    "6-bit": {"group_size": 64, "bits": 6, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def eight_bit_modules(tensors: dict[str, mx.array]) -> dict[str, dict[str, object]]:
    """What the published packs keep in 8 bits: all but experts and self-conditioning. Without a
    mode, whatever the file's own is."""
    names = [translate(name) for name, array in tensors.items() if array.ndim > 1]
    return {
        name.removesuffix(".weight"): dict(AFFINE_8)
        for name in names
        if isinstance(name, str) and "experts" not in name and "self_conditioning" not in name
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_packs_load_with_8_bit_overrides_and_unpack_to_the_same_weights(
    folder, tensors, layout
):
    setting, overrides = LAYOUTS[layout], eight_bit_modules(tensors)
    packed, unpacked = pack(tensors, setting, overrides)
    save(folder, packed)
    set_quantization(folder, setting | overrides)
    model = load_model(folder)
    assert unpacked.keys() == {p for p, m in model.named_modules() if hasattr(m, "bits")}
    for module, expected in unpacked.items():
        assert mx.array_equal(unpack(model, module), expected).item(), module
    context = model.prefill(mx.array([[2, 15, 30]]))
    logits = model.denoise(mx.array([[40, 41]]), context)
    assert mx.isfinite(logits).all().item()


def test_a_module_is_packed_where_it_has_scales_and_only_there(folder, tensors):
    setting = LAYOUTS["4-bit in 64"]
    packed, unpacked = pack(tensors, setting, {})
    for leaf in ("weight", "scales", "biases"):
        del packed[f"{QUERY}.{leaf}"]
    packed[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"]
    save(folder, packed)
    set_quantization(folder, setting)
    model = load_model(folder)
    modules = dict(model.named_modules())
    assert type(modules[QUERY]) is nn.Linear
    assert mx.array_equal(
        modules[QUERY].weight, tensors[f"{QUERY}.weight"].astype(modules[QUERY].weight.dtype)
    ).item()
    packed_paths = {path for path, module in modules.items() if hasattr(module, "bits")}
    assert packed_paths == unpacked.keys() - {QUERY}


def test_a_quantization_block_alone_packs_nothing(folder, tensors):
    save(folder, tensors)
    set_quantization(folder, LAYOUTS["mxfp4"])
    model = load_model(folder)
    assert not any(hasattr(module, "bits") for module in model.modules())


def test_packed_shards_load(folder, tensors):
    setting = LAYOUTS["nvfp4"]
    packed, unpacked = pack(tensors, setting, {})
    save_shards(folder, packed, 4)
    set_quantization(folder, setting)
    model = load_model(folder)
    assert mx.array_equal(unpack(model, EXPERTS), unpacked[EXPERTS]).item()


@pytest.mark.parametrize(
    ("block", "change", "said"),
    [
        (None, {}, ["no quantization block"]),
        (
            LAYOUTS["4-bit in 64"] | {QUERY: False},
            {},
            [QUERY, "says that", "is not quantized"],
        ),
        (
            LAYOUTS["4-bit in 32"],
            {},
            [".scales has shape", "4-bit affine in groups of 32"],
        ),
        (
            {"group_size": 64, "bits": 8},
            {},
            [".weight has shape", "expected", "8-bit affine"],
        ),
        (
            LAYOUTS["4-bit in 64"] | {WIDE: {"group_size": 128, "bits": 4}},
            {},
            [WIDE, "groups of 128 do not divide its width of 64"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {QUERY + ".biases": None},
            [QUERY + ".biases is missing", "affine"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {QUERY + ".weight": None},
            [QUERY + ".weight is missing", "affine"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {QUERY + ".weight": mx.zeros((128, 17), mx.uint32)},
            [QUERY + ".weight has shape [128, 17], expected [128, 16]"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {QUERY + ".weight": mx.zeros((128, 16), mx.int32)},
            [QUERY + ".weight has type I32, expected U32"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {QUERY + ".scales": mx.zeros((128, 2), mx.uint8)},
            [QUERY + ".scales has type U8", "BF16"],
        ),
        (
            LAYOUTS["4-bit in 64"],
            {"model.decoder.layers.6.mlp.up_proj.scales": mx.zeros((256, 2))},
            ["layers.6.mlp.up_proj", "not a module"],
        ),
    ],
    ids=[
        "no block", "override says no", "other groups", "other bits", "groups too wide",
        "no biases", "no weight", "packed shape", "packed type",
        "type of scales", "no such module",
    ],
)  # fmt: skip
def test_a_pack_that_contradicts_its_config_is_refused(folder, tensors, block, change, said):
    packed, _ = pack(tensors, LAYOUTS["4-bit in 64"], {})
    save(folder, {n: a for n, a in (packed | change).items() if a is not None})
    if block is not None:
        set_quantization(folder, block)
    message = refusal(folder)
    assert all(part in message for part in said), message


def test_biases_in_an_mx_mode_are_refused(folder, tensors):
    packed, _ = pack(tensors, LAYOUTS["4-bit in 32"], {})
    save(folder, packed)
    set_quantization(folder, LAYOUTS["mxfp4"])
    assert ".biases is there, but its packing is 4-bit mxfp4" in refusal(folder)


def test_float_scales_in_an_mx_mode_are_refused(folder, tensors):
    setting = LAYOUTS["mxfp8"]
    packed, _ = pack(tensors, setting, {})
    packed[QUERY + ".scales"] = packed[QUERY + ".scales"].astype(mx.bfloat16)
    save(folder, packed)
    set_quantization(folder, setting)
    assert f"{QUERY}.scales has type BF16, expected U8" in refusal(folder)
