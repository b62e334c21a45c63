"""The views of the published code, one Pillow call after the other, as torchvision's transforms make them; slow and obvious."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data.preprocess import IMAGENET_MEAN, IMAGENET_STD


def pillow_view(image: Image.Image, step: np.void, px: int, kernel: str) -> Image.Image:
    """One view, by its plan."""
    top, left, tall, wide = (int(v) for v in step["box"])
    out = image.crop((left, top, left + wide, top + tall)).resize((px, px), Image.Resampling.BICUBIC)
    if step["flip"]:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if step["jitter"]:
        for change in step["order"]:
            out = CHANGES[change](out, float(step["amount"][change]))
    if step["gray"]:
        out = out.convert("L").convert("RGB")
    if step["sigma_px"] > 0:
        out = blur(out, float(step["sigma_px"]), kernel)
    if step["solarize"]:
        out = ImageOps.solarize(out, 128)
    return out


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(int) + int(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


CHANGES = (brightness, contrast, saturation, hue)


def blur(image: Image.Image, sigma: float, kernel: str) -> Image.Image:
    """DINO: Pillow's own, of this radius. DINOv2: a Gaussian of nine pixels both ways, mirrored at the border."""
    if kernel == "boxes":
        return image.filter(ImageFilter.GaussianBlur(sigma))
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    pixels = np.pad(np.asarray(image).astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    pixels = sum(tap * pixels[k : k + image.height] for k, tap in enumerate(taps))
    pixels = sum(tap * pixels[:, k : k + image.width] for k, tap in enumerate(taps))
    return Image.fromarray(np.round(pixels).clip(0, 255).astype(np.uint8))


def normalised(image: Image.Image) -> np.ndarray:
    """float32 [3,h,w], channels first in memory too."""
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std
