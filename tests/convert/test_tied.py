"""Sources that store a weight under several names, or pack what is left out when loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load_model
from mlx_diffgemma.config.vision import VisionConfig
from mlx_diffgemma.convert import convert
from mlx_diffgemma.convert.plan import vision_shapes
from mlx_diffgemma.convert.verify import verify
from mlx_diffgemma.errors import WeightsError
from tests.convert.cases import bf16, f32, fp8_dynamic, load_all, nvfp4, official, same, u8
from tests.convert.cases import fp8 as fp8_by_hand
from tests.convert.test_sources import EXPERT, Q_PROJ, nearest_bf16, rewrite, rewrite_all_into_one

# --- one weight under several names ---


def encoders(name: str) -> str:
    is_shared = name.startswith("model.decoder.") and not any(
        word in name for word in ("layer_scalar", "self_conditioning")
    )
    return name.replace("decoder", "encoder.language_model", 1) if is_shared else name


def rewrite_names(folder: Path, *, both: bool) -> None:
    def change(tensors):
        for name, stored in list(tensors.items()):
            if not both:
                del tensors[name]
            tensors[encoders(name)] = stored

    (rewrite_all_into_one if len(list(folder.glob("*.safetensors"))) > 1 else rewrite)(
        folder, change
    )


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layout", [official, nvfp4, fp8_dynamic])
def test_weights_under_the_encoders_names_convert_to_the_same_bytes(tmp_path, layout, both):
    for name in ("ours", "theirs"):
        layout(tmp_path / name)
    rewrite_names(tmp_path / "theirs", both=both)
    for name in ("ours", "theirs"):
        convert(tmp_path / name, tmp_path / f"{name}-out", quantize=True)
    ours, theirs = (load_all(tmp_path / f"{name}-out") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    record = json.loads((tmp_path / "theirs-out/conversion.json").read_text())
    copies = {n: r for n, r in record["ignored"].items() if "to which it is tied" in r}
    assert bool(copies) is both
    assert all(r.startswith("equal to model.decoder.") for r in copies.values())
    verify(tmp_path / "theirs-out")


def test_a_packed_checkpoint_under_the_encoders_names_unpacks_to_the_same(tmp_path):
    convert(official(tmp_path / "source"), tmp_path / "ours", quantize=True)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    arrays = {encoders(name): array for name, array in load_all(tmp_path / "ours").items()}
    mx.eval(arrays)
    mx.save_safetensors(str(tmp_path / "theirs/model.safetensors"), arrays)
    path = tmp_path / "theirs/config.json"
    config = json.loads(path.read_text())
    config["quantization"] = {encoders(k): v for k, v in config["quantization"].items()}
    path.write_text(json.dumps(config))
    for name in ("ours", "theirs"):
        convert(tmp_path / name, tmp_path / f"{name}-out", dequantize=True)
    ours, theirs = (load_all(tmp_path / f"{name}-out") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(same(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (official, "lm_head.weight"),
        (official, encoders(f"{Q_PROJ}.weight")),
        (nvfp4, encoders(f"{EXPERT}.weight")),
        (nvfp4, encoders(f"{EXPERT}.weight_scale_2")),
        (fp8_dynamic, encoders(f"{Q_PROJ}.weight_scale")),
    ],
)
def test_a_second_name_with_other_values_is_refused_before_anything_is_written(
    tmp_path, layout, name
):
    layout(tmp_path / "source")
    rewrite_names(tmp_path / "source", both=True)

    def change(tensors):
        original = name if name in tensors else "model.decoder.embed_tokens.weight"
        dtype, shape, raw = tensors[original]
        tensors[name] = dtype, shape, raw[:-1] + bytes([raw[-1] ^ 1])

    rewrite(tmp_path / "source", change)
    with pytest.raises(WeightsError, match=f"{name} and model.decoder.* hold different values"):
        convert(tmp_path / "source", tmp_path / "out", quantize=True)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# --- vision that is packed ---


@pytest.mark.parametrize("layout", ["mlx", "fp8"])
def test_vision_that_is_packed_as_mlx_packs_stays_so_and_is_unpacked_from_other_packings(
    tmp_path, layout
):
    name = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear"
    folder = (
        official(tmp_path / "source") if layout == "mlx" else fp8_dynamic(tmp_path / "source")[0]
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    values = np.array([[fp8_by_hand(0x38 + r) for c in range(64)] for r in range(8)])
    if layout == "mlx":
        arrays = mx.quantize(nearest_bf16(values), group_size=64, bits=8)
        leaves = dict(zip(("weight", "scales", "biases"), arrays, strict=True))
        config["quantization"] = {"group_size": 64, "bits": 8}
        stored = {
            "weight": ("U32", leaves["weight"].shape, np.array(leaves["weight"]).tobytes()),
            "scales": bf16(np.array(leaves["scales"].astype(mx.float32))),
            "biases": bf16(np.array(leaves["biases"].astype(mx.float32))),
        }
    else:
        codes = np.repeat(np.arange(0x38, 0x40, dtype=np.uint8)[:, None], 64, axis=1)
        stored = {
            "weight": u8(codes, "F8_E4M3"),
            "weight_scale": bf16(np.ones((8, 1))),
            "input_scale": f32(np.array(2.0)),
        }
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 8, "head_dim": 64}
    path.write_text(json.dumps(config))
    shapes = vision_shapes(
        VisionConfig.from_dict(config["vision_config"], where="vision_config"),
        config["text_config"]["hidden_size"],
    )

    def change(tensors):
        for n, shape in shapes.items():
            tensors[n] = bf16(np.zeros(shape))
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{leaf}": value for leaf, value in stored.items()})

    rewrite(folder, change)
    convert(folder, tmp_path / "out", quantize=True)
    out = load_all(tmp_path / "out")
    if layout == "mlx":
        for leaf, array in leaves.items():
            assert same(out[f"{name}.{leaf}"], array), leaf
        convert(folder, tmp_path / "plain", dequantize=True)
        out = load_all(tmp_path / "plain")
    assert same(out[f"{name}.weight"], nearest_bf16(values))
    load_model(tmp_path / "out", vision=True)
