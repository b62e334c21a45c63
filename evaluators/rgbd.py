"""Images with a measured depth: any RGB-D set named on a command line in, its two parts and depth maps in metres out.

Depth lies beside each image as a 16-bit PNG in millimetres, 0 where nothing was measured: a packed set or tar shards
with the kind `depth_mm`, a CSV with a column `depth_mm`, or a folder with `images/` and `depth_mm/` that hold files of
the same names (`images/train/a.jpg`, `depth_mm/train/a.png`).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from data.datasets import Dataset, open_dataset
from data.decode import DEFAULT_LIMITS
from data.errors import InputError
from data.listings import IMAGE, Record, scan_folder
from data.members import Member
from evaluators.splits import Splits, split_dataset

DEPTH = "depth_mm"
"""Kind of the depth file, and its unit."""
GROUP_COLUMNS = ("scene", "room", "objects")
"""Columns that tie views of one scene together, before those of `splits`; `objects` lists what stands in a rendered room."""


def open_rgbd(
    data: str | Path, train_split: str | None = None, val_split: str | None = None, group_by: str = "auto"
) -> Splits:
    """Open a set and take its two parts. Raises InputError where an image has no depth file."""
    root = Path(data)
    dataset = _folder_pair(root) if (root / "images").is_dir() and (root / DEPTH).is_dir() else open_dataset(data)
    if DEPTH not in dataset.kinds:
        raise InputError(
            f"{data}: not every image has a depth map (kinds: {', '.join(dataset.kinds)}); wanted 16-bit PNG in "
            "millimetres: images/ with depth_mm/, a CSV column `depth_mm`, or a packed set with the kind depth_mm"
        )
    if group_by == "auto":
        columns = dataset.items[0].row if dataset.items else {}
        group_by = next((name for name in GROUP_COLUMNS if name in columns), group_by)
    return split_dataset(dataset, train_split, val_split, group_by)


class MeasuredDepth(Sequence[np.ndarray]):
    """The depth maps of some rows of a set, read when they are asked for."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]) -> None:
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "MeasuredDepth": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | MeasuredDepth":
        if isinstance(index, slice):
            return MeasuredDepth(self._dataset, self._rows[index])
        return read_depth_m(self._dataset, self._rows[index])


def _folder_pair(root: Path) -> Dataset:
    """`images/` and `depth_mm/` as one set."""
    records = []
    for record in scan_folder(root / "images"):
        depth = (root / DEPTH / record.item.name).with_suffix(".png")
        if not depth.is_file():
            raise InputError(f"{depth}: nothing there; wanted the depth of images/{record.item.name}")
        records.append(Record(record.item, {IMAGE: record.members[IMAGE], DEPTH: Member(str(depth))}))
    return Dataset(records, name=str(root))


def read_depth_m(dataset: Dataset, row: int) -> np.ndarray:
    """Measured depth of one item, float32 [H, W] in metres, 0 where unknown. Raises InputError for anything else."""
    name = dataset.items[row].name
    try:
        with Image.open(io.BytesIO(dataset.read_member(row, DEPTH)), formats=["PNG"]) as image:
            if image.width * image.height > DEFAULT_LIMITS.max_pixels:
                raise InputError(f"{name}: its depth map has {image.width} x {image.height} pixels, more than allowed")
            if not image.mode.startswith("I"):
                raise InputError(f"{name}: its depth map is of mode {image.mode}; wanted a 16-bit PNG in millimetres")
            millimetres = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: its depth map cannot be decoded ({error})") from error
    return millimetres.astype(np.float32) / 1000
