"""The images of a conversation. Its messages hold them as `data:` URLs, so that a saved chat needs
no other files; what the model reads of each is kept, so that later turns decode nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config.images import ImageSettings
from ..language.encoded import ImageForm
from ..language.images import ImagePatches
from ..language.media import with_patches
from ..language.pictures import as_data_url

Message = dict[str, Any]


def is_part(image: Any) -> bool:
    """Return whether an image is a part of a message already."""
    return isinstance(image, dict) and image.get("type") == "image"


class ChatImages:
    """Reads each image of a conversation once."""

    def __init__(self, form: ImageForm | None, settings: ImageSettings) -> None:
        self._form, self.settings = form, settings
        self._patches: dict[str, ImagePatches] = {}  # by data: URL

    def part(self, source: Any) -> Message:
        """Return an image, as `read_image` takes it, as a part of a message.

        Raises:
          DiffGemmaError: if the model reads no images, or this one cannot be read.
        """
        message = {"role": "user", "content": [{"type": "image", "image": source}]}
        read = with_patches([message], self._form, self.settings)[0]["content"][0]["image"]
        self._patches[url := as_data_url(source)] = read
        return {"type": "image", "image": url}

    def in_place(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with what was read of their images; those of a file are read now."""
        return [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [self._in_place(part) for part in message["content"]]}
            for message in messages
        ]

    def _in_place(self, part: Message) -> Message:
        if not is_part(part):
            return part
        if part["image"] not in self._patches:
            self.part(part["image"])
        return {"type": "image", "image": self._patches[part["image"]]}

    def forget(self) -> None:
        """Drop what was read."""
        self._patches = {}
