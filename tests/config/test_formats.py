"""Formats of other tools, as they write themselves into config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.config.formats import (
    FP8,
    NVFP4,
    PackedFormat,
    foreign_format,
    mlx_block,
    refusal,
    source_of,
    without_packing,
)

MLX = {"group_size": 64, "bits": 4}


def compressed(form: str, *weights: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """As compressed-tensors writes it."""
    groups = {
        f"group_{i}": {"targets": ["Linear"], "weights": w, "input_activations": None}
        for i, w in enumerate(weights)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | more


def weights(bits: int, kind: str, strategy: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True}


PER_CHANNEL = weights(8, "float", "channel")
MODELOPT = {"producer": {"name": "modelopt", "version": "0.33.0"}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("block", "name", "layouts"),
    [
        (
            MODELOPT | {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "ModelOpt NVFP4",
            (NVFP4,),
        ),
        (MODELOPT | {"quant_algo": "NVFP4"}, "ModelOpt NVFP4", (NVFP4,)),
        (MODELOPT | {"quantization": {"quant_algo": "NVFP4"}}, "ModelOpt NVFP4", (NVFP4,)),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "ModelOpt FP8 with one scale per tensor",
            (),
        ),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, "ModelOpt FP8 in blocks", ()),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            "ModelOpt FP8 with one scale per channel",
            (FP8,),
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt W4A8_AWQ", ()),
        (
            compressed("float-quantized", PER_CHANNEL),
            "compressed-tensors FP8 with one scale per channel",
            (FP8,),
        ),
        (
            compressed("float-quantized", PER_CHANNEL) | {"quant_method": "compressed_tensors"},
            "compressed-tensors FP8 with one scale per channel",
            (FP8,),
        ),
        (
            compressed("float-quantized", weights(8, "float", "tensor")),
            "compressed-tensors FP8 with one scale per tensor (float-quantized)",
            (),
        ),
        (
            compressed("float-quantized", weights(8, "float", "block")),
            "compressed-tensors FP8 with scales in blocks (float-quantized)",
            (),
        ),
        (
            compressed("int-quantized", weights(8, "int", "channel")),
            "compressed-tensors INT8 with one scale per channel (int-quantized)",
            (),
        ),
        (
            compressed("pack-quantized", weights(4, "int", "group")),
            "compressed-tensors INT4 with scales in groups (pack-quantized)",
            (),
        ),
        (
            compressed("nvfp4-pack-quantized", weights(4, "float", "tensor_group")),
            "compressed-tensors NVFP4 (nvfp4-pack-quantized)",
            (),
        ),
        (
            compressed("mxfp4-pack-quantized", weights(4, "float", "group")),
            "compressed-tensors MXFP4 (mxfp4-pack-quantized)",
            (),
        ),
        (
            compressed("mixed-precision", PER_CHANNEL, weights(8, "int", "channel")),
            "compressed-tensors FP8 with one scale per channel and INT8 with one scale per channel "
            "(mixed-precision)",
            (),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 in blocks", ()),
        ({"quant_method": "fp8"}, "FP8 with one scale per tensor", ()),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8 with one scale per channel", (FP8,)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ 4-bit", ()),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ 4-bit", ()),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "AutoRound 4-bit", ()),
        ({"quant_method": "intel/auto-round", "bits": 4}, "AutoRound 4-bit", ()),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit", ()),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit", ()),
        ({"quant_method": "mxfp4"}, "MXFP4", ()),
        ({"quant_method": "quark"}, "AMD Quark", ()),
        ({"quant_method": "tomorrow's"}, 'quant_method "tomorrow\'s"', ()),
    ],
)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_formats_of_other_tools_are_named(block, name, layouts, where):
    config = (
        {"text_config": {"quantization_config": block}}
        if where == "text_config"
        else {where: block}
    )
    assert foreign_format(config) == PackedFormat(name, layouts)
    assert mlx_block(config) is None
    assert foreign_format(without_packing(config)) is None


@pytest.mark.parametrize(
    ("config", "block"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": compressed("dense")}, None),
        ({"quantization_config": compressed("dense", None, kv_cache_scheme=PER_CHANNEL)}, None),
        ({"quantization": MLX}, MLX),
        ({"quantization_config": MLX}, MLX),
        ({"quantization": MLX, "quantization_config": MLX}, MLX),
        ({"quantization": MLX, "quantization_config": {"quant_method": "gptq", "bits": 4}}, MLX),
        ({"quantization_config": MLX | {"quant_method": "mlx"}}, MLX | {"quant_method": "mlx"}),
    ],
)
def test_plain_weights_and_mlx_packing_are_no_foreign_format(config, block):
    assert foreign_format(config) is None
    assert mlx_block(config) == block


def test_transformers_knows_no_method_that_reads_as_mlx_packing():
    from transformers.utils.quantization_config import QuantizationMethod

    for method in QuantizationMethod:
        block = {"quant_method": method.value, "bits": 4, "group_size": 64}
        found = foreign_format({"quantization_config": block})
        assert found is not None and found.name, method


def test_what_converts_comes_with_the_command_and_the_rest_with_what_is_supported():
    cache = Path("/home/x/.cache/hub/models--owner--the--name/snapshots/abc")
    assert source_of(cache) == "owner/the--name"
    assert source_of(Path("/models/x")) == "/models/x"
    said = refusal(PackedFormat("ModelOpt NVFP4", (NVFP4,)), source_of(cache))
    assert said.endswith("mlx_diffgemma.convert --hf-path owner/the--name --mlx-path NEW_FOLDER -q")
    said = refusal(PackedFormat("GPTQ 4-bit", ()), "x")
    assert "packed as GPTQ 4-bit, which is not supported" in said and "convert --hf" not in said
    assert (
        "MLX packing load" in said and "ModelOpt NVFP4 and FP8 with one scale per channel" in said
    )
