"""Draws legal random configs and writes random checkpoints in the official layout, float32. Not a
test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_diffgemma import load_model
from mlx_diffgemma.model import DiffusionGemma

VISION = {  # transformers builds a tower whatever the files hold, so it is told to build a tiny one
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 8,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
    "model_type": "gemma4_vision",
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": False,
}
GENERATION = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "t_max": 0.8,
    "t_min": 0.4,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 5],
    "pad_token_id": 0,
}
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
)
SLIDING, FULL = "sliding_attention", "full_attention"


def draw_config(seed: int, **text: Any) -> dict[str, Any]:
    """A legal config.json; the same for the same seed. `text` sets keys of text_config, in the
    spelling with global keys; `canvas_length` and `per_layer` may be among them.

    Layer types are a true mix. Even seeds write the spelling with global keys, odd ones
    `per_layer_config` (`per_layer` decides otherwise). One file in four says that the last layer is
    a sliding one, which no runtime may believe.
    """
    rng = np.random.default_rng([2025, seed])

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    def divisor(number: int) -> int:
        return pick(*(d for d in range(1, number + 1) if number % d == 0))

    heads, layers = pick(1, 2, 3, 4, 6), pick(2, 3, 3, 4)
    experts = int(rng.integers(1, 17))
    types = [pick(SLIDING, SLIDING, FULL) for _ in range(layers - 1)]
    if SLIDING not in types:
        types[rng.integers(layers - 1)] = SLIDING
    values = {
        "vocab_size": int(rng.integers(64, 129)),
        "hidden_size": pick(16, 24, 32, 40, 64),
        "intermediate_size": pick(16, 24, 48),
        "moe_intermediate_size": pick(8, 12, 16),
        "num_hidden_layers": layers,
        "layer_types": [*types, pick(FULL, FULL, FULL, SLIDING)],
        "num_attention_heads": heads,
        "num_key_value_heads": divisor(heads),
        "num_global_key_value_heads": divisor(heads),
        "head_dim": pick(4, 6, 8, 16),
        "global_head_dim": pick(8, 16, 24, 32),
        "sliding_window": int(rng.choice([4, 5, 8, 13, 16, 32, 64])),
        "num_experts": experts,
        "top_k_experts": int(rng.integers(1, min(experts, 4) + 1)),
        "canvas_length": int(rng.choice([1, 2, 7, 8, 16, 31, 64])),
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": pick(0.25, 0.25, 0.5),
                "rope_theta": 1e6,
            },
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 1024,
        "use_bidirectional_attention": "vision",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "model_type": "diffusion_gemma_text",
        "per_layer": bool(seed % 2),
    } | text
    canvas_length, per_layer = values.pop("canvas_length"), values.pop("per_layer")
    if per_layer:
        entry = {}
        for key, name in (
            ("global_head_dim", "head_dim"),
            ("num_global_key_value_heads", "num_key_value_heads"),
        ):
            if (value := values.pop(key)) != values[name]:  # this spelling lists what differs
                entry[name] = value
        values["per_layer_config"] = {
            str(i): entry for i, kind in enumerate(layer_types(values)) if kind == FULL
        }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "float32",
        "canvas_length": canvas_length,
        "boi_token_id": 60,
        "image_token_id": 61,
        "eoi_token_id": 62,
        "eos_token_id": [1, 5],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "text_config": values,
        "vision_config": VISION,
        "transformers_version": "5.8.0.dev0",
    }


def draw_vision_config(seed: int, **more: Any) -> dict[str, Any]:
    """A legal config.json whose vision tower is drawn too; `more` as in `draw_config`. The text has
    a full layer before the last one, whose attention reaches no context, and windows that images
    may be longer than."""
    rng = np.random.default_rng([2027, seed])

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    heads, head_dim = pick(1, 2, 3, 4), pick(4, 8, 12, 12)  # wider ones round too much
    vision = VISION | {
        "hidden_size": pick(8, 12, 24, 32),
        "intermediate_size": pick(8, 20, 48),
        "num_hidden_layers": pick(1, 2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*(d for d in range(1, heads + 1) if heads % d == 0)),
        "head_dim": head_dim,
        "patch_size": pick(2, 4),
        "pooling_kernel_size": pick(3, 3, 2),
        "position_embedding_size": 64,
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-3),
        "rope_parameters": {"rope_theta": pick(100.0, 10.0, 1e4)},
        "standardize": pick(True, True, False),
        "use_clipped_linears": pick(True, False, False),
    }
    if kind := pick("default", "axial", None):
        vision["rope_parameters"]["rope_type"] = kind
    middle = [SLIDING, FULL] if seed % 3 else [FULL, SLIDING]
    text = {"num_hidden_layers": 4, "layer_types": [pick(SLIDING, FULL), *middle, FULL]}
    window = int(rng.choice([4, 5, 8, 13]))
    config = draw_config(seed, sliding_window=window, **text | more)
    return config | {"vision_config": vision}


def layer_types(text: dict[str, Any]) -> list[str]:
    """The types in effect: the last layer is full, whatever the file says."""
    return [*text["layer_types"][:-1], FULL]


def tensor_shapes(text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the official layout, without vision."""
    M, V, N = text["hidden_size"], text["vocab_size"], text["num_attention_heads"]
    E, F, D = text["num_experts"], text["moe_intermediate_size"], text["intermediate_size"]
    decoder = "model.decoder."
    yield decoder + "embed_tokens.weight", (V, M)
    yield decoder + "norm.weight", (M,)
    yield decoder + "self_conditioning.pre_norm.weight", (M,)
    yield decoder + "self_conditioning.gate_proj.weight", (D, M)
    yield decoder + "self_conditioning.up_proj.weight", (D, M)
    yield decoder + "self_conditioning.down_proj.weight", (M, D)
    for i, kind in enumerate(layer_types(text)):
        H, K = text["head_dim"], text["num_key_value_heads"]
        if kind == FULL and "per_layer_config" in text:
            entry = text["per_layer_config"][str(i)]
            H, K = entry.get("head_dim", H), entry.get("num_key_value_heads", K)
        elif kind == FULL:
            H, K = text["global_head_dim"], text["num_global_key_value_heads"]
        layer = f"{decoder}layers.{i}."
        yield layer + "layer_scalar", (1,)
        yield f"model.encoder.language_model.layers.{i}.layer_scalar", (1,)
        for name in NORMS:
            yield f"{layer}{name}.weight", (M,)
        yield layer + "self_attn.q_proj.weight", (N * H, M)
        yield layer + "self_attn.k_proj.weight", (K * H, M)
        if kind == SLIDING:
            yield layer + "self_attn.v_proj.weight", (K * H, M)
        yield layer + "self_attn.o_proj.weight", (M, N * H)
        yield layer + "self_attn.q_norm.weight", (H,)
        yield layer + "self_attn.k_norm.weight", (H,)
        yield layer + "mlp.gate_proj.weight", (D, M)
        yield layer + "mlp.up_proj.weight", (D, M)
        yield layer + "mlp.down_proj.weight", (M, D)
        yield layer + "router.proj.weight", (E, M)
        yield layer + "router.scale", (M,)
        yield layer + "router.per_expert_scale", (E,)
        yield layer + "experts.gate_up_proj", (E, 2 * F, M)
        yield layer + "experts.down_proj", (E, M, F)


def vision_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the vision tower and its projection."""
    vision, tower = config["vision_config"], "model.encoder.vision_tower."
    W, F, H = vision["hidden_size"], vision["intermediate_size"], vision["head_dim"]
    N, K = vision["num_attention_heads"] * H, vision["num_key_value_heads"] * H
    M = config["text_config"]["hidden_size"]
    yield "model.encoder.embed_vision.embedding_projection.weight", (M, W)
    yield tower + "patch_embedder.input_proj.weight", (W, 3 * vision["patch_size"] ** 2)
    places = vision["position_embedding_size"]
    yield tower + "patch_embedder.position_embedding_table", (2, places, W)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        shapes = {"self_attn.q": (N, W), "self_attn.k": (K, W), "self_attn.v": (K, W)}
        shapes |= {"self_attn.o": (W, N), "mlp.gate": (F, W), "mlp.up": (F, W), "mlp.down": (W, F)}
        for part, shape in shapes.items():
            yield f"{layer}{part}_proj.linear.weight", shape
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{layer}{name}.weight", (H,)
        for name in NORMS[:4]:
            yield f"{layer}{name}.weight", (W,)
        if vision.get("use_clipped_linears"):
            for part in shapes:
                for bound in ("input_min", "input_max", "output_min", "output_max"):
                    yield f"{layer}{part}_proj.{bound}", ()
    if vision.get("standardize"):
        yield tower + "std_bias", (W,)
        yield tower + "std_scale", (W,)


def draw_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Weights of deviation 1/sqrt(inputs), the router's three times that so that it has opinions;
    norms and scales near 1. The encoder's layer scalars are drawn apart from the decoder's."""
    rng = np.random.default_rng([2026, seed])
    tensors = {}
    for name, shape in (*tensor_shapes(config["text_config"]), *vision_shapes(config)):
        normal = rng.standard_normal(shape)
        if name.endswith(("_min", "_max")):  # narrow enough to bound some of the numbers
            values = np.abs(1 + 0.3 * normal) * (1 if name.endswith("max") else -1)
        elif "norm" in name or "scal" in name:
            values = 1 + 0.1 * normal
        else:
            values = normal / shape[-1] ** 0.5 * (3 if "router.proj" in name else 1)
        tensors[name] = np.asarray(values, np.float32)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """config.json, generation_config.json and model.safetensors; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=1))
    save_file(draw_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_drawn(
    seed: int,
    *,
    vision: bool | None = None,
    config: dict[str, Any] | None = None,
    **text: Any,
) -> DiffusionGemma:
    """Our model of a config, by default a drawn one, with drawn weights. Its files are gone, so
    that images need its vision at once."""
    with TemporaryDirectory() as folder:
        config = draw_config(seed, **text) if config is None else config
        written = write_checkpoint(Path(folder), config, seed)
        return load_model(written, vision=vision)
