"""The published 26B model's config.json, and the shapes of single parts of it. Imports no mlx."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ..config.model import LayerConfig, ModelConfig

# Source: google/diffusiongemma-26B-A4B-it, config.json.
_CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "dtype": "bfloat16",
    "canvas_length": 256,
    "boi_token_id": 255999,
    "image_token_id": 258880,
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "vision_soft_tokens_per_image": 280,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "sliding_window": 1024,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "max_position_embeddings": 262144,
        "use_bidirectional_attention": "vision",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "global_head_dim": 72,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10240,
        "default_output_length": 280,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "standardize": True,
        "use_clipped_linears": False,
        "max_position_embeddings": 131072,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "dtype": "bfloat16",
    },
}


def config_26b() -> dict[str, Any]:
    """Return config.json of the published model, to use or to change."""
    return copy.deepcopy(_CONFIG)


def published_model() -> ModelConfig:
    """Return the published model's config, as it is read from a checkpoint."""
    return ModelConfig.from_dict(config_26b())


def with_layers(config: ModelConfig, *layers: LayerConfig) -> ModelConfig:
    """Return a config with these layers alone."""
    text = replace(config.text, layers=layers, num_hidden_layers=len(layers))
    return replace(config, text=text)
