"""NYU Depth V2's labelled part as its authors distribute it in, its 795 training and 654 test images with depth out.

    ROOT/nyu_depth_v2_labeled.mat   HDF5, MATLAB's arrays with their axes reversed: images [N,3,640,480] uint8, rawDepths
                                    [N,640,480] float32 in metres (0: nothing measured), scenes [1,N] (a text's address each)
    ROOT/splits.mat                 trainNdxs, testNdxs, counted from 1

The test images of the lists that others use were cut out of this file: measured depth as it is (`depths`, which is filled in, is not
read), and a black frame around the image, where the camera's undistorted picture has none. So is it here.
"""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.decode import DEFAULT_LIMITS, DecodeLimits
from data.errors import InputError
from data.listings import IMAGE, Item, Record
from data.members import Member, content_mark
from evaluators.depth_cuts import DEPTH, NYU_HW, Cut, CutDataset

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
FRAMED = (slice(7, 474), slice(7, 632))
"""Rows and columns within the black frame of the lists' images."""
PLACE = "place"
"""Column with an image's index in the file."""


class LabelledDataset(CutDataset):
    """Images and depth in one .mat file, read one by one."""

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """The part of image i that is seen. Raises InputError for a file that cannot be read."""
        pixels_HWC = np.zeros((*NYU_HW, 3), np.uint8)
        pixels_HWC[FRAMED] = self._read("images", i, (3, NYU_HW[1], NYU_HW[0]))[FRAMED]
        return np.ascontiguousarray(self._cut(pixels_HWC, i))

    def measured_m(self, i: int) -> np.ndarray:
        """Depth of the whole image i, float32 [H, W] in metres, 0 where unknown. Raises InputError."""
        return self._read("rawDepths", i, (NYU_HW[1], NYU_HW[0])).astype(np.float32)

    def _read(self, name: str, i: int, shape: tuple[int, ...]) -> np.ndarray:
        path = Path(self._records[i].members[IMAGE].path)
        with opened(path) as file:
            found = np.asarray(file[name][int(self.items[i].row[PLACE])])
        if found.shape != shape:
            raise InputError(f"{path}: {name} has shape {found.shape} an image, wanted {shape}; download it again")
        return found.T

    def subset(self, indices: Iterable[int]) -> "LabelledDataset":
        """As `Dataset.subset`."""
        return LabelledDataset([self._records[int(i)] for i in indices], self._cuts, self.name, self.classes)

    def _fingerprint_now(self) -> str:
        """The file is read once for all of its images."""
        marks = sorted({record.members[IMAGE].path for record in self._records})
        lines = [content_mark(Member(path)) for path in marks]
        lines += [f"{item.name}\0{item.split}\0{item.row[PLACE]}" for item in self.items]
        return f"nyud-{len(self)}-{zlib.crc32(chr(10).join(lines).encode()):08x}"


def open_labelled(root: Path, cuts: dict[str, Cut]) -> LabelledDataset:
    """The labelled part below `root`. Raises InputError for files that are missing, damaged or of another shape."""
    path, listed = root / MAT, root / SPLITS
    if not listed.is_file():
        raise InputError(f"{listed}: nothing there; wanted the split that belongs to {MAT}")
    places = _split_places(listed)
    with opened(path) as file:
        missing = [name for name in ("images", "rawDepths", "scenes") if name not in file]
        if missing:
            raise InputError(f"{path}: no {' and no '.join(missing)} in it; wanted NYU Depth V2's labelled part")
        n = len(file["images"])
        if not len(file["rawDepths"]) == file["scenes"].shape[-1] == n:
            raise InputError(f"{path}: {n} images, but not as many depth maps and scenes; download it again")
        scenes = ["".join(map(chr, np.asarray(file[address]).ravel())) for address in np.ravel(file["scenes"])]
    records: list[Record] = []
    for split, rows in places.items():
        if rows and not 0 <= min(rows) <= max(rows) < n:
            raise InputError(
                f"{listed}: names image {max(rows) + 1} of the {n} in {MAT}; wanted the two that belong together"
            )
        members = {IMAGE: Member(str(path)), DEPTH: Member(str(path))}
        records += [
            Record(Item(f"{split}/{row:04d}", None, split, {"scene": scenes[row], PLACE: str(row)}), members)
            for row in rows
        ]
    return LabelledDataset(records, cuts, str(root))


def _split_places(listed: Path) -> dict[str, Sequence[int]]:
    from scipy.io import loadmat  # large, and needed for such files alone

    try:
        found = loadmat(str(listed), variable_names=["trainNdxs", "testNdxs"])
        return {
            split: [int(number) - 1 for number in np.ravel(found[name])]
            for split, name in (("train", "trainNdxs"), ("val", "testNdxs"))
        }
    except Exception as error:  # whatever a damaged file makes the library raise
        raise InputError(f"{listed}: cannot be read ({type(error).__name__}); wanted trainNdxs and testNdxs") from error


def opened(path: Path) -> Any:
    """The file, for a `with`. Raises InputError where it, or the library that reads it, is missing."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            f'{path}: is HDF5; pip install h5py (-c constraints.txt -e ".[hdf5]") to read it, or name a folder with NYUd\'s lists'
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: no readable HDF5 file ({str(error)[:80]}); download it again") from error
