"""Pictures that the tests draw. Not a test."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def pattern(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Sharp edges in every channel, uint8 [H, W, C]."""
    y, x, k = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    steps = 40 * ((x // 9 + y // 7) % 3)
    return ((7 * x + 13 * y + 61 * k + (x * y) // 5 + steps) % 256).astype(np.uint8)


def smooth(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Waves, uint8 [H, W, C]."""
    y, x, k = np.meshgrid(
        np.arange(height, dtype=np.float64), np.arange(width), np.arange(channels), indexing="ij"
    )
    waves = 100 * np.sin(2 * np.pi * (x / width * (1 + k) + y / height * (2 - k)))
    waves += 27 * np.cos(2 * np.pi * x * y / (width * height))
    return np.floor(127.5 + waves).astype(np.uint8)


def palette() -> Image.Image:
    """A picture of 16 x 12 squares of indexed colours, 160 x 120."""
    y, x = np.mgrid[:120, :160]
    image = Image.fromarray(((y // 10) * 16 + x // 10).astype(np.uint8), "P")
    image.putpalette([(37 * j + 11) % 256 for j in range(768)])
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def clip(frames: int, *, rate: int = 24, size: tuple[int, int] = (64, 48)) -> bytes:
    """A video whose frame i is gray of brightness i."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 16 + 2 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
