"""Layouts that do not load are named, with the command that converts them where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import DiffGemmaError, load_model
from mlx_diffgemma.checkpoint.info import describe
from tests.convert.cases import bf16, f32, fp8_dynamic, nvfp4, official, u8
from tests.convert.test_sources import Q_PROJ, put, rewrite

COMMAND = "mlx_diffgemma.convert --hf-path {folder} --mlx-path NEW_FOLDER -q"
VISION = "model.encoder.vision_tower.patch_embedder.input_proj"


def change_config(folder: Path, change) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def refusals(folder: Path) -> str:
    """What loading and `info` both say."""
    said = []
    for read in (load_model, describe):
        with pytest.raises(DiffGemmaError) as raised:
            read(folder)
        said.append(str(raised.value))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("layout", "name"), [(nvfp4, "ModelOpt NVFP4"), (fp8_dynamic, "FP8")])
def test_what_the_converter_reads_comes_with_its_command(tmp_path, layout, name, declared):
    folder, _ = layout(tmp_path / "source")
    if layout is fp8_dynamic:
        scheme = {"num_bits": 8, "type": "float", "strategy": "channel"}
        block = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": scheme}}}
        change_config(folder, lambda config: config.update(quantization_config=block))
    if not declared:
        change_config(folder, lambda config: config.pop("quantization_config"))
    message = refusals(folder)
    assert f"{name}" in message and "does not load directly" in message
    assert message.endswith(COMMAND.format(folder=folder))


@pytest.mark.parametrize(
    ("leaves", "name"),
    [
        ({"weight_packed": ("I32", (1,), b"0000")}, "compressed-tensors packed integers"),
        ({"qweight": ("I32", (1,), b"0000")}, "GPTQ or AWQ"),
        ({"weight_scale_inv": bf16(np.ones((1, 1)))}, "FP8 in blocks"),
        (
            {"weight": u8(np.ones((64, 64)), "I8"), "weight_scale": bf16(np.ones((64, 1)))},
            "INT8",
        ),
        (
            {"weight": u8(np.ones((64, 32))), "weight_scale": u8(np.ones((64, 2)), "F8_E8M0")},
            "MXFP4",
        ),
        (
            {"weight": u8(np.ones((64, 64)), "F8_E4M3"), "weight_scale": f32(np.array(2.0))},
            "FP8 with one scale per tensor",
        ),
    ],
)
def test_what_nothing_reads_comes_with_what_is_supported(tmp_path, leaves, name):
    folder = official(tmp_path / "source")
    rewrite(folder, lambda tensors: tensors.update({f"{Q_PROJ}.{k}": v for k, v in leaves.items()}))
    message = refusals(folder)
    assert f"packed as {name}, which is not supported" in message and Q_PROJ in message
    assert "--hf-path" not in message


@pytest.mark.parametrize(
    "leaves",
    [
        {"weight": ("U32", (8, 6), bytes(192)), "scales": bf16(np.ones((8, 1)))},
        {"weight": u8(np.ones((8, 48)), "F8_E4M3"), "weight_scale": bf16(np.ones((8, 1)))},
        {"weight_packed": u8(np.ones((8, 24))), "weight_global_scale": f32(np.ones(1))},
        {"qweight": ("I32", (6, 8), bytes(192)), "g_idx": ("I32", (48,), bytes(192))},
    ],
)
def test_vision_in_any_packing_does_not_keep_the_text_model_from_loading(tmp_path, leaves):
    plain = official(tmp_path / "plain")
    folder = official(tmp_path / "source")

    def change(tensors):
        del tensors[f"{VISION}.weight"]
        tensors.update({f"{VISION}.{leaf}": stored for leaf, stored in leaves.items()})

    rewrite(folder, change)
    ours, theirs = (dict(tree_flatten(load_model(f).parameters())) for f in (folder, plain))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    assert "loaded with the first image" in describe(folder).vision
    assert describe(folder).loaded_bytes == describe(plain).loaded_bytes


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.v_proj.v_scale"])
def test_scales_of_a_quantized_kv_cache_are_no_weights(tmp_path, name):
    plain, folder = official(tmp_path / "plain"), official(tmp_path / "source")
    rewrite(folder, put(f"model.decoder.layers.0.{name}", f32(np.array(2.0))))
    load_model(folder)
    assert describe(folder).parameters == describe(plain).parameters
