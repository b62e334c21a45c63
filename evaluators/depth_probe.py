"""Patch features and measured depth in, a trained depth head out: the training loop of the linear depth probe.

The head is that of `backbones.heads` ("linear-1": last layer, patch features with CLS, uniform bins). Loss: scale-invariant
logarithmic (Eigen et al. 2014, in the form of AdaBins, Bhat et al. 2021); optimiser: AdamW, one cosine without warm-up.
Features are brought to zero mean and unit spread while training, and that scaling is folded into the head's weights
afterwards: the saved head takes the features as they come.
Legend: B images, N patches (N = h * w), D feature size, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.heads import DepthHead, DepthHeadSpec

SIGLOSS_EPS_M = 1e-3
"""Added to both depths before the logarithm, in metres."""
SIGLOSS_MEAN_WEIGHT = 0.15
"""Weight of the squared mean of the log ratio; 0 would leave the overall scale free."""


@dataclass(frozen=True)
class DepthTable:
    """What the probe learns from: one row an image."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    patches_nND: np.ndarray
    cls_nD: np.ndarray
    depth_m: Sequence[np.ndarray]
    """Measured maps, float32 [H, W] in metres, each of its own size, 0 where unknown."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; whole views are square."""
        side = math.isqrt(self.patches_nND.shape[1])
        return side, side

    def rows(self, rows: Sequence[int]) -> "DepthTable":
        """The table of some of its rows."""
        index = list(rows)
        return DepthTable(
            tuple(self.names[row] for row in index),
            tuple(self.groups[row] for row in index),
            self.patches_nND[index],
            self.cls_nD[index],
            [self.depth_m[row] for row in index],
        )


class _TrainingHead(DepthHead):
    """The head at a coarser enlargement: a quarter of the pixels, a quarter of the time, the same weights."""

    ENLARGEMENT = 2


def train_head(
    table: DepthTable, head_spec: DepthHeadSpec, *, lr: float, weight_decay: float, steps: int, batch: int, seed: int
) -> DepthHead:
    """Train a head; pixels without a measurement, or outside the head's range, are left out."""
    generator = torch.Generator().manual_seed(seed)
    h, w = table.grid
    out_hw = (_TrainingHead.ENLARGEMENT * h, _TrainingHead.ENLARGEMENT * w)
    targets_nHW = torch.stack([sample_nearest(depth, out_hw) for depth in table.depth_m])
    targets_nHW[(targets_nHW < head_spec.min_depth) | (targets_nHW > head_spec.max_depth)] = 0
    scaling = Scaling.of(table)
    head = _TrainingHead(head_spec)
    with torch.no_grad():
        head.linear.weight.normal_(0.0, 0.01, generator=generator)
        head.linear.bias.zero_()
    optim = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    n = len(table.names)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(batch, n):
            order = torch.randperm(n, generator=generator)
        rows, order = order[:batch], order[batch:]
        for group in optim.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        predicted_BHW = head(*scaling.scaled(table, rows.numpy()), table.grid, out_hw)
        optim.zero_grad()
        sig_loss(predicted_BHW, targets_nHW[rows]).backward()
        optim.step()
    return scaling.folded(head)


def sig_loss(predicted: Tensor, measured: Tensor) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) with g the log ratio over measured pixels (`measured` > 0); a scalar.

    A batch without two measured pixels has loss 0.
    """
    known = measured > 0
    ratio = torch.log(predicted[known] + SIGLOSS_EPS_M) - torch.log(measured[known] + SIGLOSS_EPS_M)
    if len(ratio) < 2:
        return predicted.sum() * 0
    return torch.sqrt(ratio.var() + SIGLOSS_MEAN_WEIGHT * ratio.mean() ** 2 + 1e-12)


@dataclass(frozen=True)
class Scaling:
    """Mean and spread of the input channels, CLS after patches, [2D]."""

    mean: Tensor
    spread: Tensor

    @staticmethod
    def of(table: DepthTable) -> "Scaling":
        """Measured over all rows; a constant channel keeps its size."""
        means, spreads = [], []
        for array in (table.patches_nND, table.cls_nD):
            axes = tuple(range(array.ndim - 1))
            means.append(array.mean(axis=axes, dtype=np.float64))
            spreads.append(array.std(axis=axes, dtype=np.float64))
        spread = np.concatenate(spreads)
        spread[spread < 1e-6] = 1.0
        return Scaling(torch.from_numpy(np.concatenate(means)).float(), torch.from_numpy(spread).float())

    def scaled(self, table: DepthTable, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Patches [B, N, D] and CLS [B, D] of these rows at zero mean and unit spread."""
        width = table.cls_nD.shape[1]
        patches = torch.from_numpy(np.asarray(table.patches_nND[rows]))
        cls = torch.from_numpy(np.asarray(table.cls_nD[rows]))
        patches = (patches - self.mean[:width]) / self.spread[:width]
        return patches, (cls - self.mean[width:]) / self.spread[width:]

    def folded(self, head: DepthHead) -> DepthHead:
        """The head that does to raw features what `head` does to scaled ones."""
        plain = DepthHead(head.spec)
        with torch.no_grad():
            plain.linear.weight.copy_(head.linear.weight / self.spread)
            plain.linear.bias.copy_(head.linear.bias - plain.linear.weight @ self.mean)
        return plain.eval()


def sample_nearest(depth_HW: np.ndarray, out_hw: tuple[int, int]) -> Tensor:
    """The measurement nearest to each output pixel's centre; never a mean over an edge or a hole."""
    return F.interpolate(torch.from_numpy(depth_HW)[None, None], size=out_hw, mode="nearest-exact")[0, 0]


@torch.no_grad()
def predict_depth(head: DepthHead, table: DepthTable, batch: int = 16) -> list[np.ndarray]:
    """Depth of every image at the size of its measurement, float32 [H, W], in the head's unit."""
    maps: list[np.ndarray] = []
    for start in range(0, len(table.names), batch):
        patches = torch.from_numpy(np.array(table.patches_nND[start : start + batch]))
        cls = torch.from_numpy(np.array(table.cls_nD[start : start + batch]))
        sizes = [depth.shape for depth in table.depth_m[start : start + batch]]
        if len(set(sizes)) == 1:
            maps.extend(head(patches, cls, table.grid, sizes[0]).numpy())
        else:
            maps.extend(
                head(patches[i : i + 1], cls[i : i + 1], table.grid, size)[0].numpy() for i, size in enumerate(sizes)
            )
    return maps
