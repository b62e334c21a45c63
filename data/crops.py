"""Multi-crop: one image in, a few altered views of it out, on uint8 with OpenCV.

The distribution is DINO's (Caron et al. 2021 and the authors' training script): two global views and several local
ones, each a random part of the image, mirrored, its colours shaken, blurred, now and then solarised. Everything is
drawn from the generator that is passed; each view takes a fixed number of draws, so that view k of an image does not
depend on what the views before it came to. Views are uint8 [h,w,3]; `to_batch` turns them into tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch

from data.errors import InputError
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """How views are cut and altered. Defaults: DINO on 224-pixel images."""

    global_px: int = 224
    """Side of a global view."""
    local_px: int = 96
    """Side of a local view."""
    n_local: int = 8
    """Local views an image. 0 turns multi-crop off; then widen `global_scale`."""
    global_scale: Range = (0.4, 1.0)
    """Smallest and largest area of a global view, as a share of the image."""
    local_scale: Range = (0.05, 0.4)
    """The same for a local view."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest width over height of the part that is cut, drawn evenly on a log scale."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: float = 0.8
    """Probability of changing brightness, contrast, saturation and hue, in random order."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Half-width of each change: factors lie in 1 ± it, the hue turns by at most this share of the colour circle."""
    gray: float = 0.2
    """Probability of dropping the colours."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of blurring the first global view, the second, a local one, as the papers print it."""
    blur_as: Literal["paper", "released"] = "paper"
    """`released`: with one minus that probability, as the DINOv2 code does and its weights were trained; see `blur_of`."""
    blur_sigma_px: Range = (0.1, 2.0)
    """Deviation of the blur, drawn evenly."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of inverting all values from 128 up: first global view, second, a local one."""

    def __post_init__(self) -> None:
        for name, lowest in (("global_px", 8), ("local_px", 8), ("n_local", 0)):
            if getattr(self, name) < lowest:
                raise InputError(f"crops.{name} is {getattr(self, name)}; wanted at least {lowest}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise InputError(f"crops.{name} is {(low, high)}; wanted two rising shares in (0, 1]")
        for name in ("ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(f"crops.{name} is {(low, high)}; wanted two rising numbers above 0")
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            value = getattr(self, name)
            if not all(0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))):
                raise InputError(f"crops.{name} is {value}; wanted probabilities from 0 to 1")
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"crops.{name} is {getattr(self, name)}; wanted 0 to {most:g}")

    @property
    def n_views(self) -> int:
        """Views an image gives: two global ones, then the local ones."""
        return 2 + self.n_local

    def blur_of(self, view: int) -> float:
        """Probability that view number `view` is blurred.

        The released DINOv2 passes `p` where its transform takes the probability of *not* blurring: its first global view never is, its
        second almost always.
        """
        printed = self.blur[min(view, 2)]
        return 1 - printed if self.blur_as == "released" else printed

    def view_px(self, view: int) -> int:
        """Side of view number `view`, in pixels."""
        return self.global_px if view < 2 else self.local_px


# One row of uniform draws a view, by meaning; a fixed layout keeps views independent of each other's settings.
_FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(6)
_AMOUNTS = slice(6, 10)
_ORDER = slice(10, 14)
_PLACE = slice(14, 54)
_DRAWS = 54
_CROP_TRIES = 10

_SOLARIZE_TABLE = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
_SHADES = np.arange(256, dtype=np.float32)


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of batch size, worker and order."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, index))))


def make_views(image_HWC: np.ndarray, spec: CropSpec, rng: np.random.Generator) -> list[np.ndarray]:
    """Views of a uint8 [H,W,3] image: two of `global_px`, then `n_local` of `local_px`, each uint8 [h,w,3]."""
    draws_VD = rng.random((spec.n_views, _DRAWS))
    return [_make_view(image_HWC, spec, view, draws_VD[view]) for view in range(spec.n_views)]


def _make_view(image_HWC: np.ndarray, spec: CropSpec, view: int, draws: np.ndarray) -> np.ndarray:
    scale = spec.global_scale if view < 2 else spec.local_scale
    height, width = image_HWC.shape[:2]
    top, left, tall, wide = crop_box(height, width, scale, spec.ratio, draws[_PLACE].reshape(_CROP_TRIES, 4))
    out = resize(image_HWC[top : top + tall, left : left + wide], spec.view_px(view))
    if draws[_FLIP] < spec.flip:
        out = cv2.flip(out, 1)
    if draws[_JITTER] < spec.jitter:
        out = _jitter(out, spec, draws[_AMOUNTS], draws[_ORDER])
    if draws[_GRAY] < spec.gray:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    kind = min(view, 2)
    if draws[_BLUR] < spec.blur_of(view):
        low, high = spec.blur_sigma_px
        out = gaussian_blur(out, low + (high - low) * draws[_SIGMA])
    if draws[_SOLARIZE] < spec.solarize[kind]:
        out = cv2.LUT(out, _SOLARIZE_TABLE)
    return out


def crop_box(height: int, width: int, scale: Range, ratio: Range, draws_T4: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part: area `scale` of the image, width over height within `ratio`.

    Each of the T tries takes four uniform draws; where none fits, the largest centred part of an allowed shape.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape, y, x in draws_T4.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(log_low + (log_high - log_low) * shape)
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(y * (height - tall + 1)), int(x * (width - wide + 1)), tall, wide
    tall = min(height, max(1, round(width / ratio[0])))
    wide = min(width, max(1, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resize(image_HWC: np.ndarray, side_px: int) -> np.ndarray:
    """Squash to a square: by area where it shrinks to less than half (no aliasing), else bicubic."""
    height, width = image_HWC.shape[:2]
    shrinks = max(height, width) > 2 * side_px and min(height, width) >= side_px
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image_HWC, (side_px, side_px), interpolation=method)


def _jitter(image_HWC: np.ndarray, spec: CropSpec, amounts: np.ndarray, order: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation, hue = (2 * amounts - 1).tolist()
    for change in np.argsort(order).tolist():
        if change == 0:
            image_HWC = adjust_brightness(image_HWC, 1 + spec.brightness * brightness)
        elif change == 1:
            image_HWC = adjust_contrast(image_HWC, 1 + spec.contrast * contrast)
        elif change == 2:
            image_HWC = adjust_saturation(image_HWC, 1 + spec.saturation * saturation)
        else:
            image_HWC = adjust_hue(image_HWC, spec.hue * hue)
    return image_HWC


def adjust_brightness(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 changes nothing."""
    return cv2.convertScaleAbs(image_HWC, alpha=factor)


def adjust_contrast(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean shade of gray: 0 is flat gray, 1 changes nothing."""
    mean = round(cv2.mean(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY))[0])
    table = np.clip(_SHADES * factor + mean * (1 - factor), 0, 255).astype(np.uint8)
    return cv2.LUT(image_HWC, table)


def adjust_saturation(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with its own gray version: 0 is gray, 1 changes nothing."""
    gray = cv2.cvtColor(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image_HWC, factor, gray, 1 - factor, 0)


def adjust_hue(image_HWC: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(turn * 255) % 256)  # wraps around, as a circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image_HWC: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur, window of three deviations either side."""
    window = 2 * math.ceil(3 * sigma_px) + 1
    return cv2.GaussianBlur(image_HWC, (window, window), sigma_px)


def to_batch(
    views: Sequence[np.ndarray] | torch.Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """B views of one size, uint8 [h,w,3] each (or a uint8 tensor [B,h,w,3]), to normalised float32 [B,3,h,w].

    The bytes move to `device` first: a quarter of the traffic.
    """
    stacked = views if isinstance(views, torch.Tensor) else torch.from_numpy(np.stack(list(views)))
    pixels_BCHW = stacked.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean_C11, std_C11 = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    out = torch.empty(pixels_BCHW.shape, dtype=torch.float32, device=device)
    return torch.addcmul(-mean_C11 / std_C11, pixels_BCHW, 1 / (255 * std_C11), out=out)
