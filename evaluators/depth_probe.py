"""Patch features and measured depth in, a trained depth head out: the training loop of the linear depth probe.

The head is that of `backbones.heads` ("linear-1": last layer, patch features with CLS, uniform bins). Loss: scale-invariant
logarithmic (Eigen et al. 2014, in the form of AdaBins, Bhat et al. 2021); optimiser: AdamW, one cosine without warm-up.
Features are brought to zero mean and unit spread while training, and that scaling is folded into the head's weights
afterwards: the saved head takes the features as they come.

A step does not enlarge whole maps: it draws points of the fourfold enlarged map and computes the head there alone. As the
layer is linear, its output at a point is that of the features mixed from the four patches around it, so this is the head
itself, not an approximation, at a small part of the cost of its whole map.
Legend: B images, P points of an image, N patches (N = h * w), D feature size, K bins, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.heads import AnyDepthHead, DepthHead, DepthHeadSpec
from data.errors import InputError

POINTS = 64
"""Places of an image that a step looks at."""
ROWS_AT_ONCE = 64
"""Images whose features are held in double precision at a time."""
SIGLOSS_EPS_M = 1e-3
"""Added to both depths before the logarithm, in metres."""
SIGLOSS_MEAN_WEIGHT = 0.15
"""Weight of the squared mean of the log ratio; 0 would leave the overall scale free."""


@dataclass(frozen=True)
class DepthTable:
    """What the probe learns from and is tested on: one row an image. Large sets stay on disk."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    patches_nND: np.ndarray
    cls_nD: np.ndarray
    depth_m: Sequence[np.ndarray]
    """Measured maps, float32 [H, W] in metres, each of its own size, 0 where unknown."""
    mirrored: tuple[np.ndarray, np.ndarray] | None = None
    """Patches and CLS of the same images in a mirror, patches put back where they belong."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; whole views are square."""
        side = math.isqrt(self.patches_nND.shape[1])
        return side, side


@dataclass(frozen=True)
class TrainSpec:
    """One training of a head."""

    lr: float
    weight_decay: float
    steps: int
    batch: int
    seed: int


def train_head(table: DepthTable, rows: np.ndarray, head_spec: DepthHeadSpec, spec: TrainSpec) -> DepthHead:
    """Train a head on these rows; pixels without a measurement, or outside the head's range, are left out.

    Raises InputError where no pixel is left.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    targets = Targets.of(table, rows, head_spec)
    scaling = Scaling.of(table, rows)
    head = DepthHead(head_spec)
    with torch.no_grad():
        head.linear.weight.normal_(0.0, 0.01, generator=generator)
        head.linear.bias.zero_()
    optim = torch.optim.AdamW(head.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    n = len(targets.rows)
    batch = min(spec.batch, n)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(spec.steps):
        if len(order) < batch:
            order = torch.randperm(n, generator=generator)
        chosen, order = order[:batch], order[batch:]
        for group in optim.param_groups:
            group["lr"] = spec.lr * (1 + math.cos(math.pi * step / spec.steps)) / 2
        places_BP, measured_BP = targets.draw(chosen, generator)
        patches_BND, cls_BD = scaling.scaled(table, targets.rows[chosen.numpy()])
        predicted_BP = depth_at(head, patches_BND, cls_BD, table.grid, places_BP)
        optim.zero_grad()
        sig_loss(predicted_BP, measured_BP).backward()
        optim.step()
    return scaling.folded(head)


@dataclass(frozen=True)
class Targets:
    """The measurements a head can learn from: maps as large as the head's enlarged one, in the table's order."""

    rows: np.ndarray
    """Rows of the table that have any measurement."""
    depth: Tensor
    """float32 [rows, places], 0 where unknown or out of the head's range; places run row by row."""

    @staticmethod
    def of(
        table: DepthTable, rows: np.ndarray, head_spec: DepthHeadSpec, enlargement: int = DepthHead.ENLARGEMENT
    ) -> "Targets":
        """Sampled at the centre of each place. Raises InputError where nothing is left."""
        h, w = table.grid
        out_hw = (enlargement * h, enlargement * w)
        depth_nP = torch.stack(
            [sample_nearest(depth, out_hw).flatten() for depth in (table.depth_m[row] for row in rows)]
        )
        depth_nP[(depth_nP < head_spec.min_depth) | (depth_nP > head_spec.max_depth)] = 0
        known = (depth_nP > 0).any(dim=1)
        if not known.any():
            raise InputError(
                f"no training image has a depth from {head_spec.min_depth:g} to {head_spec.max_depth:g} metres; "
                "check the unit of the depth maps (millimetres), or set --max-depth"
            )
        return Targets(rows[known.numpy()], depth_nP[known])

    def draw(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random measured places [B, P] of the chosen images (with replacement), and their depth [B, P]."""
        depth = self.depth[chosen]
        places_BP = torch.multinomial((depth > 0).float(), POINTS, replacement=True, generator=generator)
        return places_BP, depth.gather(1, places_BP)


def depth_at(head: DepthHead, patches_BND: Tensor, cls_BD: Tensor, grid: tuple[int, int], places_BP: Tensor) -> Tensor:
    """What `head` says [B, P] at places (row by row) of its map enlarged to (4 h, 4 w)."""
    h, w = grid
    scale = head.ENLARGEMENT
    low_y, high_y, part_y = _between(torch.div(places_BP, scale * w, rounding_mode="floor"), scale, h)
    low_x, high_x, part_x = _between(places_BP % (scale * w), scale, w)
    images = torch.arange(len(patches_BND))[:, None]

    def mixed(row_BP: Tensor) -> Tensor:
        left, right = patches_BND[images, row_BP * w + low_x], patches_BND[images, row_BP * w + high_x]
        return torch.lerp(left, right, part_x[:, :, None])

    points_BPD = torch.lerp(mixed(low_y), mixed(high_y), part_y[:, :, None])
    of_patches, of_cls = head.linear.weight.split(patches_BND.shape[2], dim=1)
    logits_BPK = points_BPD @ of_patches.T + (cls_BD @ of_cls.T + head.linear.bias)[:, None]
    weights_BPK = F.relu(logits_BPK) + head.FLOOR
    bins_K = torch.linspace(head.spec.min_depth, head.spec.max_depth, head.spec.bins)
    return (weights_BPK @ bins_K) / weights_BPK.sum(dim=2)


def _between(place: Tensor, scale: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two patches around a place of the enlarged axis, and how far it is from the first to the second."""
    position = ((place + 0.5) / scale - 0.5).clamp(0, size - 1)
    low = position.floor().long()
    return low, (low + 1).clamp(max=size - 1), position - low


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
    def of(table: DepthTable, rows: np.ndarray) -> "Scaling":
        """Measured over these rows; a constant channel keeps its size."""
        means, spreads = [], []
        for array in (table.patches_nND, table.cls_nD):
            count, total, squares = 0, 0.0, 0.0
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = array[rows[start : start + ROWS_AT_ONCE]].reshape(-1, array.shape[-1]).astype(np.float64)
                count, total, squares = count + len(part), total + part.sum(axis=0), squares + (part**2).sum(axis=0)
            mean = np.asarray(total / count)
            means.append(mean)
            spreads.append(np.sqrt(np.maximum(squares / count - mean**2, 0)))
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


@torch.inference_mode()
def predict_depth(head: AnyDepthHead, table: DepthTable, row: int) -> np.ndarray:
    """Depth of one image at the size of its measurement, float32 [H, W], in the head's unit."""
    height, width = table.depth_m[row].shape
    maps = []
    for patches_nND, cls_nD in ((table.patches_nND, table.cls_nD), *([table.mirrored] if table.mirrored else [])):
        patches, cls = (torch.from_numpy(np.array(array[row : row + 1])) for array in (patches_nND, cls_nD))
        maps.append(head(patches, cls, table.grid, (height, width))[0].numpy())
    depth_HW: np.ndarray = maps[0] if len(maps) == 1 else (maps[0] + maps[1]) / 2
    return depth_HW
