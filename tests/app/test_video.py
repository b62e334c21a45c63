"""Attention over a clip: what comes back plays in a browser; what is no clip, or too much of one, is refused or cut."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import gradio as gr
import numpy as np
import pytest

from demo.video import MAX_FRAMES, Mp4, read_clip
from tests.app.driving import clip, open_tab, said, shoot, upload


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")])
def test_clips_of_the_usual_kinds_are_read(tmp_path: Path, name: str, codec: str) -> None:
    frames, fps = read_clip(io.BytesIO(clip(tmp_path / name, 12, codec=codec)))
    assert len(frames) == 12
    assert fps == pytest.approx(12)
    assert frames[0].shape == (96, 128, 3)
    assert frames[0].max() > 200, "the disc is there"


def test_a_fast_clip_is_thinned_and_a_long_one_cut(tmp_path: Path) -> None:
    fast, fps = read_clip(io.BytesIO(clip(tmp_path / "fast.mp4", 60, fps=60)))
    assert (len(fast), fps) == (12, 12)
    long, _ = read_clip(io.BytesIO(clip(tmp_path / "long.mp4", 150)))
    assert len(long) == MAX_FRAMES


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"words, not a video", "no video that can be read"),
        (lambda data: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no video that can be read"),
        (lambda data: b"", "no video that can be read"),
        (cut_short, "cannot be decoded"),
        (lambda data: data[:32] + bytes(1000), "cannot be decoded|holds no"),
    ],
)
def test_what_is_no_clip_is_refused_in_words(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(gr.Error, match=words):
        read_clip(io.BytesIO(change(clip(tmp_path / "a.mp4", 12))))


def test_a_clip_of_more_pixels_than_a_screen_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.video.MAX_PIXELS", 96 * 127)
    with pytest.raises(gr.Error, match="has 128x96 pixels"):
        read_clip(io.BytesIO(clip(tmp_path / "a.mp4", 2)))


def test_what_is_written_is_what_browsers_play(tmp_path: Path) -> None:
    """H.264 in 4:2:0, with the index before the pictures."""
    frames = [np.full((64, 96, 3), 9 * number, np.uint8) for number in range(10)]
    with Mp4(tmp_path / "a.mp4", 12.0, frames[0].shape) as video:
        for frame in frames:
            video.add(frame)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == 10
    assert np.abs(read[-1].astype(int) - frames[-1]).mean() < 4


@pytest.mark.browser
@pytest.mark.slow
def test_a_clip_comes_back_with_attention_and_plays(page: Any, tmp_path: Path, repo_root: Path) -> None:
    open_tab(page, "Video")
    upload(page, "#clip", "words.mp4", b"no video at all", "video/mp4")
    page.locator("#clip video").first.wait_for(state="attached")
    page.locator("#video-start").click()
    assert "no video that can be read" in said(page, "no video that can be read")
    page.reload()
    page.complaints.clear()
    page.locator("#samples img").first.wait_for()
    open_tab(page, "Video")
    upload(page, "#clip", "disc.mp4", clip(tmp_path / "disc.mp4", 12), "video/mp4")
    page.locator("#clip video").first.wait_for(state="attached")
    page.locator("#video-start").click()
    page.get_by_text("12 frames, 1.0 s at 12 frames a second.").wait_for()
    made = page.locator("#video video").first
    made.wait_for(state="attached")
    page.wait_for_function("document.querySelector('#video video').readyState >= 2")
    assert made.evaluate("v => [v.videoWidth, v.videoHeight, Math.round(v.duration * 10)]") == [128, 96, 10]
    shoot(page, repo_root, "video")
