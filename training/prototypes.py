"""Cross-entropy over many prototypes without the logits of all rows in memory at once.

Logits of 65,536 prototypes for every crop and masked patch outweigh the rest of a small network's step. Here they are made for a few rows
at a time, and so are the gradients, at once: that takes no more products than keeping them would.

Axes: R rows, r rows of a chunk, K prototypes, E bottleneck.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from training import parallel
from training.losses import sinkhorn_knopp

CHUNK_ELEMENTS = 2**23
"""Logits made at a time, about: few enough to stay small beside the network, enough rows for fast products."""
CACHED_ELEMENTS = 2**19
"""Of those, how many go through one softmax after another: few enough to stay in a core's cache on the way."""

Targets = Callable[[slice], Tensor]
"""Rows to their targets [r, K], which it may not share with anyone; rows need not sum to 1."""


def chunks(n_rows: int, n_prototypes: int, elements: int | None = None) -> Iterator[slice]:
    """Slices of the rows, in order, each of so many logits at most (CHUNK_ELEMENTS), or of one row."""
    size = max((elements or CHUNK_ELEMENTS) // n_prototypes, 1)
    yield from (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


@dataclass(frozen=True)
class Scores:
    """A teacher's logits `bottleneck_RE @ weight_KE.T`, not multiplied out."""

    bottleneck_RE: Tensor
    weight_KE: Tensor

    def probs(self, rows: slice, temperature: float, center_K: Tensor) -> Tensor:
        """Centred and sharpened probabilities [r, K] (Caron et al. 2021, eq. 1)."""
        logits_rK = (self.bottleneck_RE[rows] / temperature) @ self.weight_KE.T
        shift_K = center_K / temperature
        for some in chunks(len(logits_rK), logits_rK.shape[1], CACHED_ELEMENTS):
            torch.softmax(logits_rK[some] - shift_K, dim=1, out=logits_rK[some])
        return logits_rK

    def sinkhorn(self, temperature: float, iterations: int) -> Tensor:
        """Probabilities [R, K] that use the prototypes evenly over all processes."""
        return sinkhorn_knopp(self.bottleneck_RE @ self.weight_KE.T, temperature, iterations, parallel.column_log_sum)

    def batch_mean(self) -> tuple[Tensor, Tensor]:
        """Mean [K] of the logits over the rows of all processes, and the number of rows."""
        n_rows = parallel.total(torch.tensor(float(len(self.bottleneck_RE)), device=self.weight_KE.device))
        mean_E = parallel.total(self.bottleneck_RE.sum(dim=0)) / n_rows.clamp_min(1)
        return self.weight_KE @ mean_E, n_rows  # the product of the mean is the mean of the products


def prototype_cross_entropy(
    bottleneck_RE: Tensor, weight_KE: Tensor, targets: Targets, weights_R: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' cross-entropies, in nats, and (without gradients) each row's own weighted one [R].

    A row's is `-sum_k targets_k log softmax(bottleneck @ weight.T / temperature)_k`.
    """
    return _PrototypeCrossEntropy.apply(bottleneck_RE, weight_KE, targets, weights_R, temperature)


def targets_of_pairs(targets_TBK: Tensor) -> Targets:
    """DINO's targets of rows [V * B], view-major: what the teacher says of all other views of the same image (Caron et al. 2021, eq. 3)."""
    n_teacher, n_images, _ = targets_TBK.shape
    sum_BK = targets_TBK.sum(dim=0)

    def of(rows: slice) -> Tensor:
        """Rows of the teacher's own views leave out what it says of the same view."""
        numbers = torch.arange(rows.start, rows.stop, device=sum_BK.device)
        targets_rK = sum_BK[numbers % n_images]
        # Counted here: to ask a GPU would be to wait for it.
        n_own = max(min(rows.stop, n_teacher * n_images) - rows.start, 0)
        targets_rK[:n_own] -= targets_TBK.flatten(0, 1)[rows.start : rows.start + n_own]
        return targets_rK

    return of


def copied_rows(targets_RK: Tensor) -> Targets:
    """Targets that were computed before."""
    return lambda rows: targets_RK[rows].clone()


def one_after_the_other(n_first: int, first: Targets, second: Targets) -> Targets:
    """The first `n_first` rows, then those of `second`."""

    def of(rows: slice) -> Tensor:
        if rows.stop <= n_first:
            return first(rows)
        rest = slice(max(rows.start - n_first, 0), rows.stop - n_first)
        return second(rest) if rows.start >= n_first else torch.cat([first(slice(rows.start, n_first)), second(rest)])

    return of


def pair_weights(n_views: int, targets_TBK: Tensor) -> Tensor:
    """Weights [V * B] with which DINO's rows add up to the mean over all pairs of different views. Raises InputError if no pair is left."""
    n_teacher, n_images, _ = targets_TBK.shape
    n_pairs = n_teacher * n_views - min(n_teacher, n_views)
    if n_pairs == 0:
        raise InputError(
            f"{n_views} student and {n_teacher} teacher views leave no pair of different views; add a view"
        )
    return targets_TBK.new_full((n_views * n_images,), 1 / (n_pairs * n_images))


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Both gradients are computed on the way forward, and only scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any, bottleneck_RE: Tensor, weight_KE: Tensor, targets: Targets, weights_R: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        losses_R = torch.zeros_like(weights_R)
        gradients = any(ctx.needs_input_grad[:2])
        of_bottleneck_RE, of_weight_KE = torch.zeros_like(bottleneck_RE), torch.zeros_like(weight_KE)
        for rows in chunks(len(bottleneck_RE), len(weight_KE)):
            z_rE, weight_r1 = bottleneck_RE[rows], weights_R[rows, None]
            targets_rK = targets(rows)
            of_logits_rK = (z_rE / temperature) @ weight_KE.T
            for some in chunks(len(of_logits_rK), of_logits_rK.shape[1], CACHED_ELEMENTS):
                losses_R[rows][some] = _losses_to_gradients_(of_logits_rK[some], targets_rK[some])
            losses_R[rows] *= weights_R[rows]
            if gradients:
                torch.mm(of_logits_rK, weight_KE, out=of_bottleneck_RE[rows])
                of_bottleneck_RE[rows] *= weight_r1 / temperature
                torch.addmm(of_weight_KE, of_logits_rK.T, z_rE * (weight_r1 / temperature), out=of_weight_KE)
            del targets_rK, of_logits_rK
        ctx.save_for_backward(of_bottleneck_RE, of_weight_KE)
        ctx.mark_non_differentiable(losses_R)
        return losses_R.sum(), losses_R

    @staticmethod
    def backward(ctx: Any, of_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_bottleneck_RE, of_weight_KE = ctx.saved_tensors
        # In place: another tensor of all prototypes costs more than the product. So there is one backward pass, as everywhere here.
        return of_bottleneck_RE.mul_(of_sum), of_weight_KE.mul_(of_sum), None, None, None


def _losses_to_gradients_(logits_rK: Tensor, targets_rK: Tensor) -> Tensor:
    """Cross-entropy [r] of each row; its gradient takes the place of the logits."""
    logs_rK = logits_rK.log_softmax(dim=1)
    losses_r = -(targets_rK * logs_rK).sum(dim=1)
    probs_rK = logs_rK.exp_().mul_(targets_rK.sum(dim=1, keepdim=True))
    torch.sub(probs_rK, targets_rK, out=logits_rK)
    return losses_r
