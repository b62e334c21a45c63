"""Losses of DINO: student and teacher logits in, one scalar out.

Nothing here keeps state, reads a recipe or asks for the rank; everything is computed in float32.

Axes: V views, T teacher views, B images, K prototypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError


def teacher_targets(logits_TBK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened teacher probabilities, same shape, rows sum to 1 (Caron et al. 2021, eq. 1 and section 3.1)."""
    return torch.softmax((logits_TBK.float() - center_K) / temperature, dim=-1)


def dino_cross_entropy(student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of different views (Caron et al. 2021, eq. 3).

    `student_VBK` are raw logits; `targets_TBK` rows sum to 1 and belong to the first T views, so pair (t, t) is skipped. Returns a
    scalar in nats. Raises InputError if no pair is left.
    """
    n_views, n_teacher = len(student_VBK), len(targets_TBK)
    n_pairs = n_teacher * n_views - min(n_teacher, n_views)
    if n_pairs == 0:
        raise InputError(
            f"{n_views} student and {n_teacher} teacher views leave no pair of different views; add a view"
        )
    log_probs_VBK = F.log_softmax(student_VBK.float() / temperature, dim=-1)
    # sum_{t != v} -targets_t . log_probs_v: all teacher views at once, then the equal pairs taken off again.
    total = torch.einsum("bk,vbk->", targets_TBK.sum(dim=0), log_probs_VBK)
    equal = torch.einsum("tbk,tbk->", targets_TBK[:n_views], log_probs_VBK[:n_teacher])
    return (equal - total) / (n_pairs * student_VBK.shape[1])


def entropy(probs_BK: Tensor) -> Tensor:
    """Mean entropy of rows of probabilities, in nats."""
    return -(probs_BK * probs_BK.clamp_min(1e-12).log()).sum(dim=-1).mean()


def column_log_sum(logits_BK: Tensor) -> Tensor:
    """log of the sum of exp over the rows, [1, K]."""
    return logits_BK.logsumexp(dim=0, keepdim=True)


def sinkhorn_knopp(
    logits_BK: Tensor,
    temperature: float,
    iterations: int = 3,
    column_log_sum: Callable[[Tensor], Tensor] = column_log_sum,
) -> Tensor:
    """Teacher probabilities whose prototypes are used evenly: [B, K], rows sum to 1 (Caron et al. 2020, section 3.1; Oquab et al. 2023).

    No gradient flows. `column_log_sum` may count the rows of other processes too. In logarithms, where no logit however large
    overflows and no prototype's share vanishes.
    """
    logs_BK = logits_BK.detach().float() / temperature
    for _ in range(iterations):
        logs_BK = (logs_BK - column_log_sum(logs_BK)).log_softmax(dim=1)
    return logs_BK.exp()


def row_cross_entropy(student_RK: Tensor, targets_RK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row [R], in nats, of raw student logits against target probabilities."""
    return -(targets_RK * F.log_softmax(student_RK.float() / temperature, dim=-1)).sum(dim=-1)


def ibot_loss(student_RK: Tensor, targets_RK: Tensor, weights_R: Tensor, n_crops: int, temperature: float) -> Tensor:
    """Cross-entropy on masked patches only (Zhou et al. 2022, eq. 3), a scalar in nats.

    R counts the masked patches of all crops; `weights_R` is one over the masked patches of the row's crop. As released, the mean is over
    all `n_crops` crops, also those without a mask.
    """
    return (weights_R * row_cross_entropy(student_RK, targets_RK, temperature)).sum() / n_crops


def koleo_loss(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the unit sphere (Sablayrolles et al. 2019; Oquab et al. 2023, section 4).

    Raises InputError for fewer than two rows, which have no neighbour.
    """
    if len(features_BD) < 2:
        raise InputError(
            f"KoLeo needs at least 2 images in a batch, got {len(features_BD)}; raise the batch size or set its weight to 0"
        )
    eps = 1e-8
    unit_BD = F.normalize(features_BD.float(), dim=-1, eps=eps)
    with torch.no_grad():
        similarity_BB = unit_BD @ unit_BD.T
        nearest_B = similarity_BB.fill_diagonal_(-1).argmax(dim=1)
    distance_B = F.pairwise_distance(unit_BD, unit_BD[nearest_B], p=2, eps=eps)
    return -torch.log(distance_B + eps).mean()
