"""Features of four layers and measured depth in, a trained DPT head out.

The scale-invariant loss of the linear probe, and beside it, as published with half its weight, a loss on how the log ratio
changes from place to place at several distances, so that edges are met. AdamW, one cosine. Features are brought to zero
mean and unit spread while training; that scaling is folded into the head's first layers afterwards.
Legend: B images, N patches, D feature size, H W places of the map.
"""

import math

import numpy as np
import torch
from torch import Tensor

from backbones.dpt import LEVELS, Reassemble
from backbones.heads import DepthHeadSpec, DptDepthHead
from data.errors import CheckFailed
from evaluators.depth_probe import SIGLOSS_EPS_M, DepthTable, Scaling, Targets, TrainSpec, sig_loss

ENLARGEMENT = 4
"""Places that the loss looks at, for each patch and axis."""
GRADIENT_WEIGHT = 0.5
GRADIENT_STEPS = (1, 2, 4, 6)
"""Distances, in places, over which changes are compared."""


def train_dpt_head(table: DepthTable, rows: np.ndarray, head_spec: DepthHeadSpec, spec: TrainSpec) -> DptDepthHead:
    """Train a head on these rows. Raises InputError as `Targets.of`, and CheckFailed where its weights are not finite."""
    generator = torch.Generator().manual_seed(spec.seed)
    targets = Targets.of(table, rows, head_spec, ENLARGEMENT)
    scaling = Scaling.of(table, rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        head = DptDepthHead(head_spec)
    typical = float(torch.exp(torch.log(targets.depth[targets.depth > 0]).mean()))
    with torch.no_grad():  # at 0 half of the places would start where no gradient is
        head.decoder.last.state_dict()["bias"].fill_(typical)
    optim = torch.optim.AdamW(head.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    h, w = table.grid
    out_hw = (ENLARGEMENT * h, ENLARGEMENT * w)
    batch = min(spec.batch, len(targets.rows))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(spec.steps):
        if len(order) < batch:
            order = torch.randperm(len(targets.rows), generator=generator)
        chosen, order = order[:batch], order[batch:]
        for group in optim.param_groups:
            group["lr"] = spec.lr * (1 + math.cos(math.pi * step / spec.steps)) / 2
        patches_BND, cls_BD = scaling.scaled(table, targets.rows[chosen.numpy()])
        predicted_BHW = head(patches_BND, cls_BD, table.grid, out_hw)
        measured_BHW = targets.depth[chosen].unflatten(1, out_hw)
        optim.zero_grad()
        loss = sig_loss(predicted_BHW, measured_BHW) + GRADIENT_WEIGHT * gradient_loss(predicted_BHW, measured_BHW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        optim.step()
    if not all(weight.isfinite().all() for weight in head.parameters()):
        raise CheckFailed(f"the DPT head did not learn with lr {spec.lr:g}: its weights are not finite; lower --lr")
    return fold_scaling_(head, scaling).eval()


def gradient_loss(predicted_BHW: Tensor, measured_BHW: Tensor) -> Tensor:
    """Mean over `GRADIENT_STEPS` of the mean absolute change of the log ratio from a place to the one so far right or below.

    Places count where both are measured; without any the loss is 0.
    """
    known_BHW = measured_BHW > 0
    ratio_BHW = torch.log(predicted_BHW + SIGLOSS_EPS_M) - torch.log(measured_BHW + SIGLOSS_EPS_M)
    total = predicted_BHW.sum() * 0
    for step in GRADIENT_STEPS:
        for axis in (1, 2):
            if ratio_BHW.shape[axis] <= step:
                continue
            n = ratio_BHW.shape[axis] - step
            both = known_BHW.narrow(axis, step, n) & known_BHW.narrow(axis, 0, n)
            change = (ratio_BHW.narrow(axis, step, n) - ratio_BHW.narrow(axis, 0, n)).abs()
            total = total + (change * both).sum() / both.sum().clamp(min=1)
    return total / len(GRADIENT_STEPS)


@torch.no_grad()
def fold_scaling_(head: DptDepthHead, scaling: Scaling) -> DptDepthHead:
    """Let the first layers take raw features instead of scaled ones; changes `head`."""
    half = len(scaling.mean) // 2
    means, spreads = (
        torch.stack([one[:half], one[half:]]).chunk(LEVELS, dim=1) for one in (scaling.mean, scaling.spread)
    )
    for reassemble, mean, spread in zip(head.decoder.reassemble, means, spreads, strict=True):
        assert isinstance(reassemble, Reassemble)
        readout = reassemble.readout  # patches first, then CLS
        readout.weight.div_(spread.flatten())
        readout.bias.sub_(readout.weight @ mean.flatten())
    return head
