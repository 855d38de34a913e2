"""The images of a row's text: their places, their features, which are kept for a while, and what
stands for them where texts are compared."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config.model import ModelConfig
from ..errors import PromptError, counted
from ..language.images import ImagePatches
from ..model import DiffusionGemma
from ..model.images import Seen, runs, seen_at

FEATURE_BYTES = 64 << 20  # of features that are kept: some 40 images of the 26B model


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """An image at its tokens' place in a text."""

    start: int
    image: ImagePatches

    @property
    def stop(self) -> int:
        return self.start + self.image.soft_tokens


class Features:
    """What the vision tower makes of images, by their content; the least recently used go first."""

    def __init__(self, max_bytes: int = FEATURE_BYTES) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._kept: OrderedDict[bytes, mx.array] = OrderedDict()

    def of(self, model: DiffusionGemma, image: ImagePatches) -> mx.array:
        """Return an image's features, [n, M], seen before or seen now."""
        key = image.digest
        if key not in self._kept:
            seen = model.see(mx.array(image.patches), mx.array(image.positions))
            mx.eval(seen)
            self._kept[key] = seen
            self.nbytes += seen.nbytes
            while self.nbytes > self.max_bytes and len(self._kept) > 1:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return self._kept[key]


def place_images(
    tokens: np.ndarray, images: Sequence[ImagePatches], config: ModelConfig
) -> tuple[Placed, ...]:
    """Return the images at the places of their tokens.

    Args:
      tokens: int32 [S]; each run of image tokens is one image's.
      images: in their order.
      config: of the model.

    Raises:
      PromptError: if images and places do not match, or the model reads no images.
    """
    if images and (config.vision is None or config.image_token_id is None):
        raise PromptError("the prompt holds an image, and this model has no vision tower")
    places = tokens == config.image_token_id if config.image_token_id is not None else None
    found = list(runs(np.array(places)[None])) if places is not None else []
    if [stop - start for start, stop in found] != [image.soft_tokens for image in images]:
        theirs = " + ".join(str(stop - start) for start, stop in found) or "0"
        ours = " + ".join(str(image.soft_tokens) for image in images) or "0"
        raise PromptError(
            f"the prompt has {counted(len(found), 'place')} for images, of {theirs} image tokens, "
            f"and {counted(len(images), 'image')} of {ours}"
        )
    if images and config.vision is not None:
        for image in images:
            if image.pixels.shape[1] != config.vision.patch_width:
                raise PromptError(
                    f"an image has patches of {image.pixels.shape[1]} numbers, and this model's "
                    f"have {config.vision.patch_width}"
                )
    starts = (start for start, _ in found)
    return tuple(Placed(start, image) for start, image in zip(starts, images, strict=True))


def as_text(tokens: np.ndarray, images: Sequence[Placed], salt: bytes = b"") -> np.ndarray:
    """Return tokens for comparing texts, int32 [S]: an image's tokens are negative numbers made of
    its content, so that texts with other images differ.

    Args:
      tokens: int32 [S].
      images: in them.
      salt: stands for the tower that sees the images, where others' texts are compared too.
    """
    text = np.array(tokens, np.int32)
    for placed in images:
        count = placed.image.soft_tokens
        stream = hashlib.shake_256(salt + placed.image.digest).digest(4 * count)
        text[placed.start : placed.stop] = -1 - (np.frombuffer(stream, "<u4") >> 1).astype(np.int64)
    return text


def outside(place: int, images: Sequence[Placed], *, after: int = 0) -> int:
    """Return a place or, if it is inside of an image, the one before the image, unless that is not
    after another place; else the one behind it."""
    for placed in images:
        if placed.start < place < placed.stop:
            return placed.start if placed.start > after else placed.stop
    return place


def seen_between(
    start: int,
    stop: int,
    images: Sequence[Placed],
    model: DiffusionGemma,
    features: Features,
) -> Seen | None:
    """Return the images between two places of a text; None if there are none."""
    inside = [placed for placed in images if start <= placed.start < stop]
    if not inside:
        return None
    places = np.zeros((1, stop - start), bool)
    for placed in inside:
        assert placed.stop <= stop
        places[0, placed.start - start : placed.stop - start] = True
    return seen_at(places, [features.of(model, placed.image) for placed in inside])
