"""Patch features and class masks in, a trained segmentation head out: the training loop of the linear probe.

The head is that of `backbones.heads`: batch norm and one linear layer (Oquab et al. 2023, section 7.4), its logits enlarged
bilinearly to the mask. Cross-entropy over pixels, AdamW, warm-up and a linear fall of the learning rate to 0 as published.
As the features do not change, batch norm's mean and spread are taken once over all of them, and folded into the weights
afterwards: the saved head takes the features as they come.

A step does not enlarge whole maps: it draws pixels and computes the head there alone. The layer is linear, so its output at
a pixel is that of the features mixed from the four patches around it: the head itself, at a small part of its cost.
Legend: B images, P pixels of an image, N patches (N = h * w), D feature size, C classes, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.heads import SegmentationHead, SegmentationHeadSpec
from data.errors import CheckFailed, InputError

PIXELS_KEPT = 1024
"""Labelled pixels of each image, drawn once; bounds memory to some 10 kB an image, whatever its size."""
PIXELS = 128
"""Of these, how many a step looks at."""
WARM_UP = 1500 / 40_000
"""Share of the steps in which the learning rate rises, as published."""
ROWS_AT_ONCE = 64
LOGITS_AT_ONCE = 2**26
"""Logits of an image's pixels that are held at a time (256 MiB), or one class of it: all 150 of ADE20K at 12 million pixels are 7 GB."""
LogitMap = Callable[[tuple[int, int], slice], Tensor]
"""`logit_map(hw, classes)`: logits of some classes of one image at the size `hw`, [c, H, W]."""


@dataclass(frozen=True)
class SegmentationTable:
    """What the probe learns from and is tested on: one row an image. Large sets stay on disk."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    patches_nND: np.ndarray
    masks: Sequence[np.ndarray]
    """Classes, int32 [H, W], each of its own size, below 0 where nothing counts."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return square_grid(self.patches_nND.shape[1])

    def logit_map(self, head: SegmentationHead, row: int) -> LogitMap:
        """What the head says of one image."""
        logits = head.logits(torch.from_numpy(np.array(self.patches_nND[row : row + 1])), self.grid)
        return lambda hw, classes: enlarged(logits[:, classes], hw)[0]


def enlarged(map_1chw: Tensor, hw: tuple[int, int]) -> Tensor:
    """Bilinearly, [1, c, H, W]."""
    return F.interpolate(map_1chw, size=hw, mode="bilinear", align_corners=False)


def square_grid(n_patches: int) -> tuple[int, int]:
    """Patches down and across of a square view."""
    side = math.isqrt(n_patches)
    return side, side


class ImageTable(Protocol):
    """Images that a head can be asked about, one row each: whole views, or windows over the image."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def groups(self) -> tuple[str, ...]: ...
    @property
    def masks(self) -> Sequence[np.ndarray]: ...

    def logit_map(self, head: SegmentationHead, row: int) -> LogitMap:
        """What the head says of one image."""


@dataclass(frozen=True)
class TrainSpec:
    """One training of a head."""

    lr: float
    weight_decay: float
    steps: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Targets:
    """Pixels drawn from each image's mask."""

    rows: np.ndarray
    """Rows of the table with a labelled pixel."""
    places: Tensor
    """float32 [rows, P, 2]: where a pixel's centre lies, in patches from the centre of the first one (down, across)."""
    classes: Tensor
    """int16 [rows, P]"""

    @staticmethod
    def of(table: SegmentationTable, rows: np.ndarray, n_classes: int, seed: int) -> "Targets":
        """Draw them. Raises InputError for a class out of range, and where no pixel has a class."""
        rng = np.random.default_rng((seed, 1))
        kept, places, classes = [], [], []
        for row in rows.tolist():
            mask_HW = table.masks[row]
            check_range(mask_HW, n_classes, table.names[row])
            labelled = np.flatnonzero(mask_HW >= 0)
            if not len(labelled):
                continue
            drawn = labelled[rng.integers(0, len(labelled), PIXELS_KEPT)]
            y, x = np.divmod(drawn, mask_HW.shape[1])
            scale = np.array(table.grid) / np.array(mask_HW.shape)
            places.append((np.stack([y, x], axis=1) + 0.5) * scale - 0.5)
            classes.append(mask_HW.reshape(-1)[drawn])
            kept.append(row)
        if not kept:
            raise InputError(
                f"none of the {len(rows)} training masks has a labelled pixel; wanted class numbers in them"
            )
        return Targets(
            np.array(kept),
            torch.from_numpy(np.stack(places).astype(np.float32)),
            torch.from_numpy(np.stack(classes).astype(np.int16)),
        )


def check_range(mask_HW: np.ndarray, n_classes: int, name: str) -> None:
    """Raise InputError where a mask holds a class that there is not."""
    highest = int(mask_HW.max(initial=-1))
    if highest >= n_classes:
        raise InputError(
            f"{name}: its mask holds class {highest}, and there are {n_classes} (0 to {n_classes - 1}); correct the mask, "
            "or the list of classes; 255 marks what does not count"
        )


def train_head(
    table: SegmentationTable, rows: np.ndarray, head_spec: SegmentationHeadSpec, spec: TrainSpec
) -> SegmentationHead:
    """Train a head on these rows. Raises InputError as `Targets.of`, and CheckFailed where the loss is not finite."""
    generator = torch.Generator().manual_seed(spec.seed)
    targets = Targets.of(table, rows, head_spec.n_classes, spec.seed)
    mean_D, spread_D = channel_scaling(table.patches_nND, targets.rows)
    head = SegmentationHead(head_spec)
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
            group["lr"] = spec.lr * lr_share(step, spec.steps)
        drawn = torch.randint(0, PIXELS_KEPT, (batch, PIXELS), generator=generator)
        places = targets.places[chosen[:, None], drawn]
        classes = targets.classes[chosen[:, None], drawn].long()
        patches = torch.from_numpy(np.asarray(table.patches_nND[targets.rows[chosen.numpy()]]))
        features = features_at((patches - mean_D) / spread_D, table.grid, places)
        loss = F.cross_entropy(head.linear(features).flatten(0, 1), classes.flatten())
        optim.zero_grad()
        loss.backward()
        optim.step()
    if not math.isfinite(loss.item()):
        raise CheckFailed(
            f"the segmentation head did not learn with lr {spec.lr:g}: its loss is {loss.item()}; lower --lr"
        )
    return folded(head, mean_D, spread_D)


def lr_share(step: int, steps: int) -> float:
    """Of the learning rate: a rise, then a straight fall to 0."""
    rise = max(1.0, WARM_UP * steps)
    return min(1.0, (step + 1) / rise) * (1 - step / steps)


def features_at(patches_BND: Tensor, grid: tuple[int, int], places_BP2: Tensor) -> Tensor:
    """Features [B, P, D] mixed bilinearly from the four patches around each place; beyond the outer centres, the outer ones."""
    h, w = grid
    limits = torch.tensor([h - 1, w - 1])
    clamped = torch.minimum(places_BP2.clamp(min=0), limits.to(places_BP2.dtype))
    low = clamped.floor().long()
    high = torch.minimum(low + 1, limits)
    part = clamped - low
    images = torch.arange(len(patches_BND))[:, None]

    def mixed(row_BP: Tensor) -> Tensor:
        left, right = (patches_BND[images, row_BP * w + column[..., 1]] for column in (low, high))
        return torch.lerp(left, right, part[..., 1:])

    return torch.lerp(mixed(low[..., 0]), mixed(high[..., 0]), part[..., :1])


def channel_scaling(patches_nND: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and spread of each channel over these rows, float32 [D]; a constant channel keeps its size."""
    count, total, squares = 0, np.zeros(patches_nND.shape[2]), np.zeros(patches_nND.shape[2])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = patches_nND[rows[start : start + ROWS_AT_ONCE]].reshape(-1, patches_nND.shape[2]).astype(np.float64)
        count, total, squares = count + len(part), total + part.sum(axis=0), squares + (part**2).sum(axis=0)
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    spread[spread < 1e-6] = 1.0
    return torch.from_numpy(mean).float(), torch.from_numpy(spread).float()


def folded(head: SegmentationHead, mean_D: Tensor, spread_D: Tensor) -> SegmentationHead:
    """The head that does to raw features what `head` does to scaled ones."""
    plain = SegmentationHead(head.spec)
    with torch.no_grad():
        plain.linear.weight.copy_(head.linear.weight / spread_D)
        plain.linear.bias.copy_(head.linear.bias - plain.linear.weight @ mean_D)
    return plain.eval()


@torch.inference_mode()
def predict(head: SegmentationHead, tables: Sequence[ImageTable], row: int, hw: tuple[int, int]) -> np.ndarray:
    """Class of each pixel of one image, int64 [H, W]; of several tables (scales, mirrors) the mean probability decides.

    Some classes at a time where the image is large; each is enlarged by itself in any case, so this changes nothing.
    """
    maps = [table.logit_map(head, row) for table in tables]
    at_once = max(1, LOGITS_AT_ONCE // (hw[0] * hw[1]))
    parts = [slice(start, start + at_once) for start in range(0, head.spec.n_classes, at_once)]
    sums = [_log_sum(one, hw, parts) if min(len(maps), len(parts)) > 1 else None for one in maps]
    best_HW, class_HW = torch.full(hw, -torch.inf), torch.zeros(hw, dtype=torch.int64)
    for part in parts:
        scores_cHW = maps[0](hw, part)
        if len(maps) > 1:
            scores_cHW = _probabilities(scores_cHW, sums[0])
            for one, own in zip(maps[1:], sums[1:], strict=True):
                scores_cHW += _probabilities(one(hw, part), own)
        highest_HW, place_HW = scores_cHW.max(dim=0)
        class_HW = torch.where(highest_HW > best_HW, place_HW + part.start, class_HW)
        best_HW = torch.maximum(highest_HW, best_HW)
    return class_HW.numpy()


def _probabilities(logits_cHW: Tensor, log_sum_HW: Tensor | None) -> Tensor:
    """Of all classes, or of some, whose logits do not tell the sum over all."""
    return torch.softmax(logits_cHW, dim=0) if log_sum_HW is None else (logits_cHW - log_sum_HW).exp_()


def _log_sum(logit_map: LogitMap, hw: tuple[int, int], parts: Sequence[slice]) -> Tensor:
    """Logarithm of the sum over classes of exp(logit), [H, W]: what turns logits into probabilities."""
    total_HW = torch.full(hw, -torch.inf)
    for part in parts:
        total_HW = torch.logaddexp(total_HW, logit_map(hw, part).logsumexp(dim=0))
    return total_HW
