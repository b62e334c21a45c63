"""Videos with masks of numbered objects in, as lists of frames: DAVIS as distributed, packed clips, or folders.

    davis:ROOT                              DAVIS-2017: JPEGImages/480p/SEQ, Annotations/480p/SEQ, ImageSets/2017/val.txt
    images/CLIP/00.jpg + masks/CLIP/00.png  two folders (`instances/` or `annotations/` do as well); a mask for the first
                                            frame of each clip at least, frames without one are not scored
    NAME.csv beside NAME.zip                a packed set with a column `clip` and the kind `instances`

DAVIS is also known by its folders, without the prefix. Frames of a video come in the order of their names, numbers in them by size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.datasets import Dataset, open_dataset
from data.errors import InputError
from data.listings import IMAGE, Item, Record, images_under
from data.members import Member
from evaluators.segmentation_data import VOID_VALUE, decode_mask, read_names
from evaluators.video_frames import in_time

MASK_FOLDERS = ("masks", "instances", "annotations")
MASK = "instances"
"""Kind of the mask's member."""


@dataclass(frozen=True)
class MaskedVideo:
    """Frames of one video and their masks."""

    name: str
    frames: Dataset

    def __len__(self) -> int:
        return len(self.frames)

    def frame_name(self, k: int) -> str:
        """Name of a frame within its video, without suffix."""
        return Path(self.frames.items[k].name).stem

    def image(self, k: int) -> np.ndarray:
        """Frame k, uint8 [H, W, 3]. Raises DecodeError."""
        return self.frames.image(k)

    def has_mask(self, k: int) -> bool:
        """Whether frame k has a mask."""
        return MASK in self.frames._records[k].members

    def mask(self, k: int, hw: tuple[int, int]) -> np.ndarray:
        """Object numbers of frame k, int32 [H, W]; void counts as background, as in DAVIS. Raises InputError."""
        name = self.frames.items[k].name
        values, coding = decode_mask(self.frames.read_member(k, MASK), name)
        if coding == "lossy":
            raise InputError(f"{name}: its mask is a JPEG, whose values are not exact; wanted object numbers in a PNG")
        if values.shape != hw:
            raise InputError(
                f"{name}: its mask has {values.shape[1]} x {values.shape[0]} pixels, the frame {hw[1]} x {hw[0]}; "
                "wanted the same size"
            )
        if coding == "grey" and set(np.unique(values)) <= {0, VOID_VALUE}:  # black and white: one object
            return (values > 0).astype(np.int32)
        if values.max() > VOID_VALUE or values.min() < 0:
            raise InputError(f"{name}: its mask holds the number {values.max()}; wanted object numbers up to 254")
        mask: np.ndarray = np.where(values == VOID_VALUE, 0, values)
        return mask


@dataclass(frozen=True)
class VideoSet:
    """Videos of one set."""

    videos: tuple[MaskedVideo, ...]
    dataset: Dataset
    """All frames."""
    score_last: bool
    """Whether the last frame counts; not in DAVIS."""
    source: str

    def truth_fingerprint(self) -> str:
        """As `Dataset.fingerprint`, of the masks that are there."""
        records = [Record(r.item, {IMAGE: r.members[MASK]}) for r in self.dataset._records if MASK in r.members]
        return Dataset(records).fingerprint()


def open_videos(data: str | Path) -> VideoSet:
    """Open a set of videos; see the head of this file. Raises InputError."""
    name, _, rest = str(data).partition(":")
    root = Path(rest) if name in ("davis", "davis2017") and rest else Path(data)
    davis = find_davis(root)
    if rest and name in ("davis", "davis2017") and davis is None:
        raise InputError(f"{data}: no JPEGImages/480p and ImageSets/2017 there; wanted DAVIS-2017 as distributed")
    if davis is not None:
        return _videos(open_davis(davis), score_last=False, source="DAVIS-2017 val, 480p")
    folder = next((kind for kind in MASK_FOLDERS if (root / kind).is_dir()), None)
    if (root / "images").is_dir() and folder:
        return _videos(_folder(root, folder), score_last=True, source=f"images/ and {folder}/ of {root}")
    dataset = open_dataset(data)
    if MASK not in dataset.kinds or not all("clip" in item.row for item in dataset.items):
        raise InputError(
            f"{data}: no videos with masks (kinds: {', '.join(dataset.kinds)}); wanted davis:ROOT, images/CLIP/ with "
            "masks/CLIP/, or a packed set with a column `clip` and instances/"
        )
    return _videos(dataset, score_last=True, source=f"packed clips of {data}")


def _videos(dataset: Dataset, score_last: bool, source: str) -> VideoSet:
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(dataset.items):
        rows.setdefault(item.row["clip"], []).append(row)
    videos = []
    for name, own in rows.items():
        own.sort(key=lambda row: in_time(dataset.items[row].name))
        video = MaskedVideo(name, dataset.subset(own))
        if len(video) < (2 if score_last else 3):
            raise InputError(
                f"{name}: a video of {len(video)} frame{'s' * (len(video) > 1)}; wanted at least "
                f"{2 if score_last else 3}, so that there is one to score"
            )
        if not video.has_mask(0):
            raise InputError(f"{name}: its first frame {video.frame_name(0)} has no mask; wanted the objects to follow")
        if not any(video.has_mask(k) for k in range(1, len(video) if score_last else len(video) - 1)):
            raise InputError(f"{name}: no frame but the first has a mask; wanted masks to score against")
        videos.append(video)
    return VideoSet(tuple(videos), dataset, score_last, source)


def find_davis(root: Path) -> Path | None:
    """The folder that holds JPEGImages/480p and ImageSets/2017."""
    places = (root, root / "DAVIS", root / "DAVIS-2017")
    return next((p for p in places if (p / "JPEGImages/480p").is_dir() and (p / "ImageSets/2017").is_dir()), None)


def open_davis(root: Path) -> Dataset:
    """The validation videos of DAVIS-2017 (30 of them)."""
    listed = root / "ImageSets" / "2017" / "val.txt"
    records = []
    for name in read_names(listed):
        frames, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        if not frames.is_dir():
            raise InputError(f"{frames}: nothing there, though {listed} lists {name}; unpack the set again")
        for path in images_under(frames):
            mask = masks / f"{path.stem}.png"
            if not mask.is_file():  # frames without one are not scored, and the figure would be of fewer
                raise InputError(
                    f"{mask}: nothing there, though DAVIS has a mask for every frame; unpack the set again"
                )
            records.append(_frame(path, name, mask, root))
    if not records:
        raise InputError(f"{listed}: it lists no videos; wanted DAVIS-2017 as distributed")
    return Dataset(records, name=str(root))


def _folder(root: Path, folder: str) -> Dataset:
    """A folder a video under images/ and under `folder`/."""
    records = [
        _frame(path, clip.name, root / folder / clip.name / f"{path.stem}.png", root)
        for clip in sorted((root / "images").iterdir())
        if clip.is_dir() and not clip.name.startswith(".")
        for path in images_under(clip)
    ]
    if not records:
        raise InputError(f"{root}: no videos under images/; wanted a folder of frames for each, images/CLIP/00.jpg")
    return Dataset(records, name=str(root))


def _frame(image: Path, clip: str, mask: Path, root: Path) -> Record:
    members = {IMAGE: Member(str(image))}
    if mask.is_file():
        members[MASK] = Member(str(mask))
    return Record(Item(image.relative_to(root).as_posix(), None, "val", {"clip": clip}), members)
