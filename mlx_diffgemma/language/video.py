"""Frames of a video as images with their times. PyAV, the extra `[video]`, decodes.

Frame i of N is number int(i * T / N) of T: the beginnings of N equal parts, as the published
processor of Gemma 4 chooses. A video of fewer frames is seen whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..config.images import VIDEO_BUDGET
from ..errors import ImageError
from .images import ImagePatches, patches_of
from .pictures import MAX_PIXELS, check_size, from_data_url, is_data_url, opened

_UNKNOWN_RATE = 24.0  # frames a second, where a file does not say; the published processor's
_MOST_FRAMES = 100_000  # about an hour; all up to the last one that is shown are decoded
# What a file may have FFmpeg open beside itself, such as the sockets or files that a playlist or a
# session description names: nothing, since no protocol has this name.
_OPENS = {"protocol_whitelist": "none"}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a video."""

    seconds: float  # from its beginning
    image: ImagePatches

    @property
    def time(self) -> str:
        """Minutes and seconds, rounded down, as in 01:07."""
        return f"{int(self.seconds // 60):02d}:{int(self.seconds % 60):02d}"


def read_video(
    source: Any,
    *,
    frames: int = 32,
    soft_tokens: int = VIDEO_BUDGET,
    patch_size: int = 16,
    pooling: int = 3,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> list[Frame]:
    """Return frames of a video.

    Args:
      source: a path, a `data:` URL or bytes of a file.
      frames: how many, at even distances; all if it has fewer.
      soft_tokens: the most image tokens of each, one of BUDGETS of `config/images.py`.
      patch_size: as for `read_image`.
      pooling: as for `read_image`.
      max_pixels: of a frame.
      name: what messages call it; made from the source if None.

    Raises:
      ImageError: if PyAV is missing, or it is no video with frames; names it, and the limit that it
        breaks.
    """
    if is_data_url(source):
        name = name or "the data: URL"
        source, _ = from_data_url(source, name)
    if isinstance(source, (str, Path)):
        name = name or str(source)
        with opened(source, name) as file:
            return _frames(file, frames, name, max_pixels, (soft_tokens, patch_size, pooling))
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ImageError(f"a video is a path, bytes or a data: URL, got {type(source).__name__}")
    file = BytesIO(bytes(source))
    name = name or "the video"
    return _frames(file, frames, name, max_pixels, (soft_tokens, patch_size, pooling))


def places(total: int, wanted: int) -> list[int]:
    """Return the numbers of the frames that are seen, of `total`."""
    if total <= wanted:
        return list(range(total))
    return [int(i * (total / wanted)) for i in range(wanted)]


def _frames(
    file: Any, wanted: int, name: str, max_pixels: int, form: tuple[int, int, int]
) -> list[Frame]:
    total, rate = _counted(file, name, max_pixels)
    if total == 0:
        raise ImageError(f"{name} is a video without frames")
    if total > _MOST_FRAMES:
        raise ImageError(
            f"{name} has {total:,} frames; at most {_MOST_FRAMES:,} are read, so cut it"
        )
    left, found = set(places(total, wanted)), []
    file.seek(0)
    with _stream(file, name) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number not in left:
                continue
            check_size((frame.width, frame.height), name, max_pixels)
            image = _upright(frame)
            found.append(Frame(number / rate, patches_of(image, *form)))
            left.remove(number)
            if not left:
                break
    if not found:
        raise ImageError(f"{name} is a video without frames")
    return found


def _counted(file: Any, name: str, max_pixels: int) -> tuple[int, float]:
    """Return a video's frames, and how many there are a second; check their size as its head says
    it, which is before they are decoded."""
    with _stream(file, name) as (container, stream):
        if stream.width and stream.height:
            check_size((stream.width, stream.height), name, max_pixels)
        rate = float(stream.average_rate or _UNKNOWN_RATE)
        if stream.frames:
            return stream.frames, rate
        packets = (packet for packet in container.demux(stream) if packet.size)
        return sum(1 for _ in packets), rate


@contextmanager
def _stream(file: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Open the first video stream of a file."""
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"{name} cannot be decoded: videos need PyAV; run: pip install 'mlx-diffgemma[video]'"
        ) from error
    try:
        with av.open(file, options=_OPENS) as container:
            if not container.streams.video:
                raise ImageError(f"{name} has no video in it")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} is no video that can be read: {reason}") from error


def _upright(frame: Any) -> Any:
    """Return a frame as an upright Pillow image of mode RGB."""
    from PIL import Image

    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(int(getattr(frame, "rotation", 0)) % 360)
    return image if turn is None else image.transpose(turn)
