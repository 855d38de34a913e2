"""Small files that would take long, or much memory, to decode."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from mlx_diffgemma.errors import ImageError
from mlx_diffgemma.language.images import read_image
from tests.language.drawn import pattern, saved


def scanned(more: int, *, inside: bytes = b"") -> bytes:
    """A progressive JPEG, its last scan `more` times again, and a segment in its head."""
    whole = saved(Image.fromarray(pattern(64, 48)), "JPEG", progressive=True)
    scan = whole[[found.start() for found in re.finditer(b"\xff\xda", whole)][-1] : -2]
    length = struct.pack(">H", len(inside) + 2)
    return whole[:2] + b"\xff\xec" + length + inside + whole[2:-2] + scan * more + b"\xff\xd9"


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes = b"", *, order: str = "<") -> bytes:
    """A TIFF of one directory, of tag -> type, count and value, with data behind it."""
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    listed = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value))
        for tag, (kind, count, value) in sorted(entries.items())
    )
    return begin + struct.pack(f"{order}H", len(entries)) + listed + bytes(4) + data


# 100 x 100 gray pixels, in deflated tiles.
TILED = {256: (4, 1, 100), 257: (4, 1, 100), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1),
         277: (3, 1, 1)}  # fmt: skip


def test_each_scan_of_a_jpeg_is_work():
    assert len(read_image(scanned(80)).patches)
    with pytest.raises(ImageError, match=r"^the image is a JPEG of more than 100 scans"):
        read_image(scanned(100))


def test_bytes_that_look_like_scans_are_none():
    """Cameras put other pictures into a segment, and videos behind the picture."""
    looks = b"\xff\xda" * 500
    assert read_image(scanned(0, inside=looks) + looks) == read_image(scanned(0))


def test_scans_are_counted_in_one_go():
    """An expression that tries a run of \\xff from each of its bytes takes hours for this one."""
    runs = b"\xff" * 4_000_000 + b"\0" + b"\xff\xda\0\2" * 200
    with pytest.raises(ImageError, match="100 scans"):
        read_image(scanned(0)[:-2] + runs)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tile_is_no_larger_than_a_picture_may_be(order):
    side = 8000
    row = zlib.compress(bytes(side * side))
    entries = TILED | {322: (4, 1, side), 323: (3, 1, side), 325: (4, 1, len(row))}
    start = len(tiff(entries | {324: (4, 1, 0)}, order=order))
    data = tiff(entries | {324: (4, 1, start)}, row, order=order)
    with pytest.raises(ImageError, match=r"tiles of 8,000 x 8,000 pixels; at most 50,000,000"):
        read_image(data)
    assert len(read_image(data, max_pixels=side * side).patches)


def test_a_picture_may_be_less_than_a_tile_of_it():
    file = BytesIO()
    tile = {322: 256, 323: 256}
    Image.fromarray(pattern(10, 10)).save(file, "TIFF", compression="tiff_lzw", tiffinfo=tile)
    assert read_image(file.getvalue(), max_pixels=100) == read_image(pattern(10, 10))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("tag", "what"), [(273, "strips"), (324, "tiles")])
def test_pieces_of_a_tiff_are_counted_before_they_are_listed(tag, what, big):
    count = 300_000
    if big:
        data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1)
        data += struct.pack("<HHQQ", tag, 4, count, 48) + bytes(8) + bytes(4 * count)
    else:
        data = tiff(TILED | {tag: (4, count, 0)}, bytes(4 * count))
    with pytest.raises(ImageError, match=f"is a TIFF of 300,000 {what}; at most 262,144 are read"):
        read_image(data)
