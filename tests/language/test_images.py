"""Pictures become the patches of the published processor: sizes, pixels, modes, sources."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_diffgemma.errors import ConfigError, ImageError
from mlx_diffgemma.language.images import fitted, read_image
from tests.language.drawn import palette, pattern, saved, smooth

GOLDENS = json.loads((Path(__file__).parent / "image_goldens.json").read_text())
BUDGETS = (70, 140, 280, 560, 1120)
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6


def threshold() -> Image.Image:
    return Image.fromarray(smooth(128, 96)[..., 0] > 127)


def sixteen_bit() -> Image.Image:
    return Image.fromarray(smooth(320, 240, 1)[..., 0].astype(np.uint16) * 257)


def moving() -> bytes:
    still = palette()
    frames = [Image.fromarray(np.roll(np.asarray(still), 5 * i, axis=1), "P") for i in (1, 2)]
    for frame in frames:
        frame.putpalette(still.getpalette())
    return saved(still, "GIF", save_all=True, append_images=frames)


DRAWN = {
    "square": lambda: pattern(500, 500),
    "square_smooth": lambda: smooth(500, 500),
    "4:3": lambda: pattern(1024, 768),
    "4:3 smooth": lambda: smooth(1024, 768),
    "16:9": lambda: pattern(1920, 1080),
    "16:9_smooth": lambda: smooth(1920, 1080),
    "tall 1:10": lambda: pattern(100, 1000),
    "tiny 3x3": lambda: pattern(3, 3),
    "1x1": lambda: pattern(1, 1),
    "one pixel wide": lambda: pattern(1, 200),
    "one pixel tall": lambda: pattern(200, 1),
    "extreme 1x20000": lambda: pattern(1, 20000),
    "no resize": lambda: pattern(768, 768),
    "384x188": lambda: pattern(384, 188),
    "700x10": lambda: pattern(700, 10),
    "1190x17": lambda: pattern(1190, 17),
    "wide 3000x40": lambda: pattern(3000, 40),
    "gray": lambda: smooth(640, 480, 1)[..., 0],
    "RGBA": lambda: Image.fromarray(smooth(300, 200, 4)),
    "LA": lambda: Image.fromarray(smooth(300, 200, 2), "LA"),
    "palette": palette,
    "palette with transparency": lambda: saved(palette(), transparency=5),
    "animated GIF": moving,
    "CMYK": lambda: Image.fromarray(smooth(200, 150, 4), "CMYK"),
    "1-bit": threshold,
    "numpy HWC": lambda: smooth(300, 200),
}
ABOUT = pytest.mark.parametrize("name", DRAWN)


def check(image, golden: dict, tolerance: float = 1.5e-6) -> None:
    """The facts that the goldens hold; they were rounded to six places."""
    values = image.patches.reshape(-1).astype(np.float64)
    columns, rows = image.positions.max(axis=0) + 1
    assert (16 * columns, 16 * rows) == (golden["width"], golden["height"])
    assert image.soft_tokens == golden["soft_tokens"] == len(image.patches) // 9
    weights = (np.arange(values.size) % 1009) / 1009
    facts = {"mean": values.mean(), "weighted_mean": (values * weights).mean()}
    if "channel_means" in golden:
        facts["channel_means"] = values.reshape(-1, 3).mean(axis=0)
        facts["first_patch_first_6"] = image.patches[0, :6]
        facts["last_patch_last_6"] = image.patches[-1, -6:]
        facts["middle_patch_mean"] = image.patches[len(image.patches) // 2].mean()
        whole = image.patches.reshape(rows, columns, 16, 16, 3).swapaxes(1, 2)
        whole = whole.reshape(16 * rows, 16 * columns, 3).astype(np.float64)
        facts["thumb_4x4_mean"] = [
            [block.mean() for block in np.array_split(band, 4, axis=1)]
            for band in np.array_split(whole, 4, axis=0)
        ]
    for key, value in facts.items():
        slack = 1e-5 if key == "thumb_4x4_mean" else tolerance
        np.testing.assert_allclose(value, golden[key], rtol=0, atol=slack, err_msg=key)


# --- sizes ---


@pytest.mark.parametrize("golden", GOLDENS["budgets"], ids=lambda g: f"{g['width']}x{g['height']}")
def test_sizes_are_the_published_processors_at_every_budget(golden):
    for budget in BUDGETS:
        width, height, tokens = golden[str(budget)]
        assert fitted(golden["width"], golden["height"], budget) == (width, height)
        assert width * height // 48**2 == tokens <= budget


@pytest.mark.parametrize("tokens", [0, 1, 100, 281, 280.0, True, "280", None])
def test_another_budget_is_refused(tokens):
    with pytest.raises(ConfigError, match="must be one of 70, 140, 280, 560, 1120"):
        read_image(pattern(3, 3), soft_tokens=tokens)


# --- pixels ---


@ABOUT
def test_patches_are_those_of_the_goldens(name):
    check(read_image(DRAWN[name]()), GOLDENS["images"][name]["object"])


@pytest.mark.long
def test_patches_of_a_huge_image_are_those_of_the_golden():
    check(read_image(smooth(6000, 4000)), GOLDENS["images"]["huge"]["object"])


def test_an_image_lies_upright_as_its_exif_says_whatever_it_comes_from(tmp_path):
    image = Image.fromarray(smooth(400, 300))
    data = saved(image, "JPEG", quality=95, exif=EXIF_6)
    golden = GOLDENS["images"]["EXIF orientation 6"]["path"]
    (path := tmp_path / "a.jpg").write_bytes(data)
    # Another build of libjpeg may decode a few values otherwise by 1.
    check(read_image(path), golden, tolerance=1e-3)
    assert read_image(str(path)) == read_image(data) == read_image(Image.open(path))


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_turns_as_pillow_turns_it(value):
    exif = Image.Exif()
    exif[0x0112] = value
    for kind in ("PNG", "TIFF", "WEBP"):
        data = saved(Image.fromarray(pattern(50, 30)), kind, exif=exif, lossless=True)
        turned = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        assert read_image(data) == read_image(np.asarray(turned.convert("RGB"))), kind


def test_sixteen_bits_are_divided_by_257():
    image = sixteen_bit()
    plain = read_image(smooth(320, 240, 1)[..., 0])
    assert read_image(image) == plain
    assert read_image(saved(image)) == plain
    assert read_image(saved(image, "TIFF")) == plain
    near = np.array([[0, 128, 129, 65_535]], np.uint16)  # 128 / 257 rounds to 0, 129 / 257 to 1
    assert read_image(Image.fromarray(near)) == read_image(np.array([[0, 0, 1, 255]], np.uint8))


def test_hidden_colours_of_a_file_do_not_show():
    """The published processor drops alpha of files; a Pillow image it lays on white."""
    clear = np.zeros((48, 48, 4), np.uint8)
    clear[..., 0] = 255  # red, and nothing of it is to be seen
    assert read_image(saved(Image.fromarray(clear))).patches.min() == 1
    assert read_image(clear).patches.min() == 1


@pytest.mark.parametrize("name", ["RGBA", "LA", "palette with transparency"])
def test_strips_of_large_pictures_change_nothing(name, monkeypatch):
    from mlx_diffgemma.language import pictures

    whole = read_image(DRAWN[name]())
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 1000)
    assert read_image(DRAWN[name]()) == whole


def test_modes_of_pillow_are_read_or_refused_in_one_line():
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "LA", "RGBa"):
        assert len(read_image(Image.new(mode, (5, 4))).patches)
    for mode in ("F", "I"):
        with pytest.raises(
            ImageError, match=r"^the image has samples of 32 bits; convert it to 8$"
        ):
            read_image(Image.new(mode, (5, 4), 70_000) if mode == "I" else Image.new(mode, (5, 4)))


# --- sources ---


def test_equal_pictures_are_equal_from_every_source(tmp_path):
    array = pattern(70, 50)
    image = Image.fromarray(array)
    (path := tmp_path / "a.png").write_bytes(data := saved(image))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    sources = [path, str(path), data, bytearray(data), memoryview(data), image, array, url]
    read = [read_image(source) for source in sources]
    assert len({each.digest for each in read}) == len(set(read)) == 1 and len(read[0].digest) == 32
    assert read[0] != read_image(array, soft_tokens=70)
    assert read[0] != read_image(array[:, ::-1])


def test_an_array_of_three_rows_has_them_down_not_as_channels():
    """The published processor takes it for channels first; a Pillow image it does not."""
    image = read_image(smooth(300, 3))
    check(image, GOLDENS["images"]["numpy 3 rows"]["object"])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), r"got float32 of \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 of \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"got uint8 of \[4\]"),
        (np.zeros((4, 4), np.uint16), "got uint16"),
    ],
)
def test_other_arrays_are_refused(array, said):
    with pytest.raises(ImageError, match=said):
        read_image(array)


@pytest.mark.parametrize("source", [None, 5, ["a.png"], {"url": "x"}, object()])
def test_what_is_no_source_is_refused_by_type(source):
    with pytest.raises(ImageError, match="an image is a path, bytes, a Pillow image"):
        read_image(source)


def test_text_alone_needs_no_pillow():
    """transformers loads it where it is installed; nothing else does."""
    program = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('PIL', 'av', 'torch')})\n"
        "import mlx_diffgemma as m\n"
        "model, tokenizer = m.load(m.bundled_model())\n"
        "settings = m.GenerationSettings(seed=7, max_new_tokens=8)\n"
        "print(m.generate(model, tokenizer, 'Sort: 5 2 4 1', settings=settings))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "1 2 4 5", done.stderr


# --- limits ---


@pytest.fixture
def refused(tmp_path):
    def refusal(data: bytes | None, name: str = "a.png", **options) -> str:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ImageError) as raised:
            read_image(path, **options)
        message = str(raised.value)
        assert message.startswith(f"{path} ") and "\n" not in message
        return message.removeprefix(f"{path} ")

    return refusal


def chunk_sized(width: int, height: int) -> bytes:
    """A PNG whose head names another size."""
    data = bytearray(saved(Image.new("RGB", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_limits_are_named_with_the_file(refused, tmp_path):
    assert refused(None, "none.png") == "does not exist"
    assert refused(b"") == "is empty"
    assert "is not an image; JPEG, PNG" in refused(b"hello, this is no picture" * 9)
    whole = saved(Image.fromarray(pattern(90, 90)), "JPEG")
    assert "is damaged or cut off" in refused(whole[: len(whole) // 2])
    assert refused(chunk_sized(1, 100_000)) == (
        "has 1 x 100,000 pixels; a side may have at most 65,535"
    )
    assert refused(chunk_sized(30_000, 3_000)) == (
        "has 30,000 x 3,000 pixels, 90,000,000 in all; at most 50,000,000 are read "
        "(max_image_pixels)"
    )
    for sides in ((0, 5), (5, 0)):
        assert "is damaged, cut off or without pixels" in refused(chunk_sized(*sides))
    assert "has more than 178,956,970 pixels" in refused(chunk_sized(60_000, 60_000))
    assert "10 x 10 pixels, 100 in all; at most 99" in refused(
        saved(Image.new("L", (10, 10))), max_pixels=99
    )
    (tmp_path / "folder").mkdir()
    assert refused(None, "folder") == "is a folder; name the pictures in it"


def test_no_pixels_are_refused():
    for size in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(ImageError, match=r"a side needs at least 1$"):
            read_image(Image.new("RGB", size))
        with pytest.raises(ImageError, match=r"a side needs at least 1$"):
            read_image(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing; convert it to PNG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x --><svg/>', "is an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is a HEIC picture; convert it to JPEG or PNG"),
        (b"%PDF-1.7\n", "is a PDF; convert its page to PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is a PostScript drawing; convert it to PNG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "is a video; give it as one"),
        (b"8BPS\0\1", "is a Photoshop file; convert it to PNG"),
    ],
)
def test_other_formats_are_named_with_what_to_do(refused, data, said):
    assert refused(data + b"\0" * 99).startswith(said)


def test_an_avif_picture_may_begin_as_a_heic_one_does():
    data = bytearray(saved(Image.fromarray(pattern(64, 48)), "AVIF"))
    whole = read_image(bytes(data))
    assert data[4:12] == b"ftypavif"
    data[8:12] = b"mif1"
    assert read_image(bytes(data)) == whole


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.com/a.png", "no address is fetched for a prompt; download"),
        ("http://127.0.0.1/a.png", "no address is fetched for a prompt; download"),
        ("file:///etc/passwd", "no address is fetched for a prompt; give the path"),
        ("data:image/png,abc", "must be of the form data:image/png;base64"),
        ("data:image/png;base64,a$b=", "is not valid base64"),
        ("/dev/zero", "is not a regular file"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "does not exist"),
    ],
)
def test_sources_that_are_not_opened(source, said):
    with pytest.raises(ImageError, match=said):
        read_image(source)


def test_a_type_that_a_file_is_not_is_refused():
    data = saved(Image.new("RGB", (4, 4)))
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    with pytest.raises(ImageError, match=r"declared as image/jpeg, but it is PNG"):
        read_image(url)
    with pytest.raises(ImageError, match="declared as text/html"):
        read_image(data, media_type="text/html")
    assert read_image(data, media_type="image/png") == read_image(data)
