"""Writes made-up DiffusionGemma checkpoints of any shape, in the official bf16 layout or in the
published 4-bit one, without ever holding more than one block of values. They load and compute; what
they say means nothing.

    python bench/make_checkpoint.py /tmp/26b-4bit --layout 4bit
    python bench/make_checkpoint.py /tmp/26b --layout official --sparse

Sources: google/diffusiongemma-26B-A4B-it and mlx-community/diffusiongemma-26B-A4B-it-4bit, config
and index files; huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_diffgemma.doctor.published import config_26b

Layout = Literal["official", "4bit"]
Fill = Literal["packed", "scales", "biases", "weight", "one", "zero"]

SHARD_BYTES = 5_000_000_000  # "5GB" as transformers reads it
_BLOCK = 1 << 22  # values made at a time
_ELEMENT_BYTES = {"BF16": 2, "U32": 4}

_GENERATION: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "t_max": 0.8,
    "t_min": 0.4,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write; `bound` is the largest value of a weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Fill
    bound: float = 0.0
    bits: int = 0  # of a packed module

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_checkpoint` has put on disk."""

    folder: Path
    tensors: int
    tensor_bytes: int
    shards: int
    packed_modules: int


def official_tensors(config: dict[str, Any]) -> list[Tensor]:
    """The tensors of the official layout, in the order of its layers; without `vision_config`, the
    text part alone."""
    text, tensors = config["text_config"], []
    M, V, F = text["hidden_size"], text["vocab_size"], text["intermediate_size"]
    E, X, N = text["num_experts"], text["moe_intermediate_size"], text["num_attention_heads"]

    def weight(name: str, *shape: int) -> None:
        tensors.append(Tensor(name, "BF16", shape, "weight", 1 / math.sqrt(shape[-1])))

    def one(name: str, *shape: int) -> None:
        tensors.append(Tensor(name, "BF16", shape, "one"))

    decoder = "model.decoder"
    weight(f"{decoder}.embed_tokens.weight", V, M)
    for i, kind in enumerate(text["layer_types"]):
        layer, sliding = f"{decoder}.layers.{i}", kind == "sliding_attention"
        H = text["head_dim"] if sliding else text["global_head_dim"]
        K = text["num_key_value_heads"] if sliding else text["num_global_key_value_heads"]
        one(f"{layer}.layer_scalar", 1)
        for norm in (
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
            "pre_feedforward_layernorm_2 post_feedforward_layernorm "
            "post_feedforward_layernorm_1 post_feedforward_layernorm_2"
        ).split():
            one(f"{layer}.{norm}.weight", M)
        weight(f"{layer}.self_attn.q_proj.weight", N * H, M)
        for name in ("k_proj", "v_proj") if sliding else ("k_proj",):
            weight(f"{layer}.self_attn.{name}.weight", K * H, M)
        weight(f"{layer}.self_attn.o_proj.weight", M, N * H)
        one(f"{layer}.self_attn.q_norm.weight", H)
        one(f"{layer}.self_attn.k_norm.weight", H)
        weight(f"{layer}.mlp.gate_proj.weight", F, M)
        weight(f"{layer}.mlp.up_proj.weight", F, M)
        weight(f"{layer}.mlp.down_proj.weight", M, F)
        weight(f"{layer}.router.proj.weight", E, M)
        one(f"{layer}.router.scale", M)
        one(f"{layer}.router.per_expert_scale", E)
        weight(f"{layer}.experts.gate_up_proj", E, 2 * X, M)
        weight(f"{layer}.experts.down_proj", E, M, X)
    one(f"{decoder}.norm.weight", M)
    one(f"{decoder}.self_conditioning.pre_norm.weight", M)
    weight(f"{decoder}.self_conditioning.gate_proj.weight", F, M)
    weight(f"{decoder}.self_conditioning.up_proj.weight", F, M)
    weight(f"{decoder}.self_conditioning.down_proj.weight", M, F)
    for i in range(text["num_hidden_layers"]):
        one(f"model.encoder.language_model.layers.{i}.layer_scalar", 1)
    if vision := config.get("vision_config"):
        tensors += _vision_tensors(vision, M)
    return tensors


def packed_tensors(
    config: dict[str, Any], *, vision_projection: bool = True
) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors of the published 4-bit layout, and its `quantization` block.

    Everything is 4-bit affine in groups of 64; embedding, attention, dense blocks and routers are
    overridden to 8 bits. `vision_projection`: mlx-vlm packed it in the published files and leaves
    it alone since 0.7.10; the rest of the vision part is never packed.
    """
    group, tensors = 64, []
    quantization: dict[str, Any] = {"group_size": group, "bits": 4, "mode": "affine"}
    for tensor in official_tensors(config):
        path = tensor.name.removesuffix(".weight")
        is_projection = path.endswith("embed_vision.embedding_projection")
        *rest, width = tensor.shape
        if (
            tensor.fill != "weight"
            or ("vision" in path and not (is_projection and vision_projection))
            or width % group  # mlx-vlm's converter leaves such a module as it is
        ):
            tensors.append(tensor)
            continue
        bits = 4
        if any(part in path for part in ("embed_tokens", ".self_attn.", ".mlp.", ".router.")):
            bits = 8
            quantization[path] = {"group_size": group, "bits": bits}
        for leaf, dtype, columns, fill in (
            ("weight", "U32", width * bits // 32, "packed"),
            ("scales", "BF16", width // group, "scales"),
            ("biases", "BF16", width // group, "biases"),
        ):
            shape = (*rest, columns)
            tensors.append(Tensor(f"{path}.{leaf}", dtype, shape, fill, tensor.bound, bits))
    return tensors, quantization


def write_checkpoint(
    folder: Path,
    *,
    layout: Layout = "4bit",
    config: dict[str, Any] | None = None,
    sparse: bool = False,
    vision_projection: bool = True,
    seed: int = 0,
) -> Written:
    """Writes config, generation config, shards of at most 5 GB and their index; no tokenizer.

    Args:
      folder: made where it does not exist; files in it are overwritten.
      layout: "official" is bf16 throughout, "4bit" the published packing.
      config: config.json of the wanted shape, with `global_head_dim` and
        `num_global_key_value_heads` as published; the 26B model by default.
      sparse: weights become holes, which read as zeros and take no disk: in the official layout
        every tensor, in the 4-bit one the packed weights and the vision tower. There a weight is
        then its group's bias, so the model still computes something.
      vision_projection: see `packed_tensors`.
      seed: of all values.
    """
    config = config_26b() if config is None else copy.deepcopy(config)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "official":
        tensors = official_tensors(config)
    else:
        tensors, quantization = packed_tensors(config, vision_projection=vision_projection)
        config["quantization"] = config["quantization_config"] = quantization
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    noise = rng.random(_BLOCK, dtype=np.float32)
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, layout, sparse, rng, noise)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _GENERATION | _end_tokens(config))
    packed = sum(tensor.fill == "packed" for tensor in tensors)
    return Written(folder, len(tensors), total, len(shards), packed)


def _vision_tensors(vision: dict[str, Any], text_width: int) -> Iterator[Tensor]:
    W, F, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    heads, kv_heads, H = (
        vision["num_attention_heads"],
        vision["num_key_value_heads"],
        vision["head_dim"],
    )
    tower = "model.encoder.vision_tower"

    def weight(name: str, *shape: int) -> Tensor:
        return Tensor(name, "BF16", shape, "weight", 1 / math.sqrt(shape[-1]))

    yield weight("model.encoder.embed_vision.embedding_projection.weight", text_width, W)
    if vision.get("standardize"):
        yield Tensor(f"{tower}.std_bias", "BF16", (W,), "zero")
        yield Tensor(f"{tower}.std_scale", "BF16", (W,), "one")
    yield weight(f"{tower}.patch_embedder.input_proj.weight", W, 3 * patch**2)
    table = f"{tower}.patch_embedder.position_embedding_table"
    yield weight(table, 2, vision["position_embedding_size"], W)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        yield weight(f"{layer}.self_attn.q_proj.linear.weight", heads * H, W)
        yield weight(f"{layer}.self_attn.k_proj.linear.weight", kv_heads * H, W)
        yield weight(f"{layer}.self_attn.v_proj.linear.weight", kv_heads * H, W)
        yield weight(f"{layer}.self_attn.o_proj.linear.weight", W, heads * H)
        yield Tensor(f"{layer}.self_attn.q_norm.weight", "BF16", (H,), "one")
        yield Tensor(f"{layer}.self_attn.k_norm.weight", "BF16", (H,), "one")
        yield weight(f"{layer}.mlp.gate_proj.linear.weight", F, W)
        yield weight(f"{layer}.mlp.up_proj.linear.weight", F, W)
        yield weight(f"{layer}.mlp.down_proj.linear.weight", W, F)
        for norm in (
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
            "post_feedforward_layernorm"
        ).split():
            yield Tensor(f"{layer}.{norm}.weight", "BF16", (W,), "one")


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _write_shard(
    path: Path,
    tensors: list[Tensor],
    layout: Layout,
    sparse: bool,
    rng: np.random.Generator,
    noise: np.ndarray,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt" if layout == "official" else "mlx"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the format wants it
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            is_hole = sparse and (
                layout == "official" or tensor.fill == "packed" or "vision" in tensor.name
            )
            if is_hole:
                file.seek(tensor.nbytes, 1)
                continue
            for block in _values(tensor, sparse, rng, noise):
                file.write(block.data)
        file.truncate(8 + len(text) + end)


def _values(
    tensor: Tensor, sparse: bool, rng: np.random.Generator, noise: np.ndarray
) -> Iterator[np.ndarray]:
    """The raw elements of a tensor, block by block, uint16 for bfloat16. Each block is a rotation
    of the same noise: making every value anew would take longer than writing it."""
    left = math.prod(tensor.shape)
    while left:
        count = min(left, _BLOCK)
        left -= count
        uniform = np.roll(noise, int(rng.integers(_BLOCK)))[:count]  # [0, 1)
        levels = 2**tensor.bits - 1
        match tensor.fill:
            case "packed":
                yield rng.integers(0, 2**32, count, dtype=np.uint32)
            case "scales":  # q from 0 to `levels`, so that weights span -bound .. bound
                yield _bfloat16((0.9 + 0.2 * uniform) * 2 * tensor.bound / levels)
            case "biases" if sparse:  # all there is of a weight: half of them below zero
                yield _bfloat16((2 * uniform - 1) * tensor.bound)
            case "biases":
                yield _bfloat16(-(0.9 + 0.2 * uniform) * tensor.bound)
            case "weight":
                yield _bfloat16((2 * uniform - 1) * tensor.bound)
            case "one":
                yield np.full(count, 0x3F80, np.uint16)
            case "zero":
                yield np.zeros(count, np.uint16)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of finite float32 values, ties to even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _end_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The published end tokens, as far as a smaller vocabulary has them."""
    ids = [i for i in _GENERATION["eos_token_id"] if i < config["text_config"]["vocab_size"]]
    return {"eos_token_id": ids}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("official", "4bit"), default="4bit")
    parser.add_argument("--config", type=Path, help="config.json of another shape than 26B's")
    parser.add_argument("--sparse", action="store_true", help="weights as holes that take no disk")
    parser.add_argument(
        "--plain-vision-projection",
        action="store_true",
        help="299 packed modules, as mlx-vlm 0.7.10 converts; the published files have 300",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    written = write_checkpoint(
        options.folder,
        layout=options.layout,
        config=json.loads(options.config.read_text()) if options.config else None,
        sparse=options.sparse,
        vision_projection=not options.plain_vision_projection,
        seed=options.seed,
    )
    print(
        f"{written.folder}: {written.tensors:,} tensors of {written.tensor_bytes:,} bytes in "
        f"{written.shards} files, {written.packed_modules} packed modules"
    )


if __name__ == "__main__":
    main()
