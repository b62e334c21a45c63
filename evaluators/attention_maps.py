"""Attention maps and object masks in, overlaps out: how well the patches that a head looks at cover a thing.

Caron et al. 2021, figure 4: of each head's CLS attention the patches that hold 60 % of the mass are kept, and each true
object is compared with the head that covers it best (Jaccard index, or intersection over union).
Legend: N images, h w patches, O objects of one image, H W pixels.
"""

import numpy as np


def top_mass(attention: np.ndarray, mass: float) -> np.ndarray:
    """uint8 [N,heads,h,w]: 1 on the patches that together hold the top `mass` of each head's attention.

    Patches are taken from the largest on, as long as those left out still hold more than 1 - mass (Caron et al. 2021,
    fig. 3, as the authors' script computes it).
    """
    flat = attention.reshape(*attention.shape[:2], -1).astype(np.float64)
    order = np.argsort(flat, axis=-1)
    ascending = np.take_along_axis(flat, order, -1)
    held = np.cumsum(ascending, -1) / np.sum(ascending, -1, keepdims=True)
    mask = np.zeros(flat.shape, np.uint8)
    np.put_along_axis(mask, order, (held > 1 - mass).astype(np.uint8), -1)
    return mask.reshape(attention.shape)


def cell_of_pixels(hw: tuple[int, int], view_px: int, patch_px: int, grid: tuple[int, int]) -> np.ndarray:
    """Which patch each pixel of an image of `hw` lies in, int64 [H, W], row by row; -1 beyond the last whole patch.

    The network saw the image squashed to a square of `view_px`; a pixel goes where its centre lay.
    """
    rows, columns = (((np.arange(side) + 0.5) * view_px / side // patch_px).astype(np.int64) for side in hw)
    cells_HW = rows[:, None] * grid[1] + columns[None, :]
    cells_HW[(rows >= grid[0])[:, None] | (columns >= grid[1])[None, :]] = -1
    return cells_HW


def head_jaccards(masks: np.ndarray, truth_HW: np.ndarray, cells_HW: np.ndarray) -> np.ndarray:
    """Jaccard index of every object with every head's mask, at the truth's own size, [O, heads].

    `masks`: [heads, h, w], 1 on the patches that a head keeps. `truth_HW`: 0 background, a number an object, below 0 what
    is not scored. Objects come in the order of their numbers; without one the result has no row.
    """
    flat = masks.reshape(len(masks), -1).astype(np.float64)
    inside = (truth_HW >= 0) & (cells_HW >= 0)
    seen_N = np.bincount(cells_HW[inside], minlength=flat.shape[1]).astype(np.float64)
    kept_h = flat @ seen_N
    rows = []
    for number in np.unique(truth_HW[truth_HW > 0]):
        own = truth_HW == number
        both_h = flat @ np.bincount(cells_HW[own & inside], minlength=flat.shape[1]).astype(np.float64)
        rows.append(both_h / (own.sum() + kept_h - both_h))
    return np.array(rows).reshape(-1, len(masks))
