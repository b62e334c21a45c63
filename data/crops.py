"""Multi-crop: how large an image is in, the plan of a few altered views of it out.

The distribution is DINO's (Caron et al. 2021 and the authors' training script): two global views and several local
ones, each a random part of the image, mirrored, its colours shaken, blurred, now and then solarised. Everything is
drawn from the generator that is passed; each view takes a fixed number of draws, so that view k of an image does not
depend on what the views before it came to. A plan is plain numbers: `data/views.py` carries it out image by image on
uint8, `data/device_views.py` for a whole batch on the tensor's device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from data.errors import InputError

Range = tuple[float, float]
BlurKernel = Literal["boxes", "nine"]


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
    blur_kernel: BlurKernel = "boxes"
    """`boxes`: three box blurs of this deviation, which is what Pillow's radius means to DINO. `nine`: a Gaussian cut to nine pixels, as in
    DINOv2."""
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
        if self.blur_kernel not in get_args(BlurKernel):
            raise InputError(
                f"crops.blur_kernel is {self.blur_kernel!r}; wanted one of {', '.join(get_args(BlurKernel))}"
            )
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

PLAN = np.dtype(
    [
        ("box", np.int32, 4),  # top, left, height and width of the part, in pixels of the image
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("amount", np.float32, 4),  # factors of brightness, contrast and saturation; turn of the hue
        ("order", np.int8, 4),  # which of the four changes comes first, second...
        ("gray", np.bool_),
        ("sigma_px", np.float32),  # of the blur; 0 where there is none
        ("solarize", np.bool_),
    ]
)
"""What becomes of an image in one view."""


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of batch size, worker and order."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, index))))


def plan_views(height: int, width: int, spec: CropSpec, rng: np.random.Generator) -> np.ndarray:
    """The plan of each view of an image of this size, PLAN [V]: two global ones, then the local ones."""
    draws_VD = rng.random((spec.n_views, _DRAWS))
    kinds = np.minimum(np.arange(spec.n_views), 2)
    blurred = np.array([spec.blur_of(view) for view in range(3)])[kinds]
    low, high = spec.blur_sigma_px
    plan = np.empty(spec.n_views, PLAN)
    scales = [spec.global_scale] * 2 + [spec.local_scale] * spec.n_local
    places = draws_VD[:, _PLACE].reshape(-1, _CROP_TRIES, 4).tolist()
    plan["box"] = [crop_box(height, width, *of_view, spec.ratio) for of_view in zip(places, scales, strict=True)]
    plan["flip"] = draws_VD[:, _FLIP] < spec.flip
    plan["jitter"] = draws_VD[:, _JITTER] < spec.jitter
    widths = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    plan["amount"] = np.array([1, 1, 1, 0]) + widths * (2 * draws_VD[:, _AMOUNTS] - 1)
    plan["order"] = np.argsort(draws_VD[:, _ORDER], axis=1)
    plan["gray"] = draws_VD[:, _GRAY] < spec.gray
    plan["sigma_px"] = np.where(draws_VD[:, _BLUR] < blurred, low + (high - low) * draws_VD[:, _SIGMA], 0)
    plan["solarize"] = draws_VD[:, _SOLARIZE] < np.array(spec.solarize)[kinds]
    return plan


def crop_box(
    height: int, width: int, draws_T4: Sequence[Sequence[float]], scale: Range, ratio: Range
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part: area `scale` of the image, width over height within `ratio`.

    Each of the T tries takes four uniform draws; where none fits, the largest centred part of an allowed shape.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape, y, x in draws_T4:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(log_low + (log_high - log_low) * shape)
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(y * (height - tall + 1)), int(x * (width - wide + 1)), tall, wide
    tall = min(height, max(1, round(width / ratio[0])))
    wide = min(width, max(1, round(height * ratio[1])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def shrink_factor(plan: np.ndarray, spec: CropSpec) -> int:
    """By how much the image may be shrunk beforehand, 1, 2, 4 or 8: every part keeps at least the pixels of its view."""
    sides = np.array([spec.view_px(view) for view in range(len(plan))])
    spare = (plan["box"][:, 2:].min(axis=1) / sides).min()
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(spare, 1))


def shrink_boxes(plan: np.ndarray, factor: int, height: int, width: int) -> None:
    """Move the parts of `plan` to the image that has been shrunk by `factor` to `height` x `width`, to the nearest pixel."""
    first, length = (np.round(plan["box"][:, part] / factor).astype(np.int32) for part in (slice(2), slice(2, 4)))
    limit = np.array([height, width], np.int32)
    first = np.minimum(first, limit - 1)
    plan["box"] = np.concatenate([first, np.clip(length, 1, limit - first)], axis=1)


def blur_taps(sigma_px: float, kernel: BlurKernel) -> np.ndarray:
    """Weights of a one-dimensional blur, an odd number of them that sum to 1.

    `boxes` is Pillow's `GaussianBlur(radius)`: three box filters of fractional width that together have the variance radius^2 (Gwosdek et
    al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering"). `nine` is torchvision's `GaussianBlur(9)`.
    """
    if kernel == "nine":
        taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma_px) ** 2)
        return taps / taps.sum()
    variance = sigma_px**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.full(2 * whole + 3, 1 / (2 * whole + 1 + 2 * edge))
    box[[0, -1]] *= edge
    return np.convolve(np.convolve(box, box), box)
