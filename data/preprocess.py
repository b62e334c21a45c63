"""What a backbone wants to see: a decoded image in, a normalised array out. Stored in every manifest.

`center_view` is what embeddings, k-NN and every classification protocol see; `whole_view` is what maps (attention,
depth, segmentation) see. Evaluators and servers call these two functions and nothing else, so that what is evaluated
is what is served. Resizing is Pillow's antialiased filter, the reference of the published numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from data.errors import InputError

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue on a scale of 0 to 1."""
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)
"""Standard deviation of the same."""

MAX_VIEW_PX = 4096
"""Largest side of a view; beyond it a wrong number is likelier than a wish."""

Interpolation = Literal["bicubic", "bilinear"]
_FILTERS: dict[str, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From decoded pixels to network input. Raises InputError where a value makes no sense."""

    size_px: int = 224
    """Side of the centre view."""
    resize_px: int = 256
    """What the short side becomes before the centre is cut out."""
    whole_px: int = 224
    """Side of the whole view, unless the caller asks for another."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from red, green and blue, which lie in 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by afterwards."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize, antialiased."""

    def __post_init__(self) -> None:
        for name in ("size_px", "resize_px", "whole_px"):
            check_view_px(getattr(self, name), f"preprocess.{name}")
        if self.resize_px < self.size_px:
            raise InputError(
                f"preprocess.resize_px is {self.resize_px}, smaller than size_px {self.size_px}: "
                "the centre view would not fit into the resized image"
            )
        object.__setattr__(self, "mean", _three("mean", self.mean, lowest=0.0))
        object.__setattr__(self, "std", _three("std", self.std, lowest=1e-6))
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"preprocess.interpolation is {self.interpolation!r:.40}; wanted one of {list(_FILTERS)}")

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The opposite of `to_json`. Raises InputError on a missing field, an unknown one or a value out of range."""
        if not isinstance(values, Mapping):
            raise InputError(f"preprocess is a {type(values).__name__}; wanted an object with named fields")
        wanted = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(wanted - set(values)):
            raise InputError(f"preprocess lacks {', '.join(missing)}; wanted {', '.join(sorted(wanted))}")
        if unknown := sorted(map(str, set(values) - wanted)):
            raise InputError(f"preprocess has unknown {', '.join(unknown)}; wanted only {', '.join(sorted(wanted))}")
        return cls(**values)


def check_view_px(value: object, name: str = "the view's size") -> int:
    """`value` as a side in pixels. Raises InputError unless it is a whole number from 1 to MAX_VIEW_PX."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_VIEW_PX:
        raise InputError(f"{name} is {value!r:.40}; wanted a whole number of pixels from 1 to {MAX_VIEW_PX}")
    return value


def center_view(image_HWC: np.ndarray, pre: Preprocess) -> np.ndarray:
    """The middle square after the short side is resized to `resize_px`: uint8 [H,W,3] in, float32 [3,S,S] out.

    Geometry of the usual evaluation transform: the long side is rounded down, the crop's corner to the nearest pixel.
    Only the part that is kept gets resized, so that a strip of 2 x 1,000,000 pixels costs no more than a photograph.
    """
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    new_height, new_width = (int(pre.resize_px * side / short) for side in (height, width))
    top, left = (round((side - pre.size_px) / 2.0) for side in (new_height, new_width))
    step_y, step_x = height / new_height, width / new_width
    box = (left * step_x, top * step_y, (left + pre.size_px) * step_x, (top + pre.size_px) * step_y)
    return normalise(_resize(image_HWC, pre.size_px, pre, box), pre)


def whole_view(image_HWC: np.ndarray, pre: Preprocess, size_px: int | None = None) -> np.ndarray:
    """The whole image squashed to a square of `size_px` (default `pre.whole_px`): float32 [3,S,S]."""
    side = pre.whole_px if size_px is None else check_view_px(size_px, "size")
    return normalise(_resize(image_HWC, side, pre, None), pre)


def fit_view(image_HWC: np.ndarray, pre: Preprocess, longest_px: int) -> np.ndarray:
    """The whole image with its own aspect, shrunk (never enlarged) until its long side fits: float32 [3,H,W].

    Lanczos, as DINO's retrieval evaluation. Sides need not be multiples of a patch.
    """
    check_view_px(longest_px, "size")
    image = Image.fromarray(image_HWC)
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return normalise(np.asarray(image), pre)


def box_view(image_HWC: np.ndarray, pre: Preprocess, box: tuple[float, float, float, float]) -> np.ndarray:
    """What lies within a box (left, upper, right, lower, px), squashed to the size of a centre view: float32 [3,S,S]."""
    return normalise(_resize(image_HWC, pre.size_px, pre, box), pre)


def normalise(image_HWC: np.ndarray, pre: Preprocess) -> np.ndarray:
    """uint8 [H,W,3] to float32 [3,H,W]: (x / 255 - mean) / std by a table of 256 values a channel, so exactly."""
    tables = shade_tables(pre.mean, pre.std)
    out_CHW = np.empty((3, *image_HWC.shape[:2]), np.float32)
    for channel in range(3):
        np.take(tables[channel], image_HWC[:, :, channel], out=out_CHW[channel], mode="clip")
    return out_CHW


@lru_cache(maxsize=64)
def shade_tables(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each shade of each channel is normalised to, float32 [3,256]."""
    shades = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.stack([(shades - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])


def _resize(
    image_HWC: np.ndarray, side: int, pre: Preprocess, box: tuple[float, float, float, float] | None
) -> np.ndarray:
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise InputError(f"a view is made of uint8 [H,W,3], not {image_HWC.dtype} {list(image_HWC.shape)}")
    if box is not None:  # rounding may reach past the border by the last bit
        height, width = image_HWC.shape[:2]
        box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))
    resized = Image.fromarray(image_HWC).resize((side, side), _FILTERS[pre.interpolation], box=box)
    return np.asarray(resized)


def _three(name: str, values: Any, lowest: float) -> tuple[float, float, float]:
    good = (
        isinstance(values, tuple | list)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and all(math.isfinite(v) and lowest <= v <= 1.0 for v in values)
    )
    if not good:
        raise InputError(f"preprocess.{name} is {values!r:.80}; wanted three numbers from {lowest:g} to 1")
    return tuple(float(v) for v in values)  # type: ignore[return-value]
