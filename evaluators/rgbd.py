"""Images with a measured depth: any RGB-D set named on a command line in, its two parts and depth maps in metres out.

Depth lies beside each image as a 16-bit PNG in millimetres, 0 where nothing was measured: a packed set or tar shards
with the kind `depth_mm`, a CSV with a column `depth_mm`, or a folder with `images/` and `depth_mm/` that hold files of
the same names (`images/train/a.jpg`, `depth_mm/train/a.png`). `disparity_x64` in its place holds disparities in pixels
times 64. `nyud:ROOT` and `kitti:ROOT` are the benchmarks as distributed (`depth_benchmarks`).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from data.datasets import Dataset, open_dataset
from data.decode import DEFAULT_LIMITS
from data.errors import InputError
from data.listings import IMAGE, Record, scan_folder
from data.members import Member
from evaluators.depth_benchmarks import BENCHMARKS, ScoredPart
from evaluators.depth_cuts import DEPTH, DEPTH_256, DISPARITY, CutDataset
from evaluators.image_sizes import upright_hw
from evaluators.nyud_mat import LabelledDataset
from evaluators.splits import Splits, scene_column, split_dataset

STEPS = {DEPTH: 1000.0, DEPTH_256: 256.0, DISPARITY: 64.0}
"""Steps of the 16-bit values that make up a metre, or a pixel of disparity."""


BEYOND_TRAINING = 2.0
"""A head's range of disparities, as a multiple of the largest in training: test images may show nearer things."""


@dataclass(frozen=True)
class DepthSet:
    """A set of images with depth and how it is scored."""

    splits: Splits
    unit: str = "metre"
    max_depth: float | None = None
    """Range of its published protocol; None: the user's."""
    scored: ScoredPart | None = None
    """The part of a test map that counts; None: all of it."""


def open_depth(
    data: str | Path, train_split: str | None = None, val_split: str | None = None, group_by: str = "auto"
) -> DepthSet:
    """Open a set and take its two parts. Raises InputError where an image has no depth file."""
    name, _, rest = str(data).partition(":")
    if name in BENCHMARKS and rest:
        benchmark = BENCHMARKS[name](Path(rest))
        splits = _split(benchmark.dataset, train_split, val_split, group_by)
        splits.notes.extend(benchmark.notes)
        return DepthSet(splits, max_depth=benchmark.max_depth, scored=benchmark.scored)
    dataset = _open_set(data)
    splits = _split(dataset, train_split, val_split, group_by)
    if DEPTH in dataset.kinds:
        return DepthSet(splits)
    train = MeasuredDepth(splits.train, range(len(splits.train)))
    farthest = max((float(depth.max()) for depth in train), default=0.0)
    return DepthSet(splits, "pixel of disparity", max_depth=max(1.0, math.ceil(BEYOND_TRAINING * farthest)))


def open_rgbd(
    data: str | Path, train_split: str | None = None, val_split: str | None = None, group_by: str = "auto"
) -> Splits:
    """The two parts of a set; see `open_depth`."""
    return open_depth(data, train_split, val_split, group_by).splits


def _open_set(data: str | Path) -> Dataset:
    root = Path(data)
    kind = next((kind for kind in (DEPTH, DISPARITY) if (root / kind).is_dir()), None)
    dataset = _folder_pair(root, kind) if (root / "images").is_dir() and kind else open_dataset(data)
    if not {DEPTH, DISPARITY} & set(dataset.kinds):
        raise InputError(
            f"{data}: not every image has a depth map (kinds: {', '.join(dataset.kinds)}); wanted 16-bit PNG in "
            "millimetres: images/ with depth_mm/, a CSV column `depth_mm`, or a packed set with the kind depth_mm; or "
            f"one of {', '.join(f'{name}:ROOT' for name in BENCHMARKS)}"
        )
    return dataset


def _split(dataset: Dataset, train_split: str | None, val_split: str | None, group_by: str) -> Splits:
    return split_dataset(dataset, train_split, val_split, scene_column(dataset.items, group_by))


class MeasuredDepth(Sequence[np.ndarray]):
    """The depth maps of some rows of a set, read when they are asked for."""

    def __init__(self, dataset: Dataset, rows: Sequence[int], scored: ScoredPart | None = None) -> None:
        self._dataset, self._rows, self._scored = dataset, rows, scored

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "MeasuredDepth": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | MeasuredDepth":
        if isinstance(index, slice):
            return MeasuredDepth(self._dataset, self._rows[index], self._scored)
        depth_HW = read_depth_m(self._dataset, self._rows[index])
        if self._scored is None:
            return depth_HW
        kept = np.zeros_like(depth_HW)
        place = self._scored(depth_HW.shape[0], depth_HW.shape[1])
        kept[place] = depth_HW[place]
        return kept


def truth_fingerprint(dataset: Dataset) -> str:
    """As `Dataset.fingerprint`, of the depth maps."""
    if isinstance(dataset, LabelledDataset):  # one file holds both
        return dataset.fingerprint()
    records = [Record(one.item, {IMAGE: one.members[depth_kind(one)]}) for one in dataset._records]
    return Dataset(records).fingerprint()


def depth_kind(record: Record) -> str:
    """The kind of file that holds an image's depth."""
    return next((kind for kind in STEPS if kind in record.members), DEPTH)


def _folder_pair(root: Path, kind: str) -> Dataset:
    """`images/` and the folder of depth maps as one set."""
    records = []
    for record in scan_folder(root / "images"):
        depth = (root / kind / record.item.name).with_suffix(".png")
        if not depth.is_file():
            raise InputError(f"{depth}: nothing there; wanted the depth of images/{record.item.name}")
        records.append(Record(record.item, {IMAGE: record.members[IMAGE], kind: Member(str(depth))}))
    return Dataset(records, name=str(root))


def read_depth_m(dataset: Dataset, row: int) -> np.ndarray:
    """Measured depth of one item, float32 [H, W] in metres (or pixels of disparity), 0 where unknown; cut like the image.

    Raises InputError for anything else.
    """
    name = dataset.items[row].name
    if isinstance(dataset, LabelledDataset):
        return dataset.depth(dataset.measured_m(row), row)
    kind = depth_kind(dataset._records[row])
    try:
        with Image.open(io.BytesIO(dataset.read_member(row, kind)), formats=["PNG"]) as image:
            if image.width * image.height > DEFAULT_LIMITS.max_pixels:
                raise InputError(f"{name}: its depth map has {image.width} x {image.height} pixels, more than allowed")
            if not image.mode.startswith("I"):
                raise InputError(f"{name}: its depth map is of mode {image.mode}; wanted a 16-bit PNG in millimetres")
            steps = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: its depth map cannot be decoded ({error})") from error
    _check_shape(steps.shape, upright_hw(dataset.read(row), name), name)
    depth_HW = steps.astype(np.float32) / STEPS[kind]
    return dataset.depth(depth_HW, row) if isinstance(dataset, CutDataset) else depth_HW


def _check_shape(depth_hw: tuple[int, ...], image_hw: tuple[int, int], name: str) -> None:
    """Raise InputError where a depth map cannot be the image's: of another shape, though it may be smaller or larger."""
    (height, width), (image_height, image_width) = depth_hw, image_hw
    off_px = min(abs(width - height * image_width / image_height), abs(height - width * image_height / image_width))
    if off_px > 1:
        raise InputError(
            f"{name}: its depth map has {width} x {height} pixels, the image {image_width} x {image_height}; wanted one shape "
            "(the size may differ), and the image without a rotation noted in its EXIF"
        )
