"""Pictures and videos on the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.language.drawn import clip, pattern, saved


def run(command: str, *options: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"mlx_diffgemma.{command}", *options],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL if stdin is None else None,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(pattern(64, 64))))
    (tmp_path / "b.jpg").write_bytes(saved(Image.fromarray(pattern(90, 60)), "JPEG"))
    (tmp_path / "a.mp4").write_bytes(clip(6, rate=2, size=(64, 64)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return tmp_path


def test_generate_takes_pictures_and_a_video(folder):
    done = run(
        *("generate", "--prompt", "Sort: 5 2", "--seed", "7", "--image-tokens", "70"),
        *("--image", str(folder / "a.png"), "--image", str(folder / "b.jpg")),
        *("--video", str(folder / "a.mp4"), "--video-frames", "2", "--max-tokens", "64"),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


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
    done = run("generate", "--prompt", "x", *small, *given)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_goes_with_the_next_message_of_a_chat(folder):
    lines = [f"/image {folder}/none.png", f"/image {folder}/a.png", "Sort: 5 2", "Sort: 3 1"]
    done = run("chat", "--image-tokens", "70", "--seed", "7", stdin="\n".join(lines))
    assert "none.png does not exist" in done.stderr
    assert "1 image for the next message" in done.stderr
    assert done.stdout.strip() and done.returncode == 2, done.stderr
