"""Mutates picture files and reads what comes out.

usage: python -m tests.language.damaged [--count 3000] [--seed 0]

Every case must end in patches or in an ImageError of one line. Anything else is a finding: another
exception, a warning, a read of more than ten processor seconds, more than 1 GiB of resident memory
in the process that reads. Exits 1 with the findings. A sample runs with every test, in
test_damaged.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_diffgemma.errors import ImageError
from mlx_diffgemma.language.images import read_image

LIMIT_SECONDS, LIMIT_BYTES = 10, 1 << 30
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SIDES = (0, 1, 2, 255, 7071, 20_000, 30_000, 65_535, 0x7FFFFFFF, 0xFFFFFFFF)


def bases() -> list[tuple[str, bytes]]:
    """Small pictures of every format, in several modes and encodings."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    smooth = noise.resize((160, 90), Image.Resampling.BICUBIC)
    clear = smooth.convert("RGBA")
    clear.putalpha(smooth.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    frames = [smooth.convert("P"), smooth.transpose(Image.Transpose.ROTATE_180).convert("P")]
    made: list[tuple[str, Image.Image, dict]] = [
        ("JPEG", smooth, {"exif": exif}),
        ("JPEG", smooth, {"progressive": True}),
        ("JPEG", smooth.convert("CMYK"), {}),
        ("JPEG", smooth.convert("L"), {}),
        ("PNG", smooth, {"exif": exif}),
        ("PNG", clear, {}),
        ("PNG", smooth.convert("P"), {"transparency": 3}),
        ("PNG", deep, {}),
        ("PNG", smooth.convert("1"), {}),
        ("WEBP", smooth, {"exif": exif}),
        ("WEBP", clear, {"lossless": True}),
        ("WEBP", smooth, {"save_all": True, "append_images": [clear]}),
        ("GIF", frames[0], {"save_all": True, "append_images": frames[1:], "transparency": 2}),
        ("GIF", smooth.convert("L"), {}),
        ("BMP", smooth, {}),
        ("BMP", smooth.convert("P"), {}),
        ("BMP", smooth.convert("1"), {}),
        ("TIFF", smooth, {}),
        ("TIFF", smooth, {"compression": "tiff_lzw"}),
        ("TIFF", smooth, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", smooth, {"compression": "jpeg"}),
        ("TIFF", deep, {}),
        ("TIFF", clear, {"exif": exif}),
        ("TIFF", smooth.convert("1"), {"compression": "group4"}),
        ("TIFF", smooth.convert("LAB"), {}),
    ]
    found = []
    for kind, image, options in made:
        file = BytesIO()
        image.save(file, kind, **options)
        found.append((kind, file.getvalue()))
    return found


def mutated(kind: str, data: bytes, rng: random.Random) -> bytes:
    """A file with some damage, most of it in its head."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        first = 4 if rng.random() < 0.9 else 0  # beginnings that name the format mostly stay
        place = min(first + int(len(out) * rng.random() ** 3), len(out) - 1)
        way = rng.randrange(7)
        if way == 0:
            out[place] = rng.randrange(256)
        elif way == 1:
            out[place] ^= 1 << rng.randrange(8)
        elif way == 2:
            del out[max(1, place) :]
        elif way == 3:
            del out[place : place + rng.randrange(1, 9)]
        elif way == 4:
            out[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif way == 5:
            size = rng.choice((2, 4))
            value = rng.choice(_SIDES) & (256**size - 1)
            out[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))
        else:
            out = bytearray(_resized(kind, bytes(out), rng))
        if not out:
            break
    if kind == "PNG" and rng.random() < 0.7:
        out = bytearray(_summed(bytes(out)))
    return bytes(out)


def _resized(kind: str, data: bytes, rng: random.Random) -> bytes:
    """A file whose head names another size."""
    out, (width, height) = bytearray(data), (rng.choice(_SIDES), rng.choice(_SIDES))
    if rng.random() < 0.3:  # just within the limit of pixels
        width = height = 7071
    if kind == "PNG" and len(out) > 24:
        out[16:24] = struct.pack(">II", width, height)
    elif kind == "GIF" and len(out) > 10:
        out[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif kind == "BMP" and len(out) > 26:
        out[18:26] = struct.pack("<II", width, height)
    elif kind == "JPEG":
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            if (at := out.find(marker)) >= 0 and at + 9 <= len(out):
                out[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif kind == "WEBP" and out[12:16] == b"VP8X" and len(out) > 30:
        out[24:30] = (width & 0xFFFFFF).to_bytes(3, "little") + (height & 0xFFFFFF).to_bytes(
            3, "little"
        )
    elif kind == "TIFF" and len(out) > 8:
        at = struct.unpack("<I", out[4:8])[0]
        for tag, value in ((256, width), (257, height)):
            for entry in range(at + 2, min(at + 2 + 12 * 40, len(out) - 12), 12):
                if struct.unpack("<H", out[entry : entry + 2])[0] == tag:
                    out[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(out)


def _summed(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that more of it is read."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = struct.unpack(">I", out[at : at + 4])[0]
        if at + 12 + length > len(out):
            break
        body = bytes(out[at + 4 : at + 8 + length])
        out[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def read_all(count: int, seed: int) -> dict:
    """Read `count` mutated files here; return what came of them."""
    rng, files = random.Random(seed), bases()
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    slowest = 0.0
    warnings.simplefilter("error")
    for number in range(count):
        kind, data = files[number % len(files)]
        data = mutated(kind, data, rng)
        started = time.process_time()
        try:
            image = read_image(data, soft_tokens=70, name="x")
            assert image.patches.shape == (image.soft_tokens * 9, 768)
            outcomes["read"] += 1
        except ImageError as error:
            said = str(error)
            outcomes[" ".join(said.split()[:4])] += 1
            if "\n" in said or not said.startswith("x "):
                findings.append(f"case {number} ({kind}): {said!r}")
        except Exception:
            findings.append(f"case {number} ({kind}): {traceback.format_exc()}")
        if (seconds := time.process_time() - started) > LIMIT_SECONDS:
            findings.append(f"case {number} ({kind}) took {seconds:.1f} s")
        slowest = max(slowest, seconds)
    if (peak := peak_bytes()) > LIMIT_BYTES:
        findings.append(f"{peak / 2**20:,.0f} MiB were resident")
    return {
        "outcomes": outcomes,
        "findings": findings,
        "peak_mib": round(peak / 2**20),
        "slowest_seconds": round(slowest, 2),
    }


def peak_bytes() -> int:
    """The most memory that this process had resident. Linux counts a parent's in `ru_maxrss`."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        assert found
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(count: int, seed: int = 0) -> dict:
    """Read mutated files in a process whose memory is measured. A crash is a finding."""
    program = f"from tests.language.damaged import *\nprint(json.dumps(read_all({count}, {seed})))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}
    )
    # libtiff prints its own lines on stderr, past Python.
    if done.returncode or "Traceback" in done.stderr or "Error:" in done.stderr:
        return {"findings": [f"exit {done.returncode}: {done.stderr[-3000:]}"]}
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["findings"]))


if __name__ == "__main__":
    main()
