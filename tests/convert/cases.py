"""Tiny checkpoints in every published layout, written by hand. Not a test.

No line of the converter is used here, so that its tests compare with the formats' definitions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.checkpoints import GENERATION, draw_config, draw_tensors

Stored = tuple[str, tuple[int, ...], bytes]  # type, shape, bytes

SIDE_FILES = {  # carried along as they are
    "chat_template.jinja": "{{ messages }}",
    "processor_config.json": '{"processor_class": "Gemma4Processor"}',
    "special_tokens_map.json": "{}",
}
# Every width can be packed in groups of 64.
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_experts": 2,
    "top_k_experts": 1,
    "canvas_length": 8,
    "per_layer": False,
}


def tiny_config(**text: Any) -> dict[str, Any]:
    return draw_config(0, **SHAPE | text) | {"dtype": "bfloat16"}


def bf16(values: np.ndarray) -> Stored:
    """Nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return "BF16", values.shape, half.tobytes()


def f32(values: np.ndarray) -> Stored:
    return "F32", values.shape, np.ascontiguousarray(values, "<f4").tobytes()


def u8(values: np.ndarray, dtype: str = "U8") -> Stored:
    return dtype, values.shape, np.ascontiguousarray(values, np.uint8).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    header, offset = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
    text = json.dumps(header).encode()
    data = b"".join(raw for _, _, raw in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_folder(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Stored], *, shards: int = 1
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, text in SIDE_FILES.items():
        (folder / name).write_text(text)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        write_safetensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def official(folder: Path, *, shards: int = 1, seed: int = 0, **text: Any) -> Path:
    """The official layout, bf16."""
    config = tiny_config(**text)
    tensors = {name: bf16(values) for name, values in draw_tensors(config, seed).items()}
    return write_folder(folder, config, tensors, shards=shards)


def is_expert(name: str) -> bool:
    return ".experts." in name


def nvfp4(folder: Path, **text: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """ModelOpt NVFP4: experts one by one. Also what the fused experts mean, in float64."""
    config = tiny_config(**text)
    rng = np.random.default_rng(4)
    tensors: dict[str, Stored] = {}
    meaning: dict[str, np.ndarray] = {}
    for name, values in draw_tensors(config, 0).items():
        if not is_expert(name):
            tensors[name] = bf16(values)
            continue
        experts, rows, columns = values.shape
        layer, fused = name.rsplit(".", 1)
        fused_parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        stack = []
        for expert in range(experts):
            parts = []
            for i, projection in enumerate(fused_parts):
                shape = (rows // len(fused_parts), columns // 2)
                packed = rng.integers(0, 256, shape, dtype=np.uint8)
                scale = rng.integers(1, 127, (shape[0], columns // 16), dtype=np.uint8)
                scale_2 = np.float32(0.001 * (1 + expert + 10 * i))  # gate and up differ
                path = f"{layer}.{expert}.{projection}"
                tensors[f"{path}.weight"] = u8(packed)
                tensors[f"{path}.weight_scale"] = u8(scale, "F8_E4M3")
                tensors[f"{path}.weight_scale_2"] = f32(np.array(scale_2))
                tensors[f"{path}.input_scale"] = f32(np.array(np.float32(1)))
                parts.append(
                    np.array(
                        [
                            [
                                fp4(packed[r, c // 2] >> (4 * (c % 2)) & 15)
                                * fp8(scale[r, c // 16])
                                * float(scale_2)
                                for c in range(columns)
                            ]
                            for r in range(shape[0])
                        ]
                    )
                )
            stack.append(np.concatenate(parts))
        meaning[f"{name}.weight"] = np.stack(stack)
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return write_folder(folder, config, tensors, shards=2), meaning


def fp8_dynamic(
    folder: Path, *, flat_scale: bool = False, **text: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """FP8-dynamic: attention, dense MLP and single experts e4m3 with a bf16 scale per output row.
    Also what they mean, in float64."""
    config = tiny_config(**text)
    rng = np.random.default_rng(8)
    tensors: dict[str, Stored] = {}
    meaning: dict[str, np.ndarray] = {}

    def pack(path: str, rows: int, columns: int) -> np.ndarray:
        codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        codes[(codes & 127) == 127] = 0  # not a number
        powers = rng.integers(-12, -8, rows)  # 2^-12 ... 2^-9: exact in bf16
        scale = np.exp2(powers.astype(np.float32)) * np.float32(1.5)
        tensors[f"{path}.weight"] = u8(codes, "F8_E4M3")
        tensors[f"{path}.weight_scale"] = bf16(scale if flat_scale else scale[:, None])
        values = np.array([[fp8(code) for code in row] for row in codes])
        return values * scale.astype(np.float64)[:, None]

    for name, values in draw_tensors(config, 0).items():
        if is_expert(name):
            layer, fused = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
            experts, rows, columns = values.shape
            meaning[f"{name}.weight"] = np.stack(
                [
                    np.concatenate(
                        [pack(f"{layer}.{e}.{p}", rows // len(parts), columns) for p in parts]
                    )
                    for e in range(experts)
                ]
            )
        elif "decoder.layers" in name and (".self_attn." in name or ".mlp." in name):
            if "norm" in name:
                tensors[name] = bf16(values)
            else:
                meaning[name] = pack(name.removesuffix(".weight"), *values.shape)
        else:
            tensors[name] = bf16(values)
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float"}
    return write_folder(folder, config, tensors), meaning


def fp4(code: int) -> float:
    """e2m1: a sign, two bits of exponent with bias 1, one of mantissa, subnormal below 1."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (int(exponent) - 1)
    return -size if sign else size


def fp8(code: int) -> float:
    """e4m3: a sign, four bits of exponent with bias 7, three of mantissa, subnormal below
    2^-6."""
    sign, exponent, mantissa = int(code) >> 7, (int(code) >> 3) & 15, int(code) & 7
    assert exponent != 15 or mantissa != 7, "not a number"
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def load_all(folder: Path) -> dict[str, mx.array]:
    """Every tensor, by MLX's own reader."""
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= mx.load(str(path))
    return tensors


def sums(folder: Path) -> dict[str, str]:
    """File name -> checksum."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())
