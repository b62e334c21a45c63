"""Images and maps in, PNG or JPEG files for people out. Uses OpenCV; call it off the event loop.

Axes: H and W pixels of the picture, h and w patches of a map.
"""

import cv2
import numpy as np

from server.errors import EngineFailed

THUMBNAIL_PX = 128
"""Long side of a thumbnail."""
PICTURE_PX = 1024
"""Long side of an overlay at most."""
OUTSIDE_MASK = 0.35
"""Brightness of the patches that the mask leaves out."""


def thumbnail(image_HWC: np.ndarray) -> bytes:
    """A small JPEG of uint8 [H,W,3] RGB."""
    return _encode(".jpg", _shrunk(image_HWC, THUMBNAIL_PX), [cv2.IMWRITE_JPEG_QUALITY, 85])


def attention_overlay(image_HWC: np.ndarray, attention_hw: np.ndarray, mask_hw: np.ndarray | None) -> bytes:
    """A PNG: the image with one attention map stretched over it, dimmed outside the mask where one is given."""
    picture = _shrunk(image_HWC, PICTURE_PX)
    size = (picture.shape[1], picture.shape[0])
    heat = _coloured(cv2.resize(_scaled(attention_hw), size, interpolation=cv2.INTER_LINEAR), cv2.COLORMAP_INFERNO)
    blend = cv2.addWeighted(picture, 0.5, heat, 0.5, 0)
    if mask_hw is not None:
        inside = cv2.resize(mask_hw, size, interpolation=cv2.INTER_NEAREST).astype(bool)
        blend = np.where(inside[:, :, None], blend, (picture * OUTSIDE_MASK).astype(np.uint8))
    return _encode(".png", blend)


def depth_picture(image_HWC: np.ndarray, depth_hw: np.ndarray) -> bytes:
    """A PNG of the image's proportions: near is bright, far is dark, the range is this map's own."""
    picture = _shrunk(image_HWC, PICTURE_PX)
    nearness = cv2.resize(1 - _scaled(depth_hw), (picture.shape[1], picture.shape[0]), interpolation=cv2.INTER_LINEAR)
    return _encode(".png", _coloured(nearness, cv2.COLORMAP_MAGMA))


def _shrunk(image_HWC: np.ndarray, long_px: int) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    scale = long_px / max(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)


def _scaled(map_hw: np.ndarray) -> np.ndarray:
    """float32 [h,w] from 0 to 1; a map without contrast becomes all zero."""
    low, high = float(map_hw.min()), float(map_hw.max())
    return ((map_hw - low) / (high - low or 1.0)).astype(np.float32)


def _coloured(scaled_HW: np.ndarray, colours: int) -> np.ndarray:
    blue_green_red = cv2.applyColorMap((scaled_HW * 255).astype(np.uint8), colours)
    return cv2.cvtColor(blue_green_red, cv2.COLOR_BGR2RGB)


def _encode(suffix: str, rgb_HWC: np.ndarray, options: list[int] | None = None) -> bytes:
    done, data = cv2.imencode(suffix, cv2.cvtColor(np.ascontiguousarray(rgb_HWC), cv2.COLOR_RGB2BGR), options or [])
    if not done:
        raise EngineFailed(f"OpenCV could not write a {suffix} file")
    return bytes(data)
