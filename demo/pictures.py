"""Maps and features in, pictures out: uint8 RGB [H, W, 3].

Axes: H and W pixels of a picture, h and w patches of a map, B images, D features, C = 3 principal components.
"""

from collections.abc import Sequence

import cv2
import numpy as np

PICTURE_PX = 640
"""Long side of a picture on the page."""
DIM = 0.25
"""Brightness of what a mask leaves out."""
SHADES = (2.0, 98.0)
"""Percentiles of a principal component that become black and full colour."""
MARK = (255, 64, 64)


def fitted(image_HWC: np.ndarray) -> np.ndarray:
    """An image shrunk or enlarged to PICTURE_PX on its long side."""
    height, width = image_HWC.shape[:2]
    scale = PICTURE_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def heat(
    picture_HWC: np.ndarray, map_hw: np.ndarray, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """A map laid over a picture, dark at `low` and bright at `high`: its own smallest and largest value unless they are given."""
    low = float(map_hw.min()) if low is None else low
    high = float(map_hw.max()) if high is None else high
    scaled = ((map_hw - low) / max(high - low, 1e-12)).astype(np.float32)
    smooth = np.clip(cv2.resize(scaled, picture_HWC.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    return cv2.addWeighted(picture_HWC, 0.4, coloured(smooth, cv2.COLORMAP_INFERNO), 0.6, 0)


def coloured(levels_HW: np.ndarray, colours: int) -> np.ndarray:
    """Values from 0 to 1 as colours."""
    levels = (levels_HW.clip(0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, colours), cv2.COLOR_BGR2RGB)


def cut_out(picture_HWC: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """A picture with all patches dimmed but those of a mask."""
    mask = np.ascontiguousarray(mask_hw, np.uint8)
    inside = cv2.resize(mask, picture_HWC.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    return np.where(inside[:, :, None], picture_HWC, (picture_HWC * DIM).astype(np.uint8))


def holding(map_hw: np.ndarray, mass: float) -> np.ndarray:
    """The fewest patches that hold a share of a map together, as a mask."""
    values = np.sort(map_hw, axis=None)[::-1].astype(np.float64)
    n = int(np.searchsorted(np.cumsum(values), mass * values.sum())) + 1
    return map_hw >= values[min(n, len(values)) - 1]


def depth_colours(depth_HW: np.ndarray, like_HWC: np.ndarray) -> np.ndarray:
    """A depth map in the proportions of an image, near bright and far dark, beside the scale of colours."""
    height, width = like_HWC.shape[:2]
    low, high = float(depth_HW.min()), float(depth_HW.max())
    near = 1 - (cv2.resize(depth_HW, (width, height), interpolation=cv2.INTER_LINEAR) - low) / max(high - low, 1e-12)
    bar = np.repeat(np.linspace(1, 0, height, dtype=np.float32)[:, None], max(8, width // 25), axis=1)
    gap = np.ones((height, 6), np.float32)
    picture = coloured(np.concatenate([near.astype(np.float32), gap, bar], axis=1), cv2.COLORMAP_MAGMA)
    picture[:, width : width + 6] = 255
    return picture


def class_colours(classes_HW: np.ndarray, like_HWC: np.ndarray) -> np.ndarray:
    """A picture with the colour of its class laid over each pixel."""
    classes = cv2.resize(classes_HW.astype(np.float32), like_HWC.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.addWeighted(like_HWC, 0.35, palette(int(classes_HW.max()) + 1)[classes.astype(np.int64)], 0.65, 0)


def palette(n: int) -> np.ndarray:
    """Distinct colours uint8 [n, 3]: hues a golden angle apart, two brightnesses in turn."""
    numbers = np.arange(n)
    hue, value = numbers * 137.508 % 360 / 2, np.where(numbers % 2, 190, 245)
    hsv = np.stack([hue, np.full(n, 170), value], axis=1).astype(np.uint8)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def marked(picture_HWC: np.ndarray, row: int, column: int, grid: tuple[int, int]) -> np.ndarray:
    """A picture with a frame around one patch of its grid (rows, columns)."""
    height, width = picture_HWC.shape[:2]
    top, left = round(row * height / grid[0]), round(column * width / grid[1])
    bottom, right = round((row + 1) * height / grid[0]) - 1, round((column + 1) * width / grid[1]) - 1
    framed = picture_HWC.copy()
    cv2.rectangle(framed, (left - 3, top - 3), (right + 3, bottom + 3), (255, 255, 255), 3)
    cv2.rectangle(framed, (left - 1, top - 1), (right + 1, bottom + 1), MARK, 3)
    return framed


def cosines(patch_D: np.ndarray, patches_hwD: np.ndarray) -> np.ndarray:
    """Cosine similarity of one patch to each of an image's, [h, w]."""
    lengths = np.linalg.norm(patches_hwD, axis=-1) * np.linalg.norm(patch_D)
    return patches_hwD @ patch_D / np.maximum(lengths, 1e-12)


def principal_colours(patches_BhwD: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The three strongest directions of all images' patches as red, green and blue, each image in its picture's proportions.

    One basis and one scale for all images, so that equal colours mean equal features across them. A direction's sign, which the
    decomposition leaves open, is a function of the direction alone: its entries, each times its own size, sum to more than 0. Small
    changes of the images therefore keep the colours. Of fewer than three directions the rest stays black.
    """
    rows = patches_BhwD.reshape(-1, patches_BhwD.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    strengths, directions_DD = np.linalg.eigh(rows.T @ rows)
    basis_DC = directions_DD[:, ::-1][:, :3]
    sides = (basis_DC * np.abs(basis_DC)).sum(axis=0)
    there = strengths[::-1][:3] > 1e-9 * max(strengths[-1], 1e-30)
    scores = rows @ (basis_DC * np.where(sides < 0, -1.0, 1.0) * there)
    low, high = np.percentile(scores, SHADES, axis=0)
    shades = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1) * there
    grids = (shades * 255).astype(np.uint8).reshape(*patches_BhwD.shape[:3], 3)
    return [
        cv2.resize(grid, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        for grid, picture in zip(grids, like, strict=True)
    ]
