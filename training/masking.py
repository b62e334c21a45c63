"""Which patches of which global crops the student does not see (Oquab et al. 2023, section 4; block-wise as in BEiT, Bao et al. 2022).

Axes: C global crops of a batch (crop-major: the first view of every image, then the second), N = h * w patches, row-major.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.errors import InputError

_ATTEMPTS = 10
_MIN_PATCHES = 4
_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """How much is masked."""

    crops: float = 0.5
    """Share of the global crops that have a mask."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Least and largest share of a masked crop's patches; a batch is spread evenly over the range."""
    static_count: bool = False
    """Fill up at random to the upper edge of each crop's range, so that every batch masks equally many patches (as in DINOv3). The
    published DINOv2 falls slightly and variably short."""

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0 <= self.crops <= 1 or not 0 <= low <= high < 1:
            raise InputError(
                f"masks for {self.crops} of the crops, {low} to {high} of the patches: want shares, the lower first"
            )


def block_mask(h: int, w: int, wanted: int, rng: np.random.Generator, largest: int | None = None) -> np.ndarray:
    """Boolean mask [h, w] of at most `wanted` patches, as overlapping rectangles; stops short where ten tries in a row fail.

    No rectangle adds more than `largest` patches, by default half of all.
    """
    mask_hw = np.zeros((h, w), dtype=bool)
    largest, count = h * w // 2 if largest is None else largest, 0
    while count < wanted:
        added = _add_block_(mask_hw, min(wanted - count, largest), rng)
        if not added:
            break
        count += added
    return mask_hw


def _add_block_(mask_hw: np.ndarray, limit: int, rng: np.random.Generator) -> int:
    """Cover one more rectangle with 1 to `limit` new patches; returns how many, 0 where no try succeeded."""
    h, w = mask_hw.shape
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*sorted((_MIN_PATCHES, limit)))
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (rows < h and columns < w):
            continue
        top, left = int(rng.integers(0, h - rows + 1)), int(rng.integers(0, w - columns + 1))
        block = mask_hw[top : top + rows, left : left + columns]
        added = block.size - int(block.sum())
        if 0 < added <= limit:
            block[...] = True
            return added
    return 0


def batch_masks(n_crops: int, h: int, w: int, spec: MaskSpec, rng: np.random.Generator) -> np.ndarray:
    """Masks [C, N] of a batch: the masked crops take their ratios from equal parts of the range, then all are shuffled."""
    n_masked = int(n_crops * spec.crops)
    edges = np.linspace(*spec.ratio, n_masked + 1)
    masks = [np.zeros((h, w), dtype=bool) for _ in range(n_crops)]
    for i in range(n_masked):
        upper = int(h * w * edges[i + 1])
        wanted = upper if spec.static_count else int(h * w * rng.uniform(edges[i], edges[i + 1]))
        masks[i] = block_mask(h, w, wanted, rng)
        if spec.static_count:
            free = np.flatnonzero(~masks[i])
            masks[i].flat[rng.choice(free, upper - int(masks[i].sum()), replace=False)] = True
    rng.shuffle(masks)
    return np.stack(masks).reshape(n_crops, h * w)
