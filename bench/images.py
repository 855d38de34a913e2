"""What does preprocessing of a picture cost, beside decoding and resizing it with Pillow?

Drawn photos of usual sizes and formats are written to files. Three ways read each, in turns:

- plain: Pillow opens, decodes and resizes the file to the same size, and nothing else.
- ours: `read_image`. What it leaves for later is counted apart: the patches as float32, made when
  the vision tower sees them, and the key under which features are kept, SHA-256 over the pixels.
- theirs: transformers' Gemma4ImageProcessorPil, from the path.

Processor time, median of the repeats. Our patches must equal theirs bit for bit.

Bound: ours takes at most 1.15 times plain, up to the patches' bytes, which are what is kept; with
floats, and with the key, is shown.

    python bench/images.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import finish, record
from PIL import Image

from mlx_diffgemma.language.images import fitted, read_image

BOUND = 1.15
CASES = (
    ("phone photo", (4000, 3000), "JPEG"),
    ("full HD", (1920, 1080), "JPEG"),
    ("screenshot", (1440, 900), "PNG"),
    ("web picture", (1280, 720), "WEBP"),
    ("small, enlarged", (500, 500), "JPEG"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    print(f"bound: {BOUND} times plain decoding and resizing", flush=True)
    rows, passed = {}, True
    with tempfile.TemporaryDirectory() as scratch:
        for name, size, kind in CASES:
            path = Path(scratch) / f"a.{kind.lower()}"
            photo(*size).save(path, kind, quality=90)
            row = rows[f"{name}, {size[0]}x{size[1]} {kind}"] = measure(path, options.repeats)
            holds = row["ratio"] <= BOUND
            passed &= holds
            print(f"{name}: {row} {'within' if holds else 'OUTSIDE'}", flush=True)
    line = record(
        "images",
        what="preprocessing of pictures at 280 soft tokens: processor time per picture",
        unit="ms, medians",
        shape={"repeats": options.repeats},
        bound=BOUND,
        within=passed,
        rows=rows,
    )
    finish(line, save=options.save)


def photo(width: int, height: int) -> Image.Image:
    """Large shapes, fine texture and noise, as a camera sees them."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    out = np.empty((height, width, 3), np.float32)
    for k in range(3):
        shapes = 90 * np.sin(x / width * (3 + k) + np.cos(y / height * 5) * 2)
        out[..., k] = 128 + shapes + 12 * np.sin(x / 3) * np.sin(y / 5)
    out += rng.normal(0, 4, out.shape).astype(np.float32)
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Time the three ways in turns on one file."""
    from transformers.image_utils import load_image
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    published = Gemma4ImageProcessorPil()

    def plain() -> Any:
        image = Image.open(path)
        image.load()
        return image.resize(fitted(image.width, image.height, 280), Image.Resampling.BICUBIC)

    def theirs() -> Any:
        return published(load_image(str(path)), return_tensors="np")

    ours, given = read_image(path), theirs()
    assert (given["pixel_values"][0, : len(ours.pixels)] == ours.patches).all()
    ways: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "ours": lambda: read_image(path),
        "with_floats": lambda: read_image(path).patches,
        "with_key": lambda: read_image(path).digest,
        "theirs": theirs,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    row = {name: round(1e3 * median(times), 2) for name, times in seconds.items()}
    return {
        **row,
        "ratio": round(row["ours"] / row["plain"], 3),
        "ratio_of_theirs": round(row["theirs"] / row["plain"], 3),
    }


if __name__ == "__main__":
    main()
