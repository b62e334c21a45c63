"""Images with masks in, square parts of them out, as a data set and its masks: random crops to learn from, and sliding windows to test by.

After the training and test pipelines of the published heads (Oquab et al. 2023, section 7.4; the usual ones of ADE20K): a crop is cut from
the image at a random size, drawn again up to ten times while one class fills three quarters of it, mirrored half the time, its colours
changed; what it lacks is filled with the mean colour, and counts as void. Windows overlap; where they do, the mean of their logits decides.
Read in this order: Cut, CutImages, random_cuts, window_cuts, WindowTable.
Legend: n images, m cuts, P side of a cut in pixels, C classes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import overload

import cv2
import numpy as np
import torch
from torch import Tensor

from backbones.heads import SegmentationHead
from data.datasets import Dataset
from data.decode import DEFAULT_LIMITS, DecodeLimits
from data.errors import InputError
from data.preprocess import Preprocess
from evaluators.segmentation_data import VOID, MaskedImages
from evaluators.segmentation_probe import LogitMap, enlarged, square_grid

LONGEST = 4
"""The long side becomes at most so many times the wanted short one, as published (2048 for 512)."""
TRIES, ONE_CLASS = 10, 0.75
"""A crop is drawn again so often while one class fills more than this share of what is labelled in it."""
BRIGHTNESS, FACTOR, HUE = 32, (0.5, 1.5), 18
"""Changes of colour: what is added, by what contrast and saturation are multiplied, and degrees of 180 that the hue turns."""


@dataclass(frozen=True)
class Cut:
    """One square part of one image."""

    row: int
    """Row of the image."""
    scaled_hw: tuple[int, int]
    """Size that the image is brought to before."""
    top: int
    left: int
    mirrored: bool = False
    recolour: int | None = None
    """Seed of its changes of colour; None: none."""


class CutImages(Dataset):
    """Cuts as a data set: one item a cut, with the name, label and row of its image."""

    def __init__(self, images: MaskedImages, cuts: Sequence[Cut], px: int, preprocess: Preprocess) -> None:
        base = images.dataset
        super().__init__([base._records[cut.row] for cut in cuts], base.classes, base.name)
        self.images, self.cuts, self.px = images, cuts, px
        self._fill = tuple(round(255 * shade) for shade in preprocess.mean)

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """As `Dataset.image`, uint8 [P, P, 3]."""
        cut, image_HWC = self.cuts[i], super().image(i, limits)
        height, width = cut.scaled_hw
        scaled_HWC = cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_LINEAR)
        part_HWC = np.array(scaled_HWC[cut.top : cut.top + self.px, cut.left : cut.left + self.px])
        if cut.recolour is not None:
            part_HWC = recoloured(part_HWC, np.random.default_rng(cut.recolour))
        square_HWC = np.empty((self.px, self.px, 3), np.uint8)
        square_HWC[:] = self._fill
        square_HWC[: part_HWC.shape[0], : part_HWC.shape[1]] = part_HWC
        return np.ascontiguousarray(square_HWC[:, ::-1]) if cut.mirrored else square_HWC

    def fingerprint(self) -> str:
        """Of the images and of how they are cut."""
        cuts = json.dumps([[asdict(cut) for cut in self.cuts], self.px, self._fill])
        return hashlib.sha256(f"{super().fingerprint()} {cuts}".encode()).hexdigest()


class CutMasks(Sequence[np.ndarray]):
    """The mask of each cut, int32 [P, P], read when it is asked for; `rows` are those of the cuts that could be decoded."""

    def __init__(self, cut: CutImages, rows: Sequence[int]) -> None:
        self._cut, self._rows = cut, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "CutMasks": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | CutMasks":
        if isinstance(index, slice):
            return CutMasks(self._cut, self._rows[index])
        cut, px = self._cut.cuts[self._rows[index]], self._cut.px
        images = self._cut.images
        scaled_HW = scaled_mask(images.mask(cut.row, images.image_hw(cut.row)), cut.scaled_hw)
        part_HW = scaled_HW[cut.top : cut.top + px, cut.left : cut.left + px]
        square_HW = np.full((px, px), VOID, np.int32)
        square_HW[: part_HW.shape[0], : part_HW.shape[1]] = part_HW
        return np.ascontiguousarray(square_HW[:, ::-1]) if cut.mirrored else square_HW


def scaled_mask(mask_HW: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """The mask at another size, each pixel the value of the nearest."""
    scaled: np.ndarray = cv2.resize(mask_HW, hw[::-1], interpolation=cv2.INTER_NEAREST)
    return scaled


def scaled_size(hw: tuple[int, int], short_px: float) -> tuple[int, int]:
    """Height and width with this short side, or with a long side of `LONGEST` times as much where that is less."""
    factor = min(short_px / min(hw), LONGEST * short_px / max(hw))
    return max(1, round(hw[0] * factor)), max(1, round(hw[1] * factor))


def random_cuts(images: MaskedImages, px: int, each: int, enlarge: tuple[float, float], seed: int) -> list[Cut]:
    """`each` random crops of every image; the same ones for an image's name, the crop's number, and the seed."""
    cuts = []
    for row, item in enumerate(images.dataset.items):
        try:
            mask_HW = images.mask(row, images.image_hw(row))
        except InputError:
            if _readable(images, row):
                raise
            mask_HW = np.full((1, 1), VOID, np.int32)  # it cannot be decoded either, which extraction counts
        for number in range(each):
            digest = hashlib.sha256(f"{seed}/{number}/{item.name}".encode("utf-8", "surrogateescape")).digest()
            cuts.append(_random_cut(row, mask_HW, px, enlarge, np.random.default_rng(list(digest[:8]))))
    return cuts


def _random_cut(row: int, mask_HW: np.ndarray, px: int, enlarge: tuple[float, float], rng: np.random.Generator) -> Cut:
    hw = scaled_size((mask_HW.shape[0], mask_HW.shape[1]), px * rng.uniform(*enlarge))
    scaled_HW = scaled_mask(mask_HW, hw)
    top = left = 0
    for _ in range(TRIES):
        top, left = (int(rng.integers(0, max(side - px, 0) + 1)) for side in hw)
        part = scaled_HW[top : top + px, left : left + px]
        counts = np.bincount(part[part >= 0])
        if np.count_nonzero(counts) > 1 and counts.max() < ONE_CLASS * counts.sum():
            break
    return Cut(row, hw, top, left, bool(rng.random() < 0.5), int(rng.integers(0, 2**31)))


def window_cuts(images: MaskedImages, px: int, stride: float, scale: float) -> list[Cut]:
    """Windows that slide over every image at this scale; the last of a row or column ends at the border."""
    cuts = []
    for row in range(len(images.dataset)):
        try:
            hw = scaled_size(images.image_hw(row), px * scale)
        except InputError:  # it has no header that can be read, and will be counted as broken
            hw = (px, px)
        down, across = (window_starts(side, px, max(1, round(stride * px))) for side in hw)
        cuts += [Cut(row, hw, top, left) for top in down for left in across]
    return cuts


def window_starts(side: int, px: int, stride: int) -> list[int]:
    """Where windows begin along one side."""
    steps = max(side - px + stride - 1, 0) // stride + 1
    return [max(min(step * stride, side - px), 0) for step in range(steps)]


def recoloured(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue each changed half the time, contrast first or last (Liu et al. 2016)."""

    def contrast(one_HWC: np.ndarray) -> np.ndarray:
        return one_HWC * rng.uniform(*FACTOR) if rng.random() < 0.5 else one_HWC

    changed = image_HWC.astype(np.float32)
    if rng.random() < 0.5:
        changed = np.clip(changed + rng.uniform(-BRIGHTNESS, BRIGHTNESS), 0, 255)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        changed = np.clip(contrast(changed), 0, 255)
    hsv = cv2.cvtColor(changed.astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.float32)
    if rng.random() < 0.5:
        hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(*FACTOR), 0, 255)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.integers(-HUE, HUE)) % 180
    changed = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    if not contrast_first:
        changed = np.clip(contrast(changed), 0, 255)
    return changed.astype(np.uint8)


def _readable(images: MaskedImages, row: int) -> bool:
    try:
        images.dataset.image(row)
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class WindowTable:
    """Test images, one row each, and the patches of the windows over them."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    masks: Sequence[np.ndarray]
    patches_mND: np.ndarray
    windows: tuple[tuple[tuple[int, Cut], ...], ...]
    """Of each image: rows of `patches_mND`, and what they show."""
    px: int

    def logit_map(self, head: SegmentationHead, row: int) -> LogitMap:
        """What the head says of one image: the mean over its windows."""
        parts: list[tuple[Cut, Tensor]] = []
        for place, cut in self.windows[row]:
            patches = torch.from_numpy(np.array(self.patches_mND[place : place + 1]))
            parts.append((cut, head.logits(patches, square_grid(patches.shape[1]))))
        height, width = parts[0][0].scaled_hw

        def of_classes(hw: tuple[int, int], classes: slice) -> Tensor:
            n_classes = parts[0][1][:, classes].shape[1]
            total = torch.zeros(n_classes, max(height, self.px), max(width, self.px))
            times = torch.zeros(total.shape[1:])
            for cut, logits in parts:
                here = (slice(cut.top, cut.top + self.px), slice(cut.left, cut.left + self.px))
                total[:, *here] += enlarged(logits[:, classes], (self.px, self.px))[0]
                times[here] += 1
            return enlarged((total / times)[None, :, :height, :width], hw)[0]

        return of_classes
