"""An image in, whether to drop it out: broken, too small, extreme in shape, near-constant; and hooks for what needs a model.

No model ships here. `--reject MODULE:FUNCTION` names a function of yours that takes an image, uint8 [H, W, 3], and says whether to drop it
(unsafe content, say); `--blur MODULE:FUNCTION` one that returns boxes (left, top, right, bottom; faces, say) that are blurred when the
curated images are written.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.datasets import Dataset
from data.decode import DecodeError
from data.errors import InputError

_SMALL = 64
Box = tuple[int, int, int, int]
Reject = Callable[[np.ndarray], bool]
FindBoxes = Callable[[np.ndarray], Sequence[Box]]


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """What is dropped before anything else."""

    min_side_px: int = 32
    """Images with a shorter side are dropped."""
    max_aspect: float = 4.0
    """Images longer than so many times their width, or wider, are dropped."""
    min_deviation: float = 4.0
    """Images whose shades of gray (0 to 255) deviate less from their mean are dropped as near-constant."""
    reject: str | None = None
    """MODULE:FUNCTION of yours: True for an image to drop."""

    def __post_init__(self) -> None:
        if self.min_side_px < 1 or self.max_aspect < 1 or self.min_deviation < 0:
            raise InputError(
                f"--min-side-px {self.min_side_px} --max-aspect {self.max_aspect} --min-deviation {self.min_deviation}: "
                "wanted at least 1, at least 1, and at least 0"
            )


@dataclass(frozen=True)
class Look:
    """What one image looks like, as far as the pixels tell."""

    width: int
    height: int
    reason: str
    """Why it is dropped; empty for an image that stays."""
    gray: np.ndarray | None
    """The image squashed to 64 x 64 shades of gray, uint8: what perceptual hashes are made from. None for a broken one."""


def look_at(dataset: Dataset, row: int, spec: FilterSpec, reject: Reject | None) -> Look:
    """Decode image `row` and judge it."""
    try:
        image_HWC = dataset.image(row)
    except DecodeError as error:
        return Look(0, 0, f"broken: {error.reason}", None)
    except InputError as error:  # a file that has gone, an archive that is cut
        return Look(0, 0, f"broken: {error}", None)
    height, width = image_HWC.shape[:2]
    small = cv2.resize(image_HWC, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA)
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    return Look(width, height, _reason(image_HWC, gray, spec, reject), gray)


def _reason(image_HWC: np.ndarray, gray: np.ndarray, spec: FilterSpec, reject: Reject | None) -> str:
    height, width = image_HWC.shape[:2]
    if min(height, width) < spec.min_side_px:
        return f"small: {width}x{height} px, wanted at least {spec.min_side_px}"
    aspect = max(height, width) / min(height, width)
    if aspect > spec.max_aspect:
        return f"shape: {aspect:.1f} times as long as wide, wanted at most {spec.max_aspect:g}"
    deviation = float(gray.std())
    if deviation < spec.min_deviation:
        return f"constant: shades deviate by {deviation:.1f}, wanted at least {spec.min_deviation:g}"
    if reject is not None and reject(image_HWC):
        return f"rejected by {spec.reject}"
    return ""


def load_hook(name: str | None, flag: str) -> Any:
    """The function that MODULE:FUNCTION names, looked up from the current folder too; None for None. Raises InputError."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{flag} {name}: cannot be imported ({error}); wanted MODULE:FUNCTION") from error
    if not callable(found):
        raise InputError(f"{flag} {name}: is no function; wanted MODULE:FUNCTION")
    return found


def blur_boxes(image_HWC: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy in which each box (left, top, right, bottom in pixels) is blurred beyond recognition."""
    out = image_HWC.copy()
    height, width = out.shape[:2]
    for left, top, right, bottom in boxes:
        left, right = max(0, int(left)), min(width, int(right))
        top, bottom = max(0, int(top)), min(height, int(bottom))
        if left < right and top < bottom:
            part = out[top:bottom, left:right]
            coarse = cv2.resize(part, (4, 4), interpolation=cv2.INTER_AREA)
            out[top:bottom, left:right] = cv2.resize(
                coarse, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR
            )
    return out
