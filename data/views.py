"""A decoded image and a plan in, altered views of it out, on uint8 with OpenCV and torch's own resize.

Every operation is the one that the published code applies through Pillow, within a rounding or two of its result (tests/data/test_views.py
measures each beside Pillow). Views are uint8 [h,w,3]; `to_batch` turns them into tensors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from data.crops import BlurKernel, CropSpec, blur_taps, plan_views, shrink_boxes, shrink_factor
from data.decode import decode_image
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD, shade_tables

LUMA = (0.299, 0.587, 0.114)
"""Red, green and blue in a shade of gray (ITU-R BT.601)."""
_CUT = -0.499
"""Added before OpenCV rounds: Pillow, when it blends, cuts fractions off."""
_TO_ITSELF = np.column_stack([np.eye(3), [_CUT] * 3])
_TO_GRAY = np.column_stack([[LUMA] * 3, [_CUT] * 3])
SOLARIZE_FROM = 128
"""Shades from this one up are inverted."""
_SOLARIZE_TABLE = np.where(np.arange(256) < SOLARIZE_FROM, np.arange(256), 255 - np.arange(256)).astype(np.uint8)


def decode_and_plan(data: bytes, spec: CropSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The image of an encoded file, uint8 [H,W,3], and the plan of its views, PLAN [V].

    A JPEG that is so large that every view shrinks it by two or more is decoded to a half, a quarter or an eighth of its size, which takes
    a fraction of the time. Raises DecodeError.
    """
    plan = np.empty(0)
    factor = 1

    def shrink(height: int, width: int) -> int:
        nonlocal plan, factor
        plan = plan_views(height, width, spec, rng)
        factor = shrink_factor(plan, spec)
        return factor

    image = decode_image(data, shrink=shrink)
    if factor > 1:
        shrink_boxes(plan, factor, *image.shape[:2])
    return image, plan


def make_views(image_HWC: np.ndarray, spec: CropSpec, rng: np.random.Generator) -> list[np.ndarray]:
    """Views of a uint8 [H,W,3] image: two of `global_px`, then `n_local` of `local_px`, each uint8 [h,w,3]."""
    return carry_out(image_HWC, plan_views(image_HWC.shape[0], image_HWC.shape[1], spec, rng), spec)


def carry_out(image_HWC: np.ndarray, plan: np.ndarray, spec: CropSpec) -> list[np.ndarray]:
    """The views that `plan` describes, each uint8 [h,w,3]."""
    return [
        _make_view(image_HWC, step, spec.view_px(view), spec.blur_kernel) for view, step in enumerate(plan.tolist())
    ]


def _make_view(image_HWC: np.ndarray, step: tuple[Any, ...], px: int, kernel: BlurKernel) -> np.ndarray:
    (top, left, tall, wide), flip, jitter, amounts, order, gray, sigma_px, solarize = step
    out = resize(image_HWC[top : top + tall, left : left + wide], px)
    if flip:
        out = cv2.flip(out, 1)
    if jitter:
        for change in order:
            out = _CHANGES[change](out, float(amounts[change]))
    if gray:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if sigma_px > 0:
        out = gaussian_blur(out, sigma_px, kernel)
    if solarize:
        out = cv2.LUT(out, _SOLARIZE_TABLE)
    return out


def resize(image_HWC: np.ndarray, side_px: int) -> np.ndarray:
    """Squash to a square, bicubic and without aliasing: Pillow's result, at most two shades off."""
    # torch's own unsqueeze gives the strides by which it recognises interleaved colours, for which it has fast code; NumPy's does not
    pixels_1HWC = torch.from_numpy(np.ascontiguousarray(image_HWC)).unsqueeze(0)
    size = (side_px, side_px)
    out = interpolate(pixels_1HWC.permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def adjust_brightness(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 changes nothing."""
    return cv2.convertScaleAbs(image_HWC, alpha=factor, beta=_CUT)


def adjust_contrast(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean shade of gray: 0 is flat gray, 1 changes nothing."""
    mean = round(sum(share * shade for share, shade in zip(LUMA, cv2.mean(image_HWC), strict=False)))
    return cv2.addWeighted(image_HWC, factor, image_HWC, 0, mean * (1 - factor) + _CUT)


def adjust_saturation(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with its own gray version: 0 is gray, 1 changes nothing."""
    return cv2.transform(image_HWC, factor * _TO_ITSELF + (1 - factor) * _TO_GRAY)


def adjust_hue(image_HWC: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2HSV_FULL)
    height, width = hsv.shape[:2]
    # whole rows of (turn, 0, 0) are added several times as fast as to every third byte; a sum wraps around, as a circle does
    rows = hsv.reshape(height, 3 * width)
    rows += _hue_row(round(turn * 255) % 256, width)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@lru_cache(maxsize=1024)
def _hue_row(turn: int, width: int) -> np.ndarray:
    return np.tile(np.array([turn, 0, 0], np.uint8), width)


_CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_blur(image_HWC: np.ndarray, sigma_px: float, kernel: BlurKernel) -> np.ndarray:
    """Blur both ways. Beyond the border Pillow repeats the last pixel, torchvision mirrors at it."""
    taps = blur_taps(sigma_px, kernel).astype(np.float32)
    border = cv2.BORDER_REPLICATE if kernel == "boxes" else cv2.BORDER_REFLECT_101
    return cv2.sepFilter2D(image_HWC, -1, taps, taps, borderType=border)


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
    if torch.device(device).type == "cpu":
        return _looked_up(stacked.numpy(), mean, std)
    pixels_BCHW = stacked.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean_C11, std_C11 = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    out = torch.empty(pixels_BCHW.shape, dtype=torch.float32, device=device)
    return torch.addcmul(-mean_C11 / std_C11, pixels_BCHW, 1 / (255 * std_C11), out=out)


def _looked_up(views_BHWC: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The same by a table of 256 values a channel, which a CPU does in half the time."""
    out_BCHW = np.empty((len(views_BHWC), 3, *views_BHWC.shape[1:3]), np.float32)
    tables = shade_tables(tuple(mean), tuple(std))
    for view_HWC, out_CHW in zip(views_BHWC, out_BCHW, strict=True):
        for channel_HW, table, out_HW in zip(cv2.split(view_HWC), tables, out_CHW, strict=True):
            cv2.LUT(channel_HW, table, dst=out_HW)
    return torch.from_numpy(out_BCHW)
