"""Images and videos in messages: read from the parts of their contents, and put at the places that
a chat template gives them.

A template writes `<|image|>` and `<|video|>` where a part stands. Those that a user typed are text
and no place. An image is its begin token, a token for each soft token, and its end token. A video
is that for each frame, behind the frame's time, as the published processor writes it; there the
tokens in between are `<|video|>`, here an image's, since features take their place either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.images import VIDEO_BUDGET, ImageSettings
from ..errors import ImageError, PromptError, counted
from .encoded import ImageForm
from .given import IMAGE_TYPES, VIDEO_TYPES, Message
from .images import ImagePatches, read_image
from .pictures import is_data_url
from .video import Frame, read_video

IMAGE, VIDEO = "<|image|>", "<|video|>"
# Keys of a part whose value is the picture or video itself, or where it is.
_KEYS = ("image", "video", "path", "url", "image_url", "video_url")


@dataclass(frozen=True, slots=True)
class Media:
    """The images and videos of messages, each in their order."""

    images: list[ImagePatches]
    videos: list[list[Frame]]

    def __bool__(self) -> bool:
        return bool(self.images or self.videos)


def without_media(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose images and videos are parts with a type only, as templates want."""
    return [
        {**message, "content": [_bare(part) for part in message["content"]]}
        if _has_media(message)
        else message
        for message in messages
    ]


def _has_media(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, (list, tuple)) and any(_kind(part) for part in content)


def _kind(part: Any) -> str:
    """Return "image" or "video", or "" for other parts."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return "image" if kind in IMAGE_TYPES else "video" if kind in VIDEO_TYPES else ""


def _bare(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = _kind(part)
    return {"type": kind} if kind else part


def read_media(
    messages: Sequence[Message], form: ImageForm | None, settings: ImageSettings
) -> Media:
    """Return the images and videos of checked messages; arguments and errors as `with_patches`."""
    media = Media([], [])
    for message in filter(_has_media, with_patches(messages, form, settings)):
        for part in message["content"]:
            if kind := _kind(part):
                (media.images if kind == "image" else media.videos).append(part[kind])
    return media


def with_patches(
    messages: Sequence[Message], form: ImageForm | None, settings: ImageSettings
) -> list[Message]:
    """Return checked messages with images and videos as they were read, so that they are read once.

    Args:
      messages: as `given_messages` returns them, or as this function does.
      form: how the model takes images; None if it does not.
      settings: how images become tokens.

    Raises:
      DiffGemmaError: if the model reads no images, or one cannot be read; it names which.
    """
    counts = {"image": 0, "video": 0}

    def read(part: Any) -> Any:
        if not (kind := _kind(part)):
            return part
        counts[kind] += 1
        if form is None:
            raise PromptError(
                f"the prompt holds {'an image' if kind == 'image' else 'a video'}, and this model "
                "reads none: its config.json has no vision_config and image tokens"
            )
        source = _source(part, kind)
        name = _name(source, f"{kind} {counts[kind]}")
        take = _image if kind == "image" else _video
        return {"type": kind, kind: take(source, name, form, settings)}

    return [
        {**message, "content": [read(part) for part in message["content"]]}
        if _has_media(message)
        else message
        for message in messages
    ]


def _source(part: Mapping[str, Any], kind: str) -> Any:
    """Return the picture or video of a part: itself, or its path or `data:` URL."""
    given = [key for key in _KEYS if part.get(key) is not None]
    if len(given) != 1:
        what = f"a part of type {part['type']!r}"
        raise PromptError(
            f"{what} has {' and '.join(map(repr, given)) or 'none'} of its sources; give it as "
            f'{{"type": "{kind}", "{kind}": PATH}}'
        )
    source = part[given[0]]
    if not given[0].endswith("url"):
        return source
    if isinstance(source, Mapping):
        source = source.get("url")
    if not is_data_url(source):  # a server passes these on, and must open no files for a client
        shown = source if isinstance(source, str) else type(source).__name__
        raise ImageError(
            f"{given[0]} must be a data: URL, got {shown:.80}; no address is fetched for a prompt, "
            f'and {{"type": "{kind}", "{kind}": PATH}} takes a file'
        )
    return source


def _name(source: Any, otherwise: str) -> str | None:
    """Return what messages call a source that has no name of its own."""
    is_named = hasattr(source, "__fspath__") or (
        isinstance(source, str) and not is_data_url(source)
    )
    return None if is_named or hasattr(source, "filename") else otherwise


def _image(source: Any, name: str | None, form: ImageForm, settings: ImageSettings) -> ImagePatches:
    if not isinstance(source, ImagePatches):  # read before
        source = read_image(
            source,
            soft_tokens=settings.image_tokens or form.soft_tokens,
            patch_size=form.patch_size,
            pooling=form.pooling,
            max_pixels=settings.max_image_pixels,
            name=name,
        )
    _check_positions(source, name or "the image", form)
    return source


def _video(source: Any, name: str | None, form: ImageForm, settings: ImageSettings) -> list[Frame]:
    if isinstance(source, list) and source and all(isinstance(each, Frame) for each in source):
        return source  # read before
    frames = read_video(
        source,
        frames=settings.video_frames,
        soft_tokens=min(VIDEO_BUDGET, form.soft_tokens),
        patch_size=form.patch_size,
        pooling=form.pooling,
        max_pixels=settings.max_image_pixels,
        name=name,
    )
    _check_positions(frames[0].image, name or "the video", form)
    return frames


def _check_positions(image: ImagePatches, name: str, form: ImageForm) -> None:
    if (most := int(image.positions.max()) + 1) > form.positions:
        raise ImageError(
            f"{name} is {most} patches long at this budget, and the model tells {form.positions} "
            "apart; use fewer image tokens, or cut it"
        )


def placed(
    parts: Sequence[str | int], specials: Mapping[str, int], media: Media, form: ImageForm | None
) -> tuple[list[str | int], list[ImagePatches]]:
    """Return a rendered prompt with its images and videos in their places, and the images in the
    order of their tokens.

    Args:
      parts: texts, and the ids of special tokens between them.
      specials: spelling -> id.
      media: what goes into the places.
      form: how the model takes images.

    Raises:
      PromptError: if there are more or fewer places than images or videos.
    """
    image, video = specials.get(IMAGE), specials.get(VIDEO)
    for name, token, given in (("image", image, media.images), ("video", video, media.videos)):
        places = sum(part == token for part in parts)
        if places != len(given):
            raise PromptError(
                f"the prompt holds {counted(len(given), name)}, and the chat template gives "
                f"{counted(places, 'place')} for {'it' if len(given) == 1 else 'them'}"
            )
    if form is None:
        return list(parts), []
    out: list[str | int] = []
    seen: list[ImagePatches] = []
    images, videos = iter(media.images), iter(media.videos)

    def show(each: ImagePatches) -> None:
        out.extend([form.begin, *[form.token] * each.soft_tokens, form.end])
        seen.append(each)

    def write(text: str) -> None:
        """Append to the text before, since the two are tokenized together."""
        if out and isinstance(out[-1], str):
            out[-1] += text
        else:
            out.append(text)

    for part in parts:
        if isinstance(part, str):
            write(part)
        elif part == image:
            show(next(images))
        elif part == video:
            for number, frame in enumerate(next(videos)):
                write(f"{' ' * bool(number)}{frame.time} ")
                show(frame.image)
        else:
            out.append(part)
    return out, seen
