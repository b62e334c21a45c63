"""Decoded images of a batch and the plan of their views in, normalised views out, computed together on the images' device.

The same plan through `data/views.py` gives the same views but for rounding: there every alteration ends in whole shades, here those
of hue and the blur do not. On a GPU, all images of about one size are resized by two matrix products, W_y · image · W_x^T, whose rows hold
the weights of Pillow's antialiased bicubic filter; mirroring reverses the rows of W_x. Nothing is read back from the device.
Everything but the products is done pixel by pixel, so that on a CPU a view has the same bits in whatever batch it is made.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from data.crops import BlurKernel, CropSpec, blur_taps
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from data.views import LUMA, SOLARIZE_FROM, resize

SIZE_STEP_PX = 128
"""Images whose sides are equal when rounded up to a multiple of this are resized together."""
_BICUBIC_A = -0.5
"""The free parameter of Keys' filter, as in Pillow."""

# Axes: B images, V views of one size, N = B V of them, S the side of a view; C colours, H W pixels of an image. Shades are 0 to 255.


def device_views(
    images: Sequence[Tensor],
    plans_BV: np.ndarray,
    spec: CropSpec,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> list[Tensor]:
    """Normalised views, float32 [B,3,S,S] each, global ones first, of uint8 images [H,W,3] of any sizes and their plans, PLAN [B,V]."""
    views: list[Tensor] = []
    device = images[0].device
    mean_C11, std_C11 = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (mean, std))
    for part in (slice(0, 2), slice(2, None)):
        plans = np.ascontiguousarray(plans_BV[:, part])
        if plans.size:
            side = spec.view_px(part.start)
            pixels_NCSS = altered(resized(images, plans, side), plans.reshape(-1), spec.blur_kernel)
            pixels_NCSS = (pixels_NCSS / 255 - mean_C11) / std_C11
            views += pixels_NCSS.unflatten(0, plans.shape).unbind(1)
    return views


def resized(images: Sequence[Tensor], plans_BV: np.ndarray, side: int) -> Tensor:
    """The part of each view, mirrored where its plan says so, squashed to `side`: whole shades, float32 [B V,3,S,S]."""
    if images[0].device.type != "cpu":
        return resized_by_products(images, plans_BV, side)
    # a CPU has nothing to gain from large products; the workers' resize touches only what lies in a part
    out_BVSSC = np.empty((*plans_BV.shape, side, side, 3), np.uint8)
    for b, v in np.ndindex(plans_BV.shape):
        top, left, tall, wide = plans_BV["box"][b, v].tolist()
        view = resize(images[b].numpy()[top : top + tall, left : left + wide], side)
        out_BVSSC[b, v] = view[:, ::-1] if plans_BV["flip"][b, v] else view
    return torch.from_numpy(out_BVSSC).flatten(0, 1).permute(0, 3, 1, 2).float().contiguous()


def resized_by_products(images: Sequence[Tensor], plans_BV: np.ndarray, side: int) -> Tensor:
    """The same by two matrix products for all images of about one size: at most two shades off."""
    out_BVCSS = torch.empty(*plans_BV.shape, 3, side, side, device=images[0].device)
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for b, image in enumerate(images):
        alike[tuple(-(-length // SIZE_STEP_PX) for length in image.shape[:2])].append(b)
    for rows in alike.values():
        height, width = (max(images[b].shape[axis] for b in rows) for axis in (0, 1))
        stack_BHWC = images[0].new_zeros(len(rows), height, width, 3)
        for k, b in enumerate(rows):
            stack_BHWC[k, : images[b].shape[0], : images[b].shape[1]] = images[b]
        where = torch.tensor(rows, device=out_BVCSS.device)
        out_BVCSS[where] = _products(stack_BHWC, plans_BV["box"][rows], plans_BV["flip"][rows], side)
    return out_BVCSS.flatten(0, 1)


def _products(images_BHWC: Tensor, boxes_BV4: np.ndarray, flips_BV: np.ndarray, side: int) -> Tensor:
    """W_y · image · W_x^T for images of one size: float32 [B,V,3,S,S]. Rounded after each product, as Pillow does."""
    n_images, n_views = flips_BV.shape
    height, width = images_BHWC.shape[1:3]
    device = images_BHWC.device
    # whole shades are exact in half precision, and weights good to a tenth of a shade
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    boxes_4BV = torch.from_numpy(np.moveaxis(boxes_BV4, -1, 0).astype(np.float32)).to(device)
    across = bicubic_weights(boxes_4BV[1], boxes_4BV[3], width, side).to(dtype)
    down = bicubic_weights(boxes_4BV[0], boxes_4BV[2], height, side).to(dtype)
    flips = torch.from_numpy(flips_BV.copy()).to(device)[..., None, None]
    across = torch.where(flips, across.flip(-2), across)
    # widths first, as Pillow does: it makes a difference where a shade is cut off at 0 or 255
    columns = images_BHWC.to(dtype).permute(0, 3, 1, 2).flatten(1, 2) @ across.flatten(1, 2).mT
    columns = columns.round_().clamp_(0, 255).view(n_images, 3, height, n_views, side)
    rows = down @ columns.permute(0, 3, 2, 1, 4).flatten(3)
    return rows.float().round_().clamp_(0, 255).unflatten(3, (3, side)).permute(0, 1, 3, 2, 4)


def bicubic_weights(first: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Rows of weights [...,S,size] over the pixels of one axis, for parts that begin at `first` and are `length` long.

    Keys' cubic filter, stretched by the reduction where there is one, cut off at the part's borders, each row with the sum 1.
    """
    step = (length / side)[..., None, None]
    centers = first[..., None, None] + (torch.arange(side, device=first.device).view(-1, 1) + 0.5) * step
    pixels = torch.arange(size, device=first.device) + 0.5
    x = ((pixels - centers) / step.clamp(min=1)).abs()
    a = _BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    inside = (pixels > first[..., None, None]) & (pixels < (first + length)[..., None, None])
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside
    return weights / weights.sum(dim=-1, keepdim=True)


def altered(pixels_NCSS: Tensor, plans_N: np.ndarray, kernel: BlurKernel) -> Tensor:
    """Colours shaken in each view's own order, dropped, blurred and solarised, as the plans say. Changes its argument."""
    device = pixels_NCSS.device

    def at(chosen_N: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flatnonzero(chosen_N)).to(device)

    for place in range(4):
        for change, apply in enumerate(_CHANGES):
            chosen_N = plans_N["jitter"] & (plans_N["order"][:, place] == change)
            if chosen_N.any():
                rows = at(chosen_N)
                amounts = torch.from_numpy(plans_N["amount"][chosen_N, change]).to(device).view(-1, 1, 1, 1)
                pixels_NCSS[rows] = apply(pixels_NCSS[rows], amounts)
    if plans_N["gray"].any():
        rows = at(plans_N["gray"])
        pixels_NCSS[rows] = _luma(pixels_NCSS[rows]).expand(-1, 3, -1, -1)
    blurred_N = plans_N["sigma_px"] > 0
    if blurred_N.any():
        rows = at(blurred_N)
        pixels_NCSS[rows] = _blurred(pixels_NCSS[rows], plans_N["sigma_px"][blurred_N], kernel)
    if plans_N["solarize"].any():
        rows = at(plans_N["solarize"])
        chosen = pixels_NCSS[rows]
        pixels_NCSS[rows] = torch.where(chosen.round() >= SOLARIZE_FROM, 255 - chosen, chosen)
    return pixels_NCSS


def _luma(pixels_NCSS: Tensor) -> Tensor:
    red, green, blue = pixels_NCSS.split(1, dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).round_()


def _cut(pixels_NCSS: Tensor) -> Tensor:
    """Pillow cuts fractions off when it blends. A thousandth is forgiven, for sums that should be whole."""
    return pixels_NCSS.add_(1e-3).floor_().clamp_(0, 255)


def _brighten(pixels_NCSS: Tensor, factors: Tensor) -> Tensor:
    return _cut(pixels_NCSS * factors)


def _contrast(pixels_NCSS: Tensor, factors: Tensor) -> Tensor:
    mean = _luma(pixels_NCSS).mean(dim=(2, 3), keepdim=True, dtype=torch.float64).round().float()
    return _cut((pixels_NCSS - mean) * factors + mean)


def _saturate(pixels_NCSS: Tensor, factors: Tensor) -> Tensor:
    gray = _luma(pixels_NCSS)
    return _cut((pixels_NCSS - gray) * factors + gray)


def _turn_hue(pixels_NCSS: Tensor, turns: Tensor) -> Tensor:
    """To hue, saturation and value and back, the hue turned by a share of the circle (Smith 1978, "Color gamut transform pairs")."""
    red, green, blue = pixels_NCSS.split(1, dim=1)
    value = pixels_NCSS.amax(dim=1, keepdim=True)
    chroma = value - pixels_NCSS.amin(dim=1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixths + 6 * turns
    channels = []
    for offset in (5, 3, 1):
        distance = (turned + offset) % 6
        channels.append(value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1))
    return torch.cat(channels, dim=1)


_CHANGES = (_brighten, _contrast, _saturate, _turn_hue)


def _blurred(pixels_NCSS: Tensor, sigmas_N: np.ndarray, kernel: BlurKernel) -> Tensor:
    """Each view blurred both ways by its own deviation, with the borders of `gaussian_blur`."""
    taps = [blur_taps(float(sigma), kernel) for sigma in sigmas_N]
    reach = max(len(row) for row in taps) // 2
    weights_NT = np.stack([np.pad(row, reach - len(row) // 2) for row in taps]).astype(np.float32)
    weights_TN111 = torch.from_numpy(weights_NT.T.copy()).to(pixels_NCSS.device)[..., None, None, None]
    border = "replicate" if kernel == "boxes" else "reflect"
    for axis in (2, 3):
        padded = pad(pixels_NCSS, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode=border)
        shifted = (padded.narrow(axis, tap, pixels_NCSS.shape[axis]) for tap in range(2 * reach + 1))
        pixels_NCSS = sum(weight * part for weight, part in zip(weights_TN111, shifted, strict=True))
    return pixels_NCSS
