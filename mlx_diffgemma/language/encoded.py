"""A prompt as the model reads it: token ids, and the images at the places of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.model import ModelConfig
from .images import ImagePatches


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Token ids, and the images in the order of their tokens; itself a prompt. A frame of a video
    is an image, and its tokens are an image's."""

    ids: list[int]
    images: tuple[ImagePatches, ...] = ()

    @property
    def image_tokens(self) -> int:
        """The tokens of all images, without those that begin and end them."""
        return sum(image.soft_tokens for image in self.images)


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How a model takes images."""

    begin: int  # token ids: before an image's tokens,
    token: int  # each of them,
    end: int  # and behind them
    patch_size: int
    pooling: int
    soft_tokens: int  # the most of an image, where settings leave it open
    positions: int  # patches of a side that the model tells apart

    @classmethod
    def of(cls, config: ModelConfig) -> ImageForm | None:
        """Return that of a model; None if it reads no images."""
        vision = config.vision
        if vision is None or len(config.image_token_ids) != 3:
            return None
        return cls(
            *config.image_token_ids,
            patch_size=vision.patch_size,
            pooling=vision.pooling_kernel_size,
            soft_tokens=config.image_tokens,
            positions=vision.position_embedding_size,
        )
