"""Patch features of a video's frames and the first frame's labels in, labels of the other frames out; nothing is learned.

Jabri et al. 2020, with the settings of Caron et al. 2021: each patch of a frame takes the labels of the patches of the
first frame and of the last few that are most like it and not far away. Labels stay soft between frames.

A frame is done row by row of its patches, against those rows of the sources that are near enough: the whole matrix of
affinities, most of which is masked, is never there.
Legend: N patches (N = h * w), D feature size, S source frames, C labels (background first), H W pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PropagationSpec:
    """How labels travel."""

    previous: int = 7
    """Earlier frames that are looked at beside the first one, which stays."""
    neighbourhood: int = 12
    """Rows and columns of patches that a label can travel; 0: no limit."""
    top_k: int = 5
    """Most similar patches, of all frames together, that a patch listens to."""
    temperature: float = 0.1
    """Of the similarities."""

    def __post_init__(self) -> None:
        if self.previous < 0 or self.neighbourhood < 0 or self.top_k < 1 or not 0 < self.temperature < float("inf"):
            raise InputError(
                "--previous and --neighbourhood: wanted 0 or more; --top-k: 1 or more; --temperature: above 0"
            )


def propagate(
    features: Iterable[np.ndarray], first_Chw: Tensor, spec: PropagationSpec = PropagationSpec()
) -> Iterator[Tensor]:
    """Soft labels [C, h, w] of the second frame and on; `features` are [N, D] for every frame, the first one's included."""
    frames = iter(features)
    grid = (first_Chw.shape[1], first_Chw.shape[2])
    first = (_unit(next(frames)), first_Chw.flatten(1).float())
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=spec.previous)
    for frame in frames:
        target_ND = _unit(frame)
        labels_CN = next_labels(target_ND, [first, *recent], grid, spec)
        recent.append((target_ND, labels_CN))
        yield labels_CN.unflatten(1, grid)


def _unit(features_ND: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(features_ND, np.float32)), dim=1)


def next_labels(
    target_ND: Tensor, sources: list[tuple[Tensor, Tensor]], grid: tuple[int, int], spec: PropagationSpec
) -> Tensor:
    """Labels [C, N] of a frame from sources, each its unit features [N, D] and labels [C, N]."""
    h, w = grid
    features_ShwD = torch.stack([features.unflatten(0, grid) for features, _ in sources])
    labels_CShw = torch.stack([labels.unflatten(1, grid) for _, labels in sources], dim=1)
    reach = spec.neighbourhood or max(h, w)
    columns = torch.arange(w)
    near_ww = (columns[:, None] - columns[None, :]).abs() <= reach
    rows = []
    for y in range(h):
        low, high = max(0, y - reach), min(h, y + reach + 1)
        around_MD = features_ShwD[:, low:high].flatten(0, 2)
        affinity_wM = torch.exp(target_ND[y * w : (y + 1) * w] @ around_MD.T / spec.temperature)
        affinity_wM *= near_ww.repeat(1, len(around_MD) // w)
        least_w1 = affinity_wM.topk(min(spec.top_k, len(around_MD)), dim=1).values[:, -1:]
        affinity_wM *= affinity_wM >= least_w1
        affinity_wM /= affinity_wM.sum(dim=1, keepdim=True)
        rows.append(labels_CShw[:, :, low:high].flatten(1) @ affinity_wM.T)
    return torch.cat(rows, dim=1)


def final_labels(soft_Chw: Tensor, hw: tuple[int, int]) -> np.ndarray:
    """Index of the label of each pixel, uint8 [H, W]: enlarged to `hw`, each label scaled to 0 to 1, the largest taken."""
    enlarged_CHW = F.interpolate(soft_Chw[None], size=hw, mode="bilinear", align_corners=False)[0]
    flat_CP = enlarged_CHW.flatten(1)
    present = flat_CP.amax(dim=1, keepdim=True) > 0
    lifted_CP = flat_CP - flat_CP.amin(dim=1, keepdim=True)
    top_C1 = lifted_CP.amax(dim=1, keepdim=True)
    scaled_CP = torch.where(present & (top_C1 > 0), lifted_CP / top_C1.clamp(min=1e-30), flat_CP)
    labels: np.ndarray = scaled_CP.argmax(dim=0).unflatten(0, hw).to(torch.uint8).numpy()
    return labels
