"""Images of training data. Their sizes are read with the data and their pixels with each batch,
since those of a whole data set may not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config.vision import VisionConfig
from ..errors import DataError, ImageError
from ..language.encoded import EncodedPrompt, ImageForm
from ..language.given import IMAGE_TYPES, VIDEO_TYPES
from ..language.images import ImagePatches, fitted, read_image
from ..language.pictures import upright_size
from ..model import DiffusionGemma
from ..model.images import Seen
from ..model.vision import by_soft_token


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in a file."""

    path: Path
    where: str  # the example that has it
    form: ImageForm  # how the model takes it
    soft_tokens: int  # the image tokens it takes

    def read(self) -> ImagePatches:
        """Return its patches.

        Raises:
          DataError: if the file cannot be read, or has another size than when the run began.
        """
        form = self.form
        try:
            image = read_image(
                self.path,
                soft_tokens=form.soft_tokens,
                patch_size=form.patch_size,
                pooling=form.pooling,
            )
        except ImageError as error:
            raise DataError(f"{self.where}: {error}") from error
        if image.soft_tokens != self.soft_tokens:
            raise DataError(f"{self.where}: {self.path} has changed since the run began")
        return image


class Pictures:
    """The images that the messages of one example name, in the order of their parts."""

    def __init__(self, folder: Path, where: str, form: ImageForm | None):
        """Begin without images.

        Args:
          folder: of the data; paths are relative to it.
          where: file and line of the example.
          form: how the model takes images; None if it does not.
        """
        self._folder, self._where, self._form = folder, where, form
        self.named: list[Picture] = []
        self._stand_ins: list[ImagePatches] = []  # of each

    def stand_ins(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a message whose images are stand-ins of their size, without pixels.

        Raises:
          DataError: if an image is not given by its path, or is none; or it is a video.
        """
        content = message.get("content")
        if self._form is None or not isinstance(content, (list, tuple)):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def order(self, encoded: EncodedPrompt) -> list[int]:
        """Return which of the images each one in the order of their tokens is."""
        places = {id(stand_in): i for i, stand_in in enumerate(self._stand_ins)}
        return [places[id(image)] for image in encoded.images]

    def question(self, prompt: Any, tools: Any) -> str:
        """Return what the tokens of a prompt follow from: its text, and the sizes of images."""
        return json.dumps([prompt, tools], default=lambda image: image.positions[-1].tolist())

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in VIDEO_TYPES:
            raise DataError(f"{self._where}: a video cannot be learned yet, only images")
        if kind not in IMAGE_TYPES:
            return part
        given = part.get("image")
        if not isinstance(given, str) or set(part) != {"type", "image"}:
            raise DataError(
                f'{self._where}: an image must be given as {{"type": "image", "image": PATH}}, '
                f"got {dict(part)!s:.80}"
            )
        form = self._form
        assert form is not None
        path = self._folder / given
        try:
            size = upright_size(path)
        except ImageError as error:
            raise DataError(f"{self._where}: {error}") from error
        width, height = fitted(*size, form.soft_tokens, form.patch_size, form.pooling)
        columns, rows = width // form.patch_size, height // form.patch_size
        y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
        tokens = rows * columns // form.pooling**2
        stand_in = ImagePatches(np.empty((0, 0), np.uint8), np.stack([x, y], axis=1), tokens)
        self.named.append(Picture(path, self._where, form, tokens))
        self._stand_ins.append(stand_in)
        return {"type": "image", "image": stand_in}


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """The images of a batch, on the device; those of one size together."""

    patches: tuple[mx.array, ...]  # float32 [I, P, 3 p p] of each size, in the tower's order
    positions: tuple[mx.array, ...]  # int32 [I, P, 2]
    order: mx.array  # int32 [n], of the soft tokens of all sizes: as they stand in the rows
    places: np.ndarray  # bool [B, S], where they stand

    def seen(self, model: DiffusionGemma) -> Seen:
        """Return the features that the model's vision tower, which must be loaded, gives them."""
        features = [
            model.features(patches, positions).reshape(-1, model.config.text.hidden_size)
            for patches, positions in zip(self.patches, self.positions, strict=True)
        ]
        joined = features[0] if len(features) == 1 else mx.concatenate(features)
        return Seen(joined[self.order], self.places)


def sight(
    pictures: Sequence[Picture], places: np.ndarray, config: VisionConfig | None
) -> Sight | None:
    """Read the images of a batch; return None if there are none.

    Args:
      pictures: of all rows, one row behind another.
      places: bool [B, S], where their tokens stand.
      config: of the tower.

    Raises:
      DataError: if one cannot be read.
    """
    if not pictures or config is None:
        return None
    images = [picture.read() for picture in pictures]
    sizes: dict[tuple[int, int], list[int]] = {}  # by columns and rows, the images' numbers
    for number, image in enumerate(images):
        columns, rows = image.positions.max(axis=0).tolist()
        sizes.setdefault((columns, rows), []).append(number)
    firsts, count = np.zeros(len(images), np.int64), 0  # where each image's soft tokens begin
    patches, positions = [], []
    for numbers in sizes.values():
        order = by_soft_token(images[numbers[0]].positions, config)
        patches.append(mx.array(np.stack([images[i].patches[order] for i in numbers])))
        positions.append(mx.array(np.stack([images[i].positions[order] for i in numbers])))
        for i in numbers:
            firsts[i], count = count, count + images[i].soft_tokens
    order = np.concatenate(
        [first + np.arange(image.soft_tokens) for first, image in zip(firsts, images, strict=True)]
    )
    return Sight(tuple(patches), tuple(positions), mx.array(order.astype(np.int32)), places)
