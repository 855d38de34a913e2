"""Images as the patches that the model's vision tower reads.

An image is enlarged or reduced, its sides' ratio kept, to the most patches that fit the budget of
soft tokens, by Pillow's 8-bit bicubic: it rounds to 8 bits between its two passes, which a filter
on floats does not. Each `pooling` x `pooling` patches become one soft token.
Source: Gemma4ImageProcessorPil of transformers 5.23, which it equals bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..config.images import DEFAULT_BUDGET, check_budget
from .pictures import MAX_PIXELS, read_rgb


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """One image, ready for the vision tower."""

    pixels: np.ndarray  # [P, patch * patch * 3] uint8, each patch as (row, column, channel)
    positions: np.ndarray  # [P, 2] int32 (x, y), the patch's column and row
    soft_tokens: int  # the image tokens it takes

    @property
    def patches(self) -> np.ndarray:
        """[P, patch * patch * 3] float32 from 0 to 1; made anew, since it takes 4 times the bytes.
        Equal to transformers' product with 1 / 255, which is in float64 and rounded once."""
        return self.pixels / np.float32(255)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for pixels and positions: the key of the image's features."""
        digest = hashlib.sha256(f"{self.pixels.shape} {self.soft_tokens} ".encode())
        digest.update(np.ascontiguousarray(self.positions).data)
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImagePatches) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def read_image(
    source: Any,
    *,
    soft_tokens: int = DEFAULT_BUDGET,
    patch_size: int = 16,
    pooling: int = 3,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    media_type: str | None = None,
) -> ImagePatches:
    """Return the patches of a picture.

    Args:
      source: a path, a `data:` URL, bytes of a file, a Pillow image, or a numpy array of uint8
        [H, W], [H, W, 3] or [H, W, 4].
      soft_tokens: the most image tokens it may take, one of BUDGETS of `config/images.py`.
      patch_size: pixels of a patch's side, from the model's vision_config.
      pooling: patches of a soft token's side, from the model's vision_config.
      max_pixels: a picture of more pixels is refused before it is decoded.
      name: what messages call it; made from the source if None.
      media_type: what the sender says that bytes are, such as image/png; checked.

    Raises:
      ConfigError: if `soft_tokens` is none of BUDGETS.
      ImageError: if it is no picture that can be read; names it, and the limit that it breaks.
    """
    check_budget(soft_tokens, "soft_tokens")
    image = read_rgb(source, max_pixels=max_pixels, name=name, media_type=media_type)
    return patches_of(image, soft_tokens, patch_size, pooling)


def patches_of(image: Any, soft_tokens: int, patch_size: int, pooling: int) -> ImagePatches:
    """Return the patches of a Pillow image of mode RGB."""
    from PIL import Image

    size = fitted(image.width, image.height, soft_tokens, patch_size, pooling)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    columns, rows = size[0] // patch_size, size[1] // patch_size
    # One value for each row of pixels of a patch, so that numpy moves it in one piece.
    lines = np.asarray(image).reshape(-1).view(f"V{patch_size * 3}")
    tiles = lines.reshape(rows, patch_size, columns).swapaxes(1, 2)
    pixels = np.ascontiguousarray(tiles).view(np.uint8).reshape(rows * columns, -1)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    positions = np.stack([x, y], axis=1)
    return ImagePatches(pixels, positions, rows * columns // pooling**2)


def fitted(
    width: int, height: int, soft_tokens: int, patch_size: int = 16, pooling: int = 3
) -> tuple[int, int]:
    """Return the (width, height) to which an image is resized.

    The order of operations decides ties: 1190 x 17 becomes 6672 x 48, not 6720 x 96.
    """
    unit = patch_size * pooling
    factor = math.sqrt(soft_tokens * unit**2 / (height * width))
    fitted_height = math.floor(factor * height / unit) * unit
    fitted_width = math.floor(factor * width / unit) * unit
    longest = soft_tokens * unit
    if fitted_height == 0:
        return min(width // height * unit, longest), unit
    if fitted_width == 0:
        return unit, min(height // width * unit, longest)
    return fitted_width, fitted_height
