"""Images in the requests of every dialect: where they come from, and how many there may be. A
picture comes inside of the request, or from an address where the command line allows that; the
server opens no file for a client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..config.serving import Limits
from ..language.pictures import is_data_url
from .errors import ApiError

# A text, or an image as a part of a message.
Piece = str | dict[str, Any]


def image_part(url: Any, param: str, limits: Limits) -> dict[str, Any]:
    """Return an image as a part of a message for `fetch_images` and `encode`, which read it.

    Args:
      url: where the client says that it is.
      param: the field that says it.
      limits: say whether addresses are fetched.

    Raises:
      ApiError: if it is no `data:` URL, and no address that may be fetched.
    """
    is_address = isinstance(url, str) and url[:8].lower().startswith(("http://", "https://"))
    if not (is_data_url(url) or (is_address and limits.allow_image_urls)):
        others = " or an http(s) address" if limits.allow_image_urls else ""
        fetches = "" if others else "fetches no address without --allow-image-urls, and "
        raise ApiError(
            400,
            f"{param} must be a data: URL with the picture in base64{others}; this server "
            f"{fetches}opens no file for a client",
            param=param,
        )
    return {"type": "image_url", "image_url": {"url": url}}


def joined(pieces: Iterable[Piece], between: str) -> str | list[dict[str, Any]]:
    """Return pieces as the content of a message: a text where there is no image, else parts.

    Args:
      pieces: in order; empty texts do not count.
      between: what stands between two texts.
    """
    found: list[Piece] = []
    given: list[Piece] = [piece for piece in pieces if piece]
    for is_text, run in groupby(given, lambda piece: isinstance(piece, str)):
        if is_text:
            found.append(between.join(map(str, run)))
        else:
            found += run
    if all(isinstance(piece, str) for piece in found):  # one text, or none
        return "".join(map(str, found))
    return [{"type": "text", "text": p} if isinstance(p, str) else p for p in found]


def check_images(messages: Sequence[Mapping[str, Any]], limits: Limits, param: str) -> None:
    """Raise ApiError if messages hold too many images."""
    count = sum(
        part["type"] == "image_url"
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
    if count > limits.max_images:
        raise ApiError(
            400,
            f"{param}: {count} images, and at most {limits.max_images} are read (max_images)",
            param=param,
        )
