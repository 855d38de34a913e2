"""Pictures and videos on the command line."""

from __future__ import annotations

import pytest
from PIL import Image

from mlx_diffgemma.cli.chat import chat
from mlx_diffgemma.cli.generate import generate
from tests.cli.test_cli import assert_one_line, invoke
from tests.language.drawn import clip, pattern, saved

# As in test_chat.py: the limits keep answers short.
QUICK = ("--seed", "7", "--max-tokens", "24", "--canvas-length", "24")
QUICK = (*QUICK, "--max-denoising-steps", "4")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(pattern(64, 64))))
    (tmp_path / "b.jpg").write_bytes(saved(Image.fromarray(pattern(90, 60)), "JPEG"))
    (tmp_path / "a.mp4").write_bytes(clip(6, rate=2, size=(64, 64)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return tmp_path


def test_generate_takes_pictures_and_a_video(folder):
    media = ("--image", f"{folder}/a.png", "--image", f"{folder}/b.jpg", "--image-tokens", "70")
    media = (*media, "--video", f"{folder}/a.mp4", "--video-frames", "2")
    result = invoke(generate, "--prompt", "Sort: 5 2", *QUICK, *media, "--verbose", "False")
    assert (result.exit_code, result.stderr) == (0, ""), result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "{}/bad.png"], "bad.png is not an image"),
        (["--image", "{}/none.png"], "none.png does not exist"),
        (["--image", "https://example.com/a.png"], "no address is fetched for a prompt"),
        (["--image", "{}/a.png", "--image-tokens", "99"], "--image-tokens must be one of 70"),
        (["--image", "{}/a.png", "--max-image-pixels", "10"], "at most 10 are read"),
        (["--image", "{}/a.png", "--no-vision"], "loaded without its vision tower"),
        (["--image", "{}/a.png", "--ignore-chat-template"], "--image has no effect with"),
        (["--video", "{}/bad.png"], "bad.png is no video that can be read"),
    ],
)
def test_each_mistake_is_one_line_and_exit_2(folder, options, said):
    given = [option.format(folder) for option in options]
    small = [] if "--image-tokens" in given else ["--image-tokens", "70"]
    assert_one_line(invoke(generate, "--prompt", "x", *QUICK, *small, *given), said)


def test_a_picture_goes_with_the_next_message_of_a_chat(folder):
    lines = [f"/image {folder}/none.png", f"/image {folder}/a.png", "Sort: 5 2", "Sort: 3 1"]
    result = invoke(chat, "--image-tokens", "70", *QUICK, stdin="\n".join(lines))
    assert "none.png does not exist" in result.stderr
    assert "1 image for the next message" in result.stderr
    assert result.exit_code == 2 and "Traceback" not in result.output
