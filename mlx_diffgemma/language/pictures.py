"""Pictures as they come, files, bytes, arrays and Pillow's images, as upright 8-bit RGB.

Where published processors differ by how a picture arrives, there is one rule for all sources:
upright by EXIF, transparency on white, 16-bit gray divided by 257, the first frame of an animation.
Only the formats listed here are tried, since some of Pillow's readers start other programs.
"""

from __future__ import annotations

import binascii
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np

from ..config.images import MOST_PIXELS, ImageSettings
from ..errors import ImageError
from .bombs import refuse_bombs

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's names of the formats that are read; its reader of JPEG finds the cameras' MPO itself.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_SHOWN_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and PPM are"
# What a file that says these types must be.
_OF_TYPE = {
    "image/jpeg": ("JPEG", "MPO"),
    "image/jpg": ("JPEG", "MPO"),
    "image/png": ("PNG",),
    "image/webp": ("WEBP",),
    "image/gif": ("GIF",),
    "image/bmp": ("BMP",),
    "image/tiff": ("TIFF",),
    "image/avif": ("AVIF",),
}
_ANY_TYPE = ("", "application/octet-stream")
# Beginnings of what users take for a picture, with what to do.
_CONVERT = (
    (re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!DOCTYPE|<!--|<svg)", re.I), "an SVG drawing",
     b"<svg", "convert it to PNG"),
    # An AVIF picture may begin with mif1 too, and names its own brand behind it.
    (re.compile(rb"....ftyp(?:hei|hev|(?:mif1|msf1)(?!.{0,48}avi[fs]))", re.S), "a HEIC picture",
     b"", "convert it to JPEG or PNG"),
    (re.compile(rb"%PDF-"), "a PDF", b"", "convert its page to PNG"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing", b"", "convert it to PNG"),
    (re.compile(rb"8BPS"), "a Photoshop file", b"", "convert it to PNG"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 picture", b"",
     "convert it to JPEG or PNG"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), "a JPEG XL picture", b"",
     "convert it to JPEG or PNG"),
    (re.compile(rb"....ftyp(?!avi|mif1|msf1)|\x1aE\xdf\xa3|RIFF....AVI ", re.S), "a video", b"",
     "give it as one"),
)  # fmt: skip
# Beginnings of the formats that are read.
_BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\x2a\x00|MM\x00\x2a"
    rb"|....ftyp(?:avi|mif1|msf1)|P[1-7]\s",
    re.S,
)
_HEAD_BYTES = 4096  # read to see what a file is
_MAX_SIDE = 65_535
MAX_PIXELS: int = ImageSettings().max_image_pixels
_STRIP_PIXELS = 1 << 22  # what is converted at a time, to need little memory


def read_rgb(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    media_type: str | None = None,
) -> Image:
    """Return a picture as an upright Pillow image of mode RGB.

    Args:
      source: a path, a `data:` URL, bytes of a file, a Pillow image, or a numpy array of uint8
        [H, W], [H, W, 3] or [H, W, 4].
      max_pixels: a picture of more pixels is refused before it is decoded.
      name: what messages call it; made from the source if None.
      media_type: what the sender says that bytes are, such as image/png; checked.

    Raises:
      ImageError: if it is no such picture; names it, and the limit that it breaks.
    """
    from PIL import Image

    if is_data_url(source):
        name = name or "the data: URL"
        source, media_type = from_data_url(source, name)
    if isinstance(source, (str, Path)):
        name = name or str(source)
        with opened(source, name) as file:
            return _decoded(file, name, max_pixels, media_type)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _decoded(BytesIO(data), name or "the image", max_pixels, media_type)
    if isinstance(source, np.ndarray):
        source, name = _from_array(source, name or "the array"), name or "the array"
    if not isinstance(source, Image.Image):
        raise ImageError(
            "an image is a path, bytes, a Pillow image, a numpy array or a data: URL, "
            f"got {type(source).__name__}"
        )
    name = name or str(getattr(source, "filename", None) or "the image")
    check_size(source.size, name, max_pixels)
    with _reading(name):
        source.load()
        return _upright_rgb(source, name)


def upright_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height of the upright picture in a file, by its header alone.

    Raises:
      ImageError: as `read_rgb`, but for pixels that are damaged or cut off.
    """
    name = str(path)
    with opened(path, name) as file:
        image = _identified(file, name, max_pixels, None)
        with _reading(name):
            width, height = image.size
            return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def is_data_url(source: object) -> TypeGuard[str]:
    """Return whether a source is a `data:` URL."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def from_data_url(url: str, name: str) -> tuple[bytes, str]:
    """Return (bytes, media type) of a `data:` URL.

    Raises:
      ImageError: if it is not in base64.
    """
    head, comma, data = url[5:].partition(",")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if not comma or "base64" not in parameters:
        raise ImageError(f"{name} must be of the form data:image/png;base64,...")
    try:
        return binascii.a2b_base64(data.encode("ascii"), strict_mode=True), media_type
    except ValueError as error:  # binascii's error is one
        raise ImageError(f"{name} is not valid base64: {error}") from error


def as_data_url(source: Any) -> str:
    """Return a picture that `read_rgb` reads as a `data:` URL: of its file, or else of a PNG.

    Raises:
      ImageError: if it is a file that cannot be read.
    """
    if is_data_url(source):
        return source
    if isinstance(source, (str, Path)):
        with opened(source, str(source)) as file:
            data = file.read()
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        made = BytesIO()
        read_rgb(source, max_pixels=MOST_PIXELS).save(made, "PNG")
        data = made.getvalue()
    return f"data:;base64,{binascii.b2a_base64(data, newline=False).decode()}"


@contextmanager
def opened(source: str | Path, name: str) -> Iterator[Any]:
    """Open a file to read it; a URL, a folder, a pipe or a device is refused.

    Raises:
      ImageError: if it cannot be opened.
    """
    if isinstance(source, str) and (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)):
        hint = "give the path" if found[1].lower() == "file" else "download the picture first"
        raise ImageError(f"{name} is a URL, and no address is fetched for a prompt; {hint}")
    try:
        if os.path.isdir(source):
            raise ImageError(f"{name} is a folder; name the pictures in it")
        if not os.path.exists(source):
            raise ImageError(f"{name} does not exist")
        if not os.path.isfile(source):  # a pipe or device may have no end
            raise ImageError(f"{name} is not a regular file")
        file = open(source, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # a name may be too long, or hold a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be opened: {reason}") from error
    with file:
        yield file


def _decoded(file: Any, name: str, max_pixels: int, media_type: str | None) -> Image:
    image = _identified(file, name, max_pixels, media_type)
    with _reading(name):
        image.load()
        return _upright_rgb(image, name)


def _identified(file: Any, name: str, max_pixels: int, media_type: str | None) -> Image:
    """Return a picture whose type and size are checked and whose pixels are not read."""
    from PIL import Image, UnidentifiedImageError

    head = file.read(_HEAD_BYTES)
    if not head:
        raise ImageError(f"{name} is empty")
    for beginning, kind, inside, advice in _CONVERT:
        if beginning.match(head) and inside in head.lower():
            raise ImageError(f"{name} is {kind}; {advice}")
    try:
        with _reading(name):
            refuse_bombs(file, head, name, max_pixels)
            file.seek(0)
            image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        if _BEGINNINGS.match(head):
            raise ImageError(
                f"{name} is damaged, cut off or without pixels: its head cannot be read, or says a "
                "side of 0"
            ) from error
        raise ImageError(f"{name} is not an image; {_SHOWN_FORMATS} read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} has more than {MOST_PIXELS:,} pixels; "
            f"at most {max_pixels:,} are read (max_image_pixels)"
        ) from error
    _check_type(str(image.format), name, media_type)
    check_size(image.size, name, max_pixels)
    return image


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises into our error. On damaged files its readers raise nearly anything,
    and warn about what the user cannot change."""
    from PIL import Image, UnidentifiedImageError

    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    except (ImageError, UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged or cut off: {reason}") from error


def _check_type(found: str, name: str, media_type: str | None) -> None:
    media_type = (media_type or "").partition(";")[0].strip().lower()
    if media_type in _ANY_TYPE:
        return
    if media_type not in _OF_TYPE:
        raise ImageError(f"{name} is declared as {media_type}; {_SHOWN_FORMATS} read")
    if found not in _OF_TYPE[media_type]:
        raise ImageError(f"{name} is declared as {media_type}, but it is {found}")


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise ImageError if a picture has no pixels or too many, or too long a side."""
    width, height = size
    shown = f"{name} has {width:,} x {height:,} pixels"
    if min(size) < 1:
        raise ImageError(f"{shown}; a side needs at least 1")
    if max(size) > _MAX_SIDE:
        raise ImageError(f"{shown}; a side may have at most {_MAX_SIDE:,}")
    if width * height > max_pixels:
        raise ImageError(
            f"{shown}, {width * height:,} in all; at most {max_pixels:,} are read "
            "(max_image_pixels)"
        )


def _from_array(array: np.ndarray, name: str) -> Image:
    from PIL import Image

    is_gray = array.ndim == 2
    if array.dtype != np.uint8 or not (is_gray or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"{name} must be uint8 of [H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype} of {list(array.shape)}"
        )
    check_size((array.shape[1], array.shape[0]), name, MOST_PIXELS)
    return Image.fromarray(np.ascontiguousarray(array))


def _upright_rgb(image: Image, name: str) -> Image:
    from PIL import Image

    flips = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    flip = flips.get(_orientation(image))
    rgb = _rgb(image, name)
    return rgb if flip is None else rgb.transpose(flip)


def _orientation(image: Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except SyntaxError:  # no EXIF after all
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image, name: str) -> Image:
    """Return a loaded image of any mode as 8-bit RGB, transparency on white."""
    if image.mode in ("RGBa", "La"):  # colours multiplied by alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode.startswith("I;16") or image.mode == "I":
        return _converted(image, lambda strip: _from_16_bits(strip, name))
    if image.mode == "F":
        raise ImageError(f"{name} has samples of 32 bits; convert it to 8")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _converted(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _converted(image: Image, convert: Any) -> Image:
    """Return a new RGB image whose strips are those of `image` converted."""
    from PIL import Image

    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return cast("Image.Image", convert(image))
    out = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        out.paste(convert(strip), (0, top))
    return out


def _on_white(strip: Image) -> Image:
    from PIL import Image

    white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB")


def _from_16_bits(strip: Image, name: str) -> Image:
    from PIL import Image

    values = np.asarray(strip).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError(f"{name} has samples of 32 bits; convert it to 8")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
