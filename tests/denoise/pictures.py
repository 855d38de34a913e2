"""Draws pictures for rows of drawn models. Not a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from mlx_diffgemma.language.images import ImagePatches
from mlx_diffgemma.model import DiffusionGemma


def draw_picture(model: DiffusionGemma, rng: np.random.Generator, most: int = 4) -> ImagePatches:
    """A picture of random pixels and at most so many tokens on a side."""
    vision = model.config.vision
    assert vision is not None
    k = vision.pooling_kernel_size
    most = min(most, vision.position_embedding_size // k)
    across, down = (int(n) for n in rng.integers(1, most + 1, 2))
    columns, rows = np.meshgrid(np.arange(across * k), np.arange(down * k))
    positions = np.stack([columns.ravel(), rows.ravel()], axis=-1).astype(np.int32)
    pixels = rng.integers(0, 256, (len(positions), vision.patch_width), dtype=np.uint8)
    return ImagePatches(pixels, positions, across * down)


def ids_of(model: DiffusionGemma, picture: ImagePatches) -> np.ndarray:
    """The tokens at a picture's place, with those that begin and end it."""
    begin, token, end = model.config.image_token_ids
    return np.array([begin, *[token] * picture.soft_tokens, end], np.int32)


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count what the vision tower computes: the patches of each image that a model sees."""
    seen: list[int] = []
    see = DiffusionGemma.see

    def counted(model, patches, positions):
        seen.append(patches.shape[0])
        return see(model, patches, positions)

    with patch.object(DiffusionGemma, "see", counted):
        yield seen
