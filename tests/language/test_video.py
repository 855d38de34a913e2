"""Frames of a video: which are taken, their times, and what is refused."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest

from mlx_diffgemma.errors import ImageError
from mlx_diffgemma.language.video import Frame, read_video
from tests.language.drawn import clip, pattern, saved


def numbers(frames: list[Frame]) -> list[int]:
    """The numbers of frames of `clip`, by their brightness."""
    return [round((frame.image.pixels.mean() - 16) / 2) for frame in frames]


@pytest.mark.parametrize("total", [33, 48, 64, 100])
def test_frames_are_the_beginnings_of_equal_parts(total):
    frames = read_video(clip(total, rate=10))
    assert len(frames) == 32
    wanted = [int(i * (total / 32)) for i in range(32)]
    np.testing.assert_allclose(numbers(frames), wanted, atol=1)  # a codec that loses a little
    assert [frame.seconds for frame in frames] == [n / 10 for n in wanted]


@pytest.mark.parametrize("total", [1, 5, 32])
def test_a_video_of_few_frames_is_seen_whole(total):
    frames = read_video(clip(total, rate=5))
    assert [frame.seconds * 5 for frame in frames] == list(range(total))


def test_times_are_minutes_and_seconds_rounded_down():
    image = read_video(clip(1))[0].image
    for seconds, said in ((0, "00:00"), (0.99, "00:00"), (59.9, "00:59"), (67.2, "01:07")):
        assert Frame(seconds, image).time == said
    assert Frame(3600, image).time == "60:00"


def test_frames_take_the_budget_of_videos():
    frame = read_video(clip(1, size=(160, 90)), frames=1)[0]
    assert frame.image.soft_tokens == 66 and frame.image.patches.shape == (594, 768)


def test_every_source_of_a_video_is_read(tmp_path):
    data = clip(4)
    (path := tmp_path / "a.mp4").write_bytes(data)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    frames = [read_video(source) for source in (data, path, str(path), url)]
    assert len({tuple(frame.image.digest for frame in each) for each in frames}) == 1


def test_a_container_that_does_not_count_its_frames_is_counted():
    import av

    file = BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            picture = np.full((48, 64, 3), 16 + 2 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    frames = read_video(file.getvalue(), frames=4)
    np.testing.assert_allclose(numbers(frames), [0, 10, 20, 30], atol=1)


def sound() -> bytes:
    import av

    file = BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return file.getvalue()


def no_frames() -> bytes:
    """A whole file whose stream has none."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: b"", "is no video that can be read"),
        (lambda: b"this is no video" * 50, "is no video that can be read"),
        (lambda: clip(30)[:700], "is no video that can be read"),
        (no_frames, "is a video without frames"),
        (sound, "has no video in it"),
    ],
)
def test_what_has_no_frames_is_refused_by_name(make, said, tmp_path):
    (path := tmp_path / "a.mp4").write_bytes(make())
    with pytest.raises(ImageError) as raised:
        read_video(path)
    assert str(raised.value).startswith(f"{path} {said}") and "\n" not in str(raised.value)


def test_limits_hold_for_videos_too(tmp_path):
    with pytest.raises(ImageError, match=r"a.mp4 does not exist"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(ImageError, match=r"is a URL, and no address is fetched"):
        read_video("https://example.com/a.mp4")
    with pytest.raises(ImageError, match=r"has 64 x 48 pixels, 3,072 in all; at most 1,000"):
        read_video(clip(2), max_pixels=1000)


def test_the_size_is_checked_before_a_frame_is_decoded():
    with pytest.raises(ImageError, match=r"has 64 x 48 pixels, 3,072 in all; at most 1,000"):
        read_video(no_frames(), max_pixels=1000)


SESSION = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    b"m=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nb.mp4\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", b"ffconcat version 1.0\nfile 'b.mp4'\n"),
        ("a.sdp", SESSION),  # FFmpeg would wait at this port for frames
    ],
)
def test_a_file_that_names_others_opens_none_of_them(name, content, tmp_path):
    (tmp_path / "b.mp4").write_bytes(clip(2))
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=r"is no video that can be read: Invalid"):
        read_video(path)


def test_a_picture_is_one_frame():
    from PIL import Image

    frames = read_video(saved(Image.fromarray(pattern(64, 48))))
    assert len(frames) == 1 and frames[0].time == "00:00"
