"""Videos with a class in, frames of them as one data set out: UCF-101 as distributed, folders, files or folders of frames.

    ucf101:ROOT                   UCF-101/CLASS/v_*.avi (or a folder of frames of that name) and
                                  ucfTrainTestlist/{classInd,trainlistNN,testlistNN}.txt
    train/CLASS/clip.mp4, val/... a folder of splits and classes, or of classes alone; a clip is a video file (.avi .mp4
                                  .mkv .mov .webm .mpg) or a folder of frames

Frames in a folder come in the order of their names, numbers in them by size: 2.jpg before 10.jpg.
A set's rows are frames, evenly spaced over each video, so that extraction and its cache work as for images.
"""

import os
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.datasets import Dataset
from data.decode import DEFAULT_LIMITS, DecodeError, DecodeLimits, decode_image
from data.errors import InputError
from data.listings import IMAGE, SPLIT_NAMES, Item, Record, images_under
from data.members import Member, content_mark, read_bytes
from evaluators.segmentation_data import read_names

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg")
LISTS = "ucfTrainTestlist"
CLIP = "clip"
"""Column that ties the frames of a video together."""


@dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames."""

    name: str
    label: str
    split: str | None
    path: Path


class VideoFrames(Dataset):
    """`n_frames` rows a video, in order; each thread keeps the frames of the video that it read last, so that it is decoded once."""

    def __init__(
        self, records: Sequence[Record], n_frames: int, name: str, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(records, classes, name)
        self._n_frames = n_frames
        self._kept = threading.local()

    @staticmethod
    def of(videos: Sequence[Video], n_frames: int, name: str) -> "VideoFrames":
        """The frames of these videos."""
        records = []
        for video in videos:
            for k in range(n_frames):
                row = {CLIP: video.name, "place": str(k)}
                item = Item(f"{video.name}#{k}", video.label, video.split, row)
                records.append(Record(item, {IMAGE: Member(str(video.path))}))
        return VideoFrames(records, n_frames, name)

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """One frame, uint8 [H, W, 3]. Raises DecodeError where the video cannot be read."""
        path, place = self._records[i].members[IMAGE].path, int(self.items[i].row["place"])
        last: tuple[str, list[np.ndarray]] = getattr(self._kept, "last", ("", []))
        if last[0] != path:
            last = self._kept.last = (path, read_frames(Path(path), self._n_frames, limits))
        return last[1][place]

    def subset(self, indices: Iterable[int]) -> "VideoFrames":
        """As `Dataset.subset`."""
        return VideoFrames([self._records[int(i)] for i in indices], self._n_frames, self.name, self.classes)

    def fingerprint(self) -> str:
        """As `Dataset.fingerprint`; each video is read once."""
        digest = zlib.crc32(str(self._n_frames).encode())
        marks: dict[str, str] = {}
        for item, record in zip(self.items, self._records, strict=True):
            member = record.members[IMAGE]
            if member.path not in marks:
                marks[member.path] = _mark(Path(member.path))
            line = "\0".join((item.name, item.label or "", item.split or "", marks[member.path]))
            digest = zlib.crc32(line.encode("utf-8", "surrogateescape"), digest)
        return f"videos-{len(self.items)}-{digest:08x}"


def in_time(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts the names of frames: where they are not padded, frame 10 is not the second one."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def _frames_in(folder: Path) -> list[Path]:
    return sorted(images_under(folder), key=lambda path: in_time(path.relative_to(folder).as_posix()))


def _mark(path: Path) -> str:
    files = _frames_in(path) if path.is_dir() else [path]
    return " ".join(content_mark(Member(str(file))) for file in files)


def places(n: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames of n: the middles of as many equal parts."""
    return [int((k + 0.5) * n / wanted) for k in range(wanted)]


def read_frames(path: Path, wanted: int, limits: DecodeLimits = DEFAULT_LIMITS) -> list[np.ndarray]:
    """Evenly spaced frames, uint8 [H, W, 3] in RGB. Raises DecodeError for what is no video, or has no frames."""
    if path.is_dir():
        files = _frames_in(path)
        if not files:
            raise DecodeError("empty", f"{path.name}: a folder without frames")
        return [decode_image(read_bytes(Member(str(files[k]))), limits) for k in places(len(files), wanted)]
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file comes as an error, not as chatter
    declared = _declared_frames(path, limits)
    found = _frames_at(path, places(declared, wanted)) if declared else []
    if len(found) < wanted:  # headers of some files promise more frames than there are, those of others tell none
        there = _count_frames(path)
        if not there:
            raise DecodeError("corrupt", f"{path.name}: no frame of this video can be decoded")
        found = _frames_at(path, places(there, wanted))
    if len(found) < wanted:
        raise DecodeError("corrupt", f"{path.name}: this video ends early or is damaged")
    return found


def _declared_frames(path: Path, limits: DecodeLimits) -> int:
    """How many frames a file says that it has; 0 where it does not say, as those that a browser or a camera recorded in one go."""
    capture = _open(path)
    width, height = (int(capture.get(what)) for what in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    declared = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    capture.release()
    if width * height > limits.max_pixels:
        raise DecodeError("too_many_pixels", f"{path.name}: frames of {width}x{height} pixels; scale the video down")
    return declared


def _open(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DecodeError("not_an_image", f"{path.name}: no video that can be read")
    return capture


def _frames_at(path: Path, wanted: Sequence[int]) -> list[np.ndarray]:
    """Frames of these rising indices, as far as they are there; frames are taken in order, since seeking is not exact."""
    capture, position = _open(path), -1
    found: list[np.ndarray] = []
    for place in wanted:
        while position < place:
            if not capture.grab():
                capture.release()
                return found
            position += 1
        good, frame = capture.retrieve()
        if not good:
            break
        found.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    return found


def _count_frames(path: Path) -> int:
    capture, count = _open(path), 0
    while capture.grab():
        count += 1
    capture.release()
    return count


def has_lists(data: str | Path) -> bool:
    """Whether this is UCF-101 with its lists of three splits."""
    return (Path(str(data).removeprefix("ucf101:")) / LISTS).is_dir()


def open_actions(data: str | Path, n_frames: int, split_list: int = 1) -> VideoFrames:
    """Open a set of videos with classes; see the head of this file. Raises InputError."""
    name, _, rest = str(data).partition(":")
    root = Path(rest) if name == "ucf101" and rest else Path(data)
    if has_lists(data):
        return VideoFrames.of(_ucf(root, split_list), n_frames, str(data))
    if name == "ucf101" and rest:
        raise InputError(f"{data}: no ucfTrainTestlist there; wanted UCF-101/ and ucfTrainTestlist/ as distributed")
    if not root.is_dir():
        raise InputError(f"{data}: no folder there; wanted train/CLASS/, val/CLASS/ with videos, or ucf101:ROOT")
    videos = _folders(root)
    if not videos:
        raise InputError(
            f"{data}: no videos in class folders; wanted CLASS/clip{'|'.join(VIDEO_SUFFIXES[:3])} or CLASS/CLIP/ with frames"
        )
    return VideoFrames.of(videos, n_frames, str(data))


def _ucf(root: Path, number: int) -> list[Video]:
    """One of the three splits; training lines carry a number behind the name, test lines do not."""
    lists = root / LISTS
    classes = {line.split()[1] for line in _lines(lists / "classInd.txt") if len(line.split()) > 1}
    videos = []
    for split, listed in (("train", f"trainlist{number:02d}.txt"), ("val", f"testlist{number:02d}.txt")):
        for name in read_names(lists / listed):
            label = name.split("/")[0]
            if label not in classes:
                raise InputError(f"{lists / listed}: class {label!r:.40} of {name:.80} is not in classInd.txt")
            file = root / "UCF-101" / name
            path = next((p for p in (file, file.with_suffix("")) if p.exists()), None)
            if path is None:
                raise InputError(
                    f"{file}: nothing there, though {listed} lists it; wanted the video, or a folder of frames"
                )
            videos.append(Video(name, label, split, path))
    return videos


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted lines of `number class`") from error


def _folders(root: Path) -> list[Video]:
    """SPLIT/CLASS/clip or CLASS/clip."""
    tops = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    splits = [folder for folder in tops if folder.name.lower() in SPLIT_NAMES]
    pairs: list[tuple[str | None, Path]] = [(SPLIT_NAMES[folder.name.lower()], folder) for folder in splits]
    videos = []
    for split, folder in pairs or [(None, root)]:
        for kind in sorted(folder.iterdir()):
            if not kind.is_dir() or kind.name.startswith("."):
                continue
            for path in sorted(kind.iterdir()):
                if path.suffix.lower() in VIDEO_SUFFIXES or (path.is_dir() and not path.name.startswith(".")):
                    videos.append(Video(path.relative_to(root).as_posix(), kind.name, split, path))
    return videos
