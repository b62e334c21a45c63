"""Numbers that tell of collapse before the loss does. All are cheap next to a step.

Axes: R rows of a batch, D features, K prototypes.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from training import parallel

MAX_RANK_ROWS = 256
"""Rows that the effective rank is taken over; a decomposition of more would cost as much as a step."""
RANK_FLOOR = 1e-12
"""Eigenvalues below this share of the largest are rounding."""
MAX_CENTER = 10.0
"""Root mean square of a centre. Logits are cosines, and their mean at most 1, while prototypes keep their magnitude."""
MIN_KL = 1e-3
"""In nats, of the student from the teacher."""


@torch.no_grad()
def collapse_monitors(
    targets_RK: Tensor,
    features_RD: Tensor,
    center_K: Tensor,
    *,
    student_RK: Tensor | None = None,
    patch_targets_RK: Tensor | None = None,
    patch_features_RD: Tensor | None = None,
    patch_center_K: Tensor | None = None,
) -> dict[str, float]:
    """Numbers that tell of collapse, over the images of all processes, in one transfer from the device.

    Given are the teacher's probabilities for and features of CLS tokens, its centre, and perhaps the student's probabilities and what
    the teacher says of masked patches.

    `target_entropy_nats`: of one target; near 0 it is one-hot, near log K it says nothing. `student_entropy_nats`: of one prediction.
    `prototypes_used`: exp of the entropy of the mean target, 1 to K; near 1 all images share one prototype.
    `effective_rank`: see `effective_rank`. `feature_spread`: see `feature_spread`; `patch_spread` the same of masked patches.
    `center_norm`: length of the mean logits.
    `ibot_...`: the same of masked patches; absent in a step that masks fewer than two.
    """
    found = {
        **target_monitors(targets_RK, center_K),
        "effective_rank": effective_rank(parallel.all_rows(features_RD.float())),
        "feature_spread": feature_spread(parallel.all_rows(features_RD.float())),
    }
    if student_RK is not None:
        found["student_entropy_nats"] = mean_row(row_entropy(student_RK)[:, None])[0]
    if patch_targets_RK is not None and patch_center_K is not None:
        n_rows = parallel.total(torch.tensor(float(len(patch_targets_RK)), device=center_K.device))
        if n_rows >= 2:
            patches = target_monitors(patch_targets_RK, patch_center_K)
            found |= {f"ibot_{name}": value for name, value in patches.items()}
    if patch_features_RD is not None and len(patch_features_RD) >= 2:
        found["patch_spread"] = feature_spread(patch_features_RD)
    return dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist(), strict=True))


@torch.no_grad()
def predictions(logits_VBK: Tensor, temperature: float) -> Tensor:
    """The student's probabilities [V * B, K] of some views' logits."""
    return torch.softmax(logits_VBK.detach().float().flatten(0, 1) / temperature, dim=-1)


def target_monitors(targets_RK: Tensor, center_K: Tensor) -> dict[str, Tensor]:
    """Of the teacher's probabilities and the centre of one head; see `collapse_monitors`."""
    return {
        "target_entropy_nats": mean_row(row_entropy(targets_RK)[:, None])[0],
        "prototypes_used": row_entropy(mean_row(targets_RK)).exp(),
        "center_norm": center_K.float().norm(),
    }


def row_entropy(probs_RK: Tensor) -> Tensor:
    """Entropy of each row, in nats."""
    return torch.special.entr(probs_RK).sum(dim=-1)


def mean_row(rows_RK: Tensor) -> Tensor:
    """The mean row over all processes, [K]."""
    n_rows = parallel.total(torch.tensor(float(len(rows_RK)), device=rows_RK.device))
    return parallel.total(rows_RK.sum(dim=0)) / n_rows.clamp_min(1)


def feature_spread(features_RD: Tensor) -> Tensor:
    """Mean standard deviation over a batch of unit-length features, times sqrt(D): near 1 when spread out, 0 when collapsed."""
    unit_RD = F.normalize(features_RD.float(), dim=-1)
    return unit_RD.std(dim=0).mean() * features_RD.shape[-1] ** 0.5


def effective_rank(features_RD: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred features (Roy & Vetterli 2007), 1 to min(R - 1, D).

    1 when the features lie on a line. The singular values come from the smaller of the two Gram matrices, in float64: a fraction of the
    cost of a decomposition, and exact enough.
    """
    rows_RD = features_RD[:MAX_RANK_ROWS].double()
    rows_RD = rows_RD - rows_RD.mean(dim=0)
    gram = rows_RD @ rows_RD.T if len(rows_RD) < rows_RD.shape[1] else rows_RD.T @ rows_RD
    # Rounding leaves eigenvalues a hair off zero, also below it; their roots would count.
    squared = torch.linalg.eigvalsh(gram)
    squared = torch.where(squared > squared[-1] * RANK_FLOOR, squared, 0.0)
    singular = squared.clamp_min(0).sqrt()
    return row_entropy(singular / singular.sum().clamp_min(1e-30)).exp()


def collapse_warnings(
    found: Mapping[str, float], n_prototypes: int, n_patch_prototypes: int | None = None
) -> dict[str, str]:
    """What the monitors of a step say is wrong and what to change, by kind; the root of the trouble first. Empty if all is well."""
    said: dict[str, str] = {}
    heads = [("", n_prototypes, "the teacher's targets")]
    if n_patch_prototypes and "ibot_prototypes_used" in found:
        heads.append(("ibot_", n_patch_prototypes, "the teacher's targets of masked patches"))
    for prefix, k, targets in heads:
        center = found[f"{prefix}center_norm"] / k**0.5
        if not center < MAX_CENTER:
            said[f"{prefix}centre"] = (
                f"logits behind {targets} grow without bound (root mean square of their centre {center:.0f}); "
                "keep the prototypes' magnitude fixed (freeze_magnitude), or lower the learning rate"
            )
    if found["feature_spread"] < 0.05:
        said["one point"] = (
            f"features of different images are nearly equal (spread {found['feature_spread']:.3f}, healthy is near 1); "
            "lower the learning rate or lengthen its warm-up"
        )
    elif found["effective_rank"] < 2:
        said["a line"] = (
            f"features lie on a line (effective rank {found['effective_rank']:.1f}); "
            "lower the learning rate, or raise the batch size or the weight of KoLeo"
        )
    if found.get("patch_spread", 1.0) < 0.05:
        said["one patch"] = (
            f"features of different patches are nearly equal (spread {found['patch_spread']:.3f}); "
            "lower the learning rate, or mask less of each image"
        )
    for prefix, k, targets in heads:
        said |= target_warnings(
            found[f"{prefix}target_entropy_nats"], found[f"{prefix}prototypes_used"], k, prefix, targets
        )
    if found.get("kl_nats", MIN_KL) < MIN_KL and not said:
        said["nothing to learn"] = (
            f"the student already says what the teacher says (KL {found['kl_nats']:.5f} nats); "
            "lower the teacher's temperature or momentum, or let views differ more"
        )
    return said


def target_warnings(entropy_nats: float, used: float, n_prototypes: int, prefix: str, targets: str) -> dict[str, str]:
    """What is wrong with the targets of one head, by kind."""
    highest = math.log(n_prototypes)
    if entropy_nats > 0.99 * highest:
        return {
            f"{prefix}uniform": f"{targets} are uniform (entropy {entropy_nats:.2f} of {highest:.2f} nats); "
            "lower the teacher temperature or the number of prototypes"
        }
    if used < 2:
        return {
            f"{prefix}one prototype": f"{targets} all fall on one prototype (used {used:.1f} of {n_prototypes}); "
            "raise the teacher temperature, or use Sinkhorn-Knopp targets"
        }
    return {}
