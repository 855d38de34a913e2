"""Our patches against those of transformers' image processor on Pillow, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mlx_diffgemma.language.images import fitted, read_image
from mlx_diffgemma.language.video import Frame
from tests.language.drawn import palette, pattern, smooth
from tests.sampled import first

torch = pytest.importorskip("torch", reason="torch is not installed")
from transformers.models.gemma4.image_processing_pil_gemma4 import (  # noqa: E402
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.video_processing_utils import default_sample_indices_fn  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

pytestmark = pytest.mark.parity
BUDGETS = (70, 140, 280, 560, 1120)
MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "HSV")


def drawn(number: int) -> tuple[Image.Image, int]:
    """A picture of some size and mode, and a budget."""
    rng = np.random.default_rng(number)
    width, height = (int(np.exp(rng.uniform(0, np.log(900)))) for _ in range(2))
    draw = pattern if number % 2 else smooth
    image, mode = Image.fromarray(draw(width, height)), MODES[number % len(MODES)]
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(draw(width, height, 4)[..., 3]))
    return image.convert(mode), BUDGETS[number % len(BUDGETS)]


# Sizes at which a side is a whole number of units, but for rounding.
TIES = ((205, 287, 140), (329, 235, 140), (65, 182, 70), (130, 364, 70), (1190, 17, 280))


@pytest.mark.parametrize(("width", "height", "budget"), TIES)
def test_ties_of_the_size_are_decided_as_there(width, height, budget):
    theirs = get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
    assert fitted(width, height, budget) == theirs[::-1]


@pytest.mark.parametrize("number", first(18, range(180)))
def test_patches_and_positions_are_transformers(number):
    image, budget = drawn(number)
    theirs = Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="np")
    ours = read_image(image, soft_tokens=budget)
    count = len(ours.patches)
    assert ours.soft_tokens == int(theirs["num_soft_tokens_per_image"][0])
    assert ours.patches.dtype == theirs["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(ours.patches, theirs["pixel_values"][0, :count])
    np.testing.assert_array_equal(ours.positions, theirs["image_position_ids"][0, :count])
    assert (theirs["image_position_ids"][0, count:] == -1).all()


def test_transparent_palettes_are_transformers(tmp_path):
    palette().save(path := tmp_path / "a.png", transparency=5)
    theirs = Gemma4ImageProcessorPil()(Image.open(path), return_tensors="np")["pixel_values"][0]
    ours = read_image(path).patches
    np.testing.assert_array_equal(ours, theirs[: len(ours)])


@pytest.mark.parametrize("total", [32, 33, 47, 64, 100, 719, 1000, 1799, 86_400])
@pytest.mark.parametrize("count", [1, 4, 32, 31])
def test_frames_and_their_times_are_transformers(total, count, monkeypatch):
    from mlx_diffgemma.language import video

    metadata = VideoMetadata(total_num_frames=total, fps=29.97)
    theirs = default_sample_indices_fn(metadata, num_frames=count)
    np.testing.assert_array_equal(video.places(total, count), theirs)
    for index in theirs.tolist():
        seconds = index / 29.97
        said = f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
        assert Frame(seconds, None).time == said
