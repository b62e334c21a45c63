"""A decoded image and a plan in, altered views of it out, on uint8 with OpenCV and torch's own resize.

Every operation is the one that the published code applies through Pillow, within a rounding or two of its result (tests/data/test_views.py
measures each beside Pillow). Views are uint8 [h,w,3]; `to_batch` turns them into tensors.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from data.crops import BlurKernel, CropSpec, blur_taps, plan_views, shrink_boxes, shrink_factor
from data.decode import decode_image
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD

SOLARIZE_FROM = 128
"""Shades from this one up are inverted."""
_SOLARIZE_TABLE = np.where(np.arange(256) < SOLARIZE_FROM, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
_SHADES = np.arange(256, dtype=np.float32)


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
    return [_make_view(image_HWC, step, spec.view_px(view), spec.blur_kernel) for view, step in enumerate(plan)]


def _make_view(image_HWC: np.ndarray, step: np.void, px: int, kernel: BlurKernel) -> np.ndarray:
    top, left, tall, wide = step["box"].tolist()
    out = resize(image_HWC[top : top + tall, left : left + wide], px)
    if step["flip"]:
        out = cv2.flip(out, 1)
    if step["jitter"]:
        amounts = step["amount"].tolist()
        for change in step["order"].tolist():
            out = _CHANGES[change](out, amounts[change])
    if step["gray"]:
        out = _gray(out)
    if step["sigma_px"] > 0:
        out = gaussian_blur(out, float(step["sigma_px"]), kernel)
    if step["solarize"]:
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
    return cv2.convertScaleAbs(image_HWC, alpha=factor)


def adjust_contrast(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean shade of gray: 0 is flat gray, 1 changes nothing."""
    mean = round(cv2.mean(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY))[0])
    table = np.clip(_SHADES * factor + mean * (1 - factor), 0, 255).astype(np.uint8)
    return cv2.LUT(image_HWC, table)


def adjust_saturation(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Blend with its own gray version: 0 is gray, 1 changes nothing."""
    return cv2.addWeighted(image_HWC, factor, _gray(image_HWC), 1 - factor, 0)


def adjust_hue(image_HWC: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(turn * 255) % 256)  # wraps around, as a circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _gray(image_HWC: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image_HWC: np.ndarray, sigma_px: float, kernel: BlurKernel) -> np.ndarray:
    """Blur both ways. Beyond the border Pillow repeats the last pixel, torchvision mirrors at it."""
    taps = blur_taps(sigma_px, kernel)
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
    pixels_BCHW = stacked.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean_C11, std_C11 = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    out = torch.empty(pixels_BCHW.shape, dtype=torch.float32, device=device)
    return torch.addcmul(-mean_C11 / std_C11, pixels_BCHW, 1 / (255 * std_C11), out=out)
