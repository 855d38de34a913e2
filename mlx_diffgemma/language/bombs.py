"""Picture files that are small, have few pixels, and take long or much memory to decode. They are
refused before they are."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from ..errors import ImageError

# Each scan of a JPEG goes over all of its pixels, and may take a few bytes of the file. Progressive
# files have 10 or so. libtiff has the same limit.
_MOST_SCANS = 100
_SCAN = b"\xff\xda"
# Zeros behind \xff, and markers that restart it, are part of compressed data.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END, _BARE = b"\xd9", b"\x01"  # markers: of the picture's end; without a length behind it
_MOST_PIECES = 4 * 65_536  # of a TIFF: a strip for each line of the tallest picture in four planes
_TILE_PIXELS = 1 << 22  # are allowed in a tile, whatever a picture may have
_PIECES = {273: "strips", 324: "tiles"}  # tags that say where they are
_TILE_SIDES = (322, 323)  # tags
# Bytes of the types of whole numbers.
_WHOLE = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8}


def refuse_bombs(file: Any, head: bytes, name: str, max_pixels: int) -> None:
    """Refuse a file that takes far more work or memory to decode than its pixels do.

    Args:
      file: open to read bytes; its place is moved.
      head: its first bytes.
      name: what messages call it.
      max_pixels: of a picture, and so of a tile of one.

    Raises:
      ImageError: names the limit that it breaks.
    """
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(0)
        data = file.read()
        # Counting is quick, and enough but for files whose other data hold these bytes often.
        if data.count(_SCAN) > _MOST_SCANS and _has_more_scans(data):
            raise ImageError(
                f"{name} is a JPEG of more than {_MOST_SCANS} scans, which are too many"
            )
    elif head[:2] in (b"II", b"MM") and (42 in head[2:4] or 43 in head[2:4]):
        _check_tiff(file, head, name, max(max_pixels, _TILE_PIXELS))


def _has_more_scans(data: bytes) -> bool:
    """Return whether a JPEG has more scans than are read, before its first picture ends."""
    count, at = 0, 2
    while count <= _MOST_SCANS and (found := _MARKER.search(data, at)) and found[1] != _END:
        at = found.end()
        count += found[0] == _SCAN
        if found[1] != _BARE:
            at += int.from_bytes(data[at : at + 2], "big")
    return count > _MOST_SCANS


def _check_tiff(file: Any, head: bytes, name: str, tile_pixels: int) -> None:
    sides = [0, 0]
    for tag, count, value in _entries(file, head):
        if tag in _PIECES and count > _MOST_PIECES:
            raise ImageError(
                f"{name} is a TIFF of {count:,} {_PIECES[tag]}; at most {_MOST_PIECES:,} are read"
            )
        if tag in _TILE_SIDES:
            at = _TILE_SIDES.index(tag)
            sides[at] = max(sides[at], value)
    if sides[0] * sides[1] > tile_pixels:
        raise ImageError(
            f"{name} is a TIFF with tiles of {sides[0]:,} x {sides[1]:,} pixels; at most "
            f"{tile_pixels:,} in all are read"
        )


def _entries(file: Any, head: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield tag, count and value of a TIFF's first directory; the value is 0 if it is elsewhere, or
    no whole number."""
    order = "<" if head[:2] == b"II" else ">"
    is_big = 43 in head[2:4]
    start, number, entry = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    (at,) = _unpacked(order + start, head[8:] if is_big else head[4:])
    file.seek(min(at, 1 << 62))
    (entries,) = _unpacked(order + number, file.read(struct.calcsize(order + number)))
    size = struct.calcsize(order + entry)
    for _ in range(entries):
        if len(data := file.read(size)) < size:
            return
        tag, kind, count, field = struct.unpack(order + entry, data)
        width = _WHOLE.get(kind, 0)
        is_here = 0 < width <= len(field) and count == 1
        number_in = int.from_bytes(field[:width], "little" if order == "<" else "big")
        yield tag, count, number_in if is_here else 0


def _unpacked(form: str, data: bytes) -> tuple[Any, ...]:
    """Return numbers from the beginning of `data`; zeros where it is cut off."""
    size = struct.calcsize(form)
    return struct.unpack(form, data[:size].ljust(size, b"\0"))
