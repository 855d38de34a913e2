"""A small float32 checkpoint to adapt, and what it says. Not a test."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.train.train_cases import small_model

TOKENS = mx.array([[5, 60, 200, 3, 9, 301, 17, 4, 44, 80, 81, 82]])
CANVAS = mx.array([[7, 300, 301, 302, 20, 21, 22, 23]])


def plain_model(folder: Path) -> Path:
    """float32, so that sums are not rounded."""
    widths = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    heads = {"head_dim": 32, "global_head_dim": 32}
    return small_model(folder, **widths, **heads)


def logits_of(model) -> np.ndarray:
    """What two looks at a canvas give: the second one is conditioned on the first."""
    context = model.prefill(TOKENS)
    first = model.denoise(CANVAS, context)
    again = model.denoise(CANVAS, context, self_conditioning=model.soft_embedding(first))
    return np.array(again)
