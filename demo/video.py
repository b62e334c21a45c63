"""The tab Video: attention laid over a short clip, as an MP4 that browsers play (H.264, 4:2:0, index first).

Read in this order: read_clip (a file -> some frames), overlaid (frames -> frames), Mp4 (frames -> file), the tab.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import cv2
import gradio as gr
import numpy as np

from demo.client import Served
from demo.parts import Parts
from demo.pictures import heat
from demo.visits import as_it_came, refusal

MAX_SECONDS = 10.0
MAX_FPS = 12.0
"""Frames a second that are kept; the others of a faster clip are passed over."""
MAX_FRAMES = int(MAX_SECONDS * MAX_FPS)
ROUNDING = 0.05
"""Of a frame: containers keep times in milliseconds."""
MAX_DECODED = 2400
"""Frames that are decoded to find these; a clip of more a second ends early."""
MAX_PIXELS = 3840 * 2160
CLIP_PX = 480
"""Long side of the frames that are kept."""
BATCH = 8
STEADINESS = 0.9
"""How much of the range of colours carries over from a frame to the next; each on its own would flicker."""
CONTAINERS: dict[str, tuple[int, bytes]] = {
    "mov,mp4,m4a,3gp,3g2,mj2": (4, b"ftyp"),
    "matroska,webm": (0, b"\x1a\x45\xdf\xa3"),
    "avi": (8, b"AVI "),
}
"""Containers that are read, each with the place and the bytes that tell it. Only these: play lists and the like name other files."""


def container_of(head: bytes) -> str:
    """The demuxer for a file that begins like this. Raises gr.Error."""
    for name, (place, magic) in CONTAINERS.items():
        if head[place : place + len(magic)] == magic:
            return name
    raise refusal("This file is no video that can be read: send MP4, MOV, WebM, MKV or AVI.")


def read_clip(file: BinaryIO) -> tuple[list[np.ndarray], float]:
    """The first seconds of a video, upright uint8 RGB frames no larger than CLIP_PX, and how many are shown a second. Raises gr.Error."""
    kind = container_of(file.read(16))
    file.seek(0)
    frames: list[np.ndarray] = []
    try:
        with av.open(file, "r", format=kind, metadata_errors="replace") as container:
            if not container.streams.video:
                raise refusal("This file holds no pictures, only sound or nothing.")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS or min(width, height) < 2:
                raise refusal(f"The video has {width}x{height} pixels; send one of 2x2 to 3840x2160.")
            fps = min(float(stream.average_rate or MAX_FPS), MAX_FPS)
            for number, frame in enumerate(container.decode(stream)):
                seconds = frame.time if frame.time is not None else number / float(stream.average_rate or MAX_FPS)
                if seconds > MAX_SECONDS or len(frames) == MAX_FRAMES or number == MAX_DECODED:
                    break
                if seconds * fps >= len(frames) - ROUNDING and frame.width * frame.height <= MAX_PIXELS:
                    frames.append(_small(frame))
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        if not frames:  # a clip cut short is shown as far as it goes
            raise refusal(f"This video cannot be decoded ({type(error).__name__}); is it damaged?") from error
    if not frames:
        raise refusal("This video holds no frame that can be decoded.")
    shape = frames[0].shape
    return [frame for frame in frames if frame.shape == shape], max(fps, 1.0)


def _small(frame: Any) -> np.ndarray:
    scale = min(1.0, CLIP_PX / max(frame.width, frame.height))
    width, height = (max(2, round(side * scale) // 2 * 2) for side in (frame.width, frame.height))
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(rgb, round(getattr(frame, "rotation", 0) / 90) % 4))


def overlaid(served: Served, frames: list[np.ndarray], head: int, size_px: int) -> Iterator[np.ndarray]:
    """The frames with the attention of a head (0: the mean of all) laid over. Raises gr.Error."""
    low = high = None
    for start in range(0, len(frames), BATCH):
        batch = frames[start : start + BATCH]
        jpegs = [
            cv2.imencode(".jpg", frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for frame in batch
        ]
        maps_Bnhw = served.ask("attention", jpegs, {"size": size_px})["attention"]
        if head > maps_Bnhw.shape[1]:
            raise refusal(f"This network has {maps_Bnhw.shape[1]} heads; choose one of them, or 0 for their mean.")
        chosen_Bhw = maps_Bnhw.mean(axis=1) if head == 0 else maps_Bnhw[:, head - 1]
        for frame, map_hw in zip(batch, chosen_Bhw, strict=True):
            ends = float(map_hw.min()), float(map_hw.max())
            low = ends[0] if low is None else STEADINESS * low + (1 - STEADINESS) * ends[0]
            high = ends[1] if high is None else STEADINESS * high + (1 - STEADINESS) * ends[1]
            yield heat(frame, map_hw, low, high)


class Mp4:
    """A video file that is written frame by frame; whole when the context ends well."""

    def __init__(self, path: Path, fps: float, shape: tuple[int, ...]) -> None:
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        self._stream: Any = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.height, self._stream.width = shape[:2]
        self._stream.pix_fmt, self._stream.options = "yuv420p", {"crf": "20", "preset": "veryfast"}

    def __enter__(self) -> "Mp4":
        return self

    def add(self, frame_HWC: np.ndarray) -> None:
        """One more frame, uint8 RGB with even sides."""
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()


@dataclass(frozen=True)
class VideoTab:
    """What its events do."""

    served: Served

    def make(self, path: str | None, head: float, size: float, progress: Any) -> Iterator[tuple[Any, str]]:
        """How far it is, then the clip with attention over it, in Gradio's cache, which ages it like uploads. Raises gr.Error."""
        if path is None:
            raise refusal("Choose a clip first.")
        progress(0.0, desc="reading the clip")
        try:
            with Path(path).open("rb") as file:
                frames, fps = read_clip(file)
        except FileNotFoundError as error:
            raise refusal("This upload was deleted after a while. Upload it again.") from error
        cache = Path(gr.utils.get_upload_folder())
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="clip-", dir=cache)) / "attention.mp4"
        try:
            with Mp4(made, fps, frames[0].shape) as video:
                for done, frame in enumerate(overlaid(self.served, frames, int(head), int(size)), start=1):
                    video.add(frame)
                    progress((done, len(frames)), desc="looking at frames", unit="frames")
                    if done % BATCH == 0:  # a generator can be stopped only where it yields
                        yield gr.skip(), f"{done} of {len(frames)} frames"
        except BaseException:
            shutil.rmtree(made.parent, ignore_errors=True)
            raise
        yield str(made), f"{len(frames)} frames, {len(frames) / fps:.1f} s at {fps:.3g} frames a second."


def video_tab(parts: Parts) -> None:
    """The clip, what is asked for, the clip that comes back."""
    with parts.tab("Video", "video", image=False):
        if not parts.has("attention", "A ResNet has no attention; a ViT has."):
            return
        gr.Markdown(
            f"Attention over a clip: MP4, MOV, WebM, MKV or AVI. The first {MAX_SECONDS:.0f} seconds are used, at most "
            f"{MAX_FPS:.0f} frames a second, without sound."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                clip = gr.Video(label="Clip", sources=["upload"], height=320, elem_id="clip")
                clip.preprocess = as_it_came
                head = gr.Slider(0, 16, 0, step=1, label="Head (0: the mean of all)", elem_id="video-head")
                size = parts.size_slider("video-size")
                with gr.Row():
                    start = gr.Button("Make the video", variant="primary", elem_id="video-start")
                    stop = gr.Button("Stop", elem_id="video-stop")
            with gr.Column(min_width=300):
                made = gr.Video(label="Attention, as MP4", interactive=False, height=420, elem_id="video")
                words = gr.Markdown(elem_id="video-words")
        tab = VideoTab(parts.served)

        def one_at_a_time(
            request: gr.Request,
            path: str | None,
            head: float,
            size: float,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> Iterator[tuple[Any, str]]:
            with parts.turns.take(request, "video"):
                yield from tab.make(path, head, size, progress)

        work = start.click(one_at_a_time, [clip, head, size], [made, words], concurrency_limit=1)
        stop.click(lambda: "Stopped.", None, words, cancels=work, queue=False)
