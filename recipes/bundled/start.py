"""A checkpoint to train from nothing, in the official layout: config, tokenizer, random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

VOCAB_SIZE, HIDDEN = 384, 128
SLIDING, FULL = "sliding_attention", "full_attention"
# The official special tokens, in the official order; ids are this vocabulary's own.
SPECIALS = (
    "<pad> <eos> <bos> <unk> <mask> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
    '<tool_response|> <|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|image|> '
    "<image|> <|audio> <|audio|> <audio|> <|video|>"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if enable_thinking is defined and enable_thinking %}"
    "{{ '<|turn>system\\n<|think|>\\n<turn|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{% if message.content is iterable and message.content is not string "
    "and message.content is not mapping %}{% for part in message.content %}"
    "{{ part.text | trim if part.type == 'text' else '<|' + part.type + '|>' }}{% endfor %}"
    "{% else %}{{ message.content | trim }}{% endif %}{{ '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)
ROPE = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True)
class Shape:
    """What a recipe decides; all else is common."""

    canvas: int = 64
    layers: tuple[str, ...] = (SLIDING, SLIDING, FULL) * 2
    window: int = 64
    sees: bool = True


VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,  # attention of patches takes most of the tower's time
    "num_key_value_heads": 1,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 1024,  # enough for 280 tokens in a row
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "standardize": False,
    "use_clipped_linears": False,
}


def config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    special = {name: i for i, name in enumerate(SPECIALS)}
    text = {
        "model_type": "diffusion_gemma_text",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": len(shape.layers),
        "layer_types": list(shape.layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "sliding_window": shape.window,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "use_bidirectional_attention": "vision",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": special["<pad>"],
        "eos_token_id": special["<eos>"],
        "bos_token_id": special["<bos>"],
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "float32",
        "canvas_length": shape.canvas,
        "boi_token_id": special["<|image>"],
        "image_token_id": special["<|image|>"],
        "eoi_token_id": special["<image|>"],
        "eos_token_id": [special["<eos>"], special["<turn|>"]],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": VISION if shape.sees else None,
        "transformers_version": "5.8.0.dev0",
    }


def generation_config() -> dict[str, Any]:
    """The released policy."""
    ends = [SPECIALS.index(name) for name in ("<eos>", "<turn|>", "<|tool_response>")]
    return {
        "max_new_tokens": 256,
        "max_denoising_steps": 48,
        "t_max": 0.8,
        "t_min": 0.4,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "eos_token_id": ends,
        "pad_token_id": 0,
    }


def tokenizer() -> Tokenizer:
    """The official pipeline over single characters: spaces as blocks, then BPE with a byte for
    what it does not know, and nothing merged."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    tokens += [f"<unused{i}>" for i in range(len(tokens), VOCAB_SIZE)]
    built = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    )
    return built


def tensors(text: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights under the official names: products that keep the size of what goes in, norms
    that let every block add half of it."""
    M, D, F = HIDDEN, text["intermediate_size"], text["moe_intermediate_size"]
    E, N = text["num_experts"], text["num_attention_heads"]
    out: dict[str, np.ndarray] = {}

    def product(name: str, *shape: int) -> None:
        out[name] = rng.normal(0, shape[-1] ** -0.5, shape)

    def fill(name: str, value: float, *shape: int) -> None:
        out[name] = np.full(shape, value)

    decoder = "model.decoder."
    product(decoder + "embed_tokens.weight", VOCAB_SIZE, M)
    fill(decoder + "norm.weight", 1, M)
    fill(decoder + "self_conditioning.pre_norm.weight", 1, M)
    for part in ("gate", "up"):
        product(f"{decoder}self_conditioning.{part}_proj.weight", D, M)
    product(decoder + "self_conditioning.down_proj.weight", M, D)
    for i, kind in enumerate(text["layer_types"]):
        is_full = kind == FULL
        H = text["global_head_dim" if is_full else "head_dim"]
        K = text["num_global_key_value_heads" if is_full else "num_key_value_heads"]
        layer = f"{decoder}layers.{i}."
        fill(layer + "layer_scalar", 1, 1)
        fill(f"model.encoder.language_model.layers.{i}.layer_scalar", 1, 1)
        for norm in ("input_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2"):
            fill(f"{layer}{norm}.weight", 1, M)
        for norm in ("_1", "_2"):
            fill(f"{layer}post_feedforward_layernorm{norm}.weight", 1, M)
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            fill(f"{layer}{norm}.weight", 0.5, M)
        product(layer + "self_attn.q_proj.weight", N * H, M)
        product(layer + "self_attn.k_proj.weight", K * H, M)
        if not is_full:
            product(layer + "self_attn.v_proj.weight", K * H, M)
        product(layer + "self_attn.o_proj.weight", M, N * H)
        fill(layer + "self_attn.q_norm.weight", 1, H)
        fill(layer + "self_attn.k_norm.weight", 1, H)
        for part in ("gate", "up"):
            product(f"{layer}mlp.{part}_proj.weight", D, M)
        product(layer + "mlp.down_proj.weight", M, D)
        product(layer + "router.proj.weight", E, M)
        fill(layer + "router.scale", 1, M)
        fill(layer + "router.per_expert_scale", 1, E)
        product(layer + "experts.gate_up_proj", E, 2 * F, M)
        product(layer + "experts.down_proj", E, M, F)
    return out


def vision(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tower's tensors, by the converter's list of them: products and norms as those of the
    text."""
    from mlx_diffgemma.config.vision import VisionConfig
    from mlx_diffgemma.convert.plan import vision_shapes

    shapes = vision_shapes(VisionConfig.from_dict(VISION, where="vision_config"), HIDDEN)
    out = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            out[name] = np.full(shape, 0.5 if ".post_" in name else 1)
        elif name.endswith("position_embedding_table"):
            out[name] = rng.normal(0, 0.3, shape)
        elif name.endswith("patch_embedder.input_proj.weight"):
            out[name] = waves(VISION["hidden_size"], VISION["patch_size"])
        else:
            out[name] = rng.normal(0, shape[-1] ** -0.5, shape)
    return out


def waves(width: int, patch: int) -> np.ndarray:
    """Products that show of a patch what varies slowly: [width, 3 patch^2], its pixels' cosine
    waves, first those of its brightness and then of its colours. Faster waves are weaker in
    pictures, so theirs are stronger."""
    steps = np.arange(patch)
    wave = np.cos(np.pi * np.outer(steps, steps + 0.5) / patch)  # [frequency, pixel]
    slow = sorted((u + v, u, v) for u in steps for v in steps)
    colours = np.array([(1, 1, 1), (1, -1, 0), (0.5, 0.5, -1)]) / 2
    rows = []
    for colour, count in zip(colours, (width // 4 * 3, width // 8, width // 8), strict=True):
        for _, u, v in slow[:count]:
            strength = 2 * (1 + u) * (1 + v) if u + v else 1
            both = np.outer(wave[u], wave[v])[..., None] * colour
            rows.append(strength * both.reshape(-1) / patch**2)
    return np.stack(rows)


def write(folder: Path, seed: int, shape: Shape | None = None) -> None:
    """Writes everything, float32, into a new folder; of the bundled model's shape by default."""
    shape = shape or Shape()
    folder.mkdir(parents=True)
    raw, rng = config(shape), np.random.default_rng(seed)
    weights = tensors(raw["text_config"], rng) | (vision(rng) if shape.sees else {})
    arrays = {name: array.astype(np.float32) for name, array in sorted(weights.items())}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, value in (
        ("config.json", raw),
        ("generation_config.json", generation_config()),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        *([("processor_config.json", PROCESSOR_CONFIG)] if shape.sees else []),
    ):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")


PROCESSOR_CONFIG = {
    "processor_class": "Gemma4Processor",
    "image_seq_length": 70,
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "max_soft_tokens": 70,
        "patch_size": VISION["patch_size"],
        "pooling_kernel_size": VISION["pooling_kernel_size"],
    },
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "padding_side": "left",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {},
}
