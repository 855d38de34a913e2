"""Small models with random weights and the head sizes of the published one."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..config.model import ModelConfig
from ..config.quantization import Quantization
from ..model import DiffusionGemma
from ..model.fused import fuse

CANVAS = 12


def random_config(*, hidden_size: int, experts: int, chosen: int, expert_size: int) -> ModelConfig:
    """Return the config of a model of two sliding layers and a full one, with heads of 256 and
    512."""
    sliding, full = "sliding_attention", "full_attention"
    return ModelConfig.from_dict(
        {
            "model_type": "diffusion_gemma",
            "dtype": "float32",
            "canvas_length": CANVAS,
            "eos_token_id": [1],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "diffusion_gemma_text",
                "vocab_size": 320,
                "hidden_size": hidden_size,
                "intermediate_size": 128,
                "moe_intermediate_size": expert_size,
                "num_experts": experts,
                "top_k_experts": chosen,
                "num_hidden_layers": 3,
                "layer_types": [sliding, sliding, full],
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "num_global_key_value_heads": 1,
                "global_head_dim": 512,
                "sliding_window": 16,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 1024,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    full: {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 0.25,
                        "rope_theta": 1e6,
                    },
                    sliding: {"rope_type": "default", "rope_theta": 1e4},
                },
                "final_logit_softcapping": 30.0,
                "use_bidirectional_attention": "vision",
                "attention_bias": False,
                "attention_dropout": 0.0,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "bos_token_id": 2,
            },
        },
        {"pad_token_id": 0, "max_denoising_steps": 8},
    )


def fill(module: nn.Module, seed: int) -> None:
    """Fill a module with random float32 weights: norms and scales near 1, others of deviation
    1/sqrt(inputs), the router's three times that so that its choice is clear. Norms of queries and
    keys make scores of deviation 3; larger ones multiply rounding as no trained model does."""
    rng = np.random.default_rng([19, seed])
    drawn = []
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    for name, array in parameters:
        values: np.ndarray = rng.standard_normal(array.shape)
        if "norm" in name or "scal" in name:
            values = 1 + 0.1 * values
            if "q_norm" in name or "k_norm" in name:
                values *= (3 / array.shape[-1] ** 0.5) ** 0.5
        else:
            values *= (3 if "router.proj" in name else 1) / array.shape[-1] ** 0.5
        drawn.append((name, mx.array(values.astype(np.float32))))
    module.update(tree_unflatten(drawn))


def prepared(
    model: DiffusionGemma, packing: Quantization | None, dtype: mx.Dtype
) -> DiffusionGemma:
    """Return the model packed, rounded to a type and fused, in place."""
    if packing is not None:
        nn.quantize(model, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    model.set_dtype(dtype)
    fuse(model)
    mx.eval(model.parameters())
    model.eval()
    return model


def random_model() -> DiffusionGemma:
    """Return a model with random weights in float32, as `prepared` takes it.

    All experts are chosen for every token: with random weights two are often nearly as likely, and
    bfloat16 swaps them, which is no fault but changes the logits.
    """
    config = random_config(hidden_size=128, experts=4, chosen=4, expert_size=64)
    model = DiffusionGemma(config)
    fill(model, 1)
    return model
