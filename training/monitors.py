"""Numbers that tell of collapse before the loss does. All are cheap next to a step.

Axes: R rows of a batch, D features, K prototypes.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import entropy

MAX_RANK_ROWS = 256
"""Rows that the effective rank is taken over; a decomposition of more would cost as much as a step."""


@torch.no_grad()
def collapse_monitors(targets_RK: Tensor, features_RD: Tensor, center_K: Tensor) -> dict[str, float]:
    """The teacher's targets and features of a batch, and its centre, as numbers.

    `target_entropy_nats`: of one target; near 0 it is one-hot, near log K it says nothing.
    `prototypes_used`: exp of the entropy of the mean target, 1 to K; near 1 all images share one prototype.
    `effective_rank`: see `effective_rank`.
    `feature_spread`: see `feature_spread`.
    `center_norm`: length of the mean logits.
    """
    return {
        "target_entropy_nats": entropy(targets_RK).item(),
        "prototypes_used": math.exp(entropy(targets_RK.mean(dim=0)).item()),
        "effective_rank": effective_rank(features_RD),
        "feature_spread": feature_spread(features_RD),
        "center_norm": center_K.norm().item(),
    }


def feature_spread(features_RD: Tensor) -> float:
    """Mean standard deviation over a batch of unit-length features, times sqrt(D): near 1 when spread out, 0 when collapsed."""
    unit_RD = F.normalize(features_RD.float(), dim=-1)
    return (unit_RD.std(dim=0).mean() * features_RD.shape[-1] ** 0.5).item()


def effective_rank(features_RD: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred features (Roy & Vetterli 2007), 1 to min(R - 1, D).

    1 when the features lie on a line.
    """
    rows_RD = features_RD[:MAX_RANK_ROWS].float()
    singular = torch.linalg.svdvals(rows_RD - rows_RD.mean(dim=0))
    if singular.sum() == 0:
        return 1.0
    return math.exp(entropy(singular / singular.sum()).item())


def collapse_warning(found: Mapping[str, float], n_prototypes: int) -> str | None:
    """What the monitors of a step say is wrong and what to change, or None."""
    if found["feature_spread"] < 0.05:
        return (
            f"features of different images are nearly equal (spread {found['feature_spread']:.3f}); "
            "lower the learning rate or lengthen its warm-up"
        )
    if found["target_entropy_nats"] > 0.99 * math.log(n_prototypes):
        return (
            f"the teacher's targets are uniform (entropy {found['target_entropy_nats']:.2f} of {math.log(n_prototypes):.2f} nats); "
            "lower the teacher temperature or the number of prototypes"
        )
    if found["prototypes_used"] < 2:
        return (
            f"all images go to one prototype (used {found['prototypes_used']:.1f} of {n_prototypes}); "
            "raise the teacher temperature, or use Sinkhorn-Knopp targets"
        )
    if found["effective_rank"] < 2:
        return (
            f"features lie on a line (effective rank {found['effective_rank']:.1f}); "
            "lower the learning rate, or raise the batch size or the weight of KoLeo"
        )
    return None
