"""Losses of DINO: student and teacher logits in, one scalar out.

Nothing here keeps state, reads a recipe or asks for the rank; everything is computed in float32.

Axes: V views, T teacher views, B images, K prototypes.
"""

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
