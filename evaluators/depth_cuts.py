"""Images and depth maps of benchmarks in, the part that the published protocols show the network out."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from data.datasets import Dataset
from data.decode import DEFAULT_LIMITS, DecodeLimits
from data.errors import InputError
from data.listings import Record

DEPTH, DEPTH_256, DISPARITY = "depth_mm", "depth_256", "disparity_x64"
"""Kinds of depth file, and their units."""
Cut = Literal["nyu", "kitti"]
NYU_BORDER = (slice(45, 472), slice(43, 608))
NYU_HW = (480, 640)
KB_HW = (352, 1216)


class CutDataset(Dataset):
    """Images of which only a part is seen. `cuts`: which of them, by split; others are seen whole."""

    def __init__(
        self, records: Sequence[Record], cuts: dict[str, Cut], name: str, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(records, classes, name)
        self._cuts = cuts

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """The part of image i that is seen. Raises DecodeError, and InputError for a size that is not the benchmark's."""
        return np.ascontiguousarray(self._cut(super().image(i, limits), i))

    def depth(self, depth_HW: np.ndarray, i: int) -> np.ndarray:
        """The same part of its depth map."""
        return self._cut(depth_HW, i)

    def _cut(self, array: np.ndarray, i: int) -> np.ndarray:
        cut = self._cuts.get(str(self.items[i].split))
        height, width = array.shape[:2]
        if cut == "nyu":
            if (height, width) != NYU_HW:
                raise InputError(f"{self.items[i].name}: {width} x {height} pixels; wanted 640 x 480 as NYUd has")
            return array[NYU_BORDER]
        if cut == "kitti":
            if height < KB_HW[0] or width < KB_HW[1]:
                raise InputError(
                    f"{self.items[i].name}: {width} x {height} pixels; wanted at least 1216 x 352, as KITTI has"
                )
            top, left = height - KB_HW[0], (width - KB_HW[1]) // 2
            return array[top : top + KB_HW[0], left : left + KB_HW[1]]
        return array

    def subset(self, indices: Iterable[int]) -> "CutDataset":
        """As `Dataset.subset`."""
        return CutDataset([self._records[int(i)] for i in indices], self._cuts, self.name, self.classes)

    def fingerprint(self) -> str:
        """As `Dataset.fingerprint`, and different for other cuts."""
        return f"{super().fingerprint()}-{'-'.join(f'{split}.{cut}' for split, cut in sorted(self._cuts.items()))}"
