"""Features and labels in, multinomial logistic regressions along a path of C out, each warm-started from the last.

The objective is scikit-learn's, C * sum of cross-entropies + |W|^2 / 2 with a free intercept, divided by C n:
mean cross-entropy + |W|^2 / (2 C n). Read in this order: Problem, Problem.along, Memory, fit_path.

What makes it fast, per value of C:
- Features are centred and rotated once into the eigenbasis of their covariance. There the Hessian's diagonal is about
  c_k ev_j + 1 / (C n) with c_k the mean of p_k (1 - p_k), and its inverse is where L-BFGS starts from.
- Logits are linear in the step, so a line search costs no product with the features: two products an iteration.
- The first step of a new C goes along the change between the last two solutions, for no product at all.
- L-BFGS keeps its memory from one C to the next; only the part of the penalty is replaced.

Legend: n images, D features (rotated, and a constant 1 for the intercept), K classes.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MEMORY = 12
"""Pairs of steps and gradient changes that L-BFGS remembers."""
TOLERANCE = 1e-4
"""Of the relative gradient; about what single precision can tell."""
MIN_PROGRESS = 1e-8
"""Relative gain of the objective below which single precision has nothing left to find."""


Stop = Literal["gradient", "precision", "iterations"]
"""Why a fit ended: its gradient is small enough; single precision finds no better point; out of iterations."""


@dataclass(frozen=True)
class Fit:
    """The solution at one C."""

    C: float
    weight_KD: Tensor
    """For the features as given, [K, D] without the constant."""
    bias_K: Tensor
    objective: float
    """Mean cross-entropy + |W|^2 / (2 C n), nats."""
    gradient: float
    """Largest entry of the gradient relative to zero weights: divided by its value there, and by the share of the
    objective there that is left, since both shrink together as C grows."""
    iterations: int
    products: int
    """Products of all features with a matrix of K columns."""
    stopped: Stop


@dataclass(frozen=True)
class Point:
    """Where a line search stands."""

    value: float
    slope: float
    probability_nK: Tensor


class Problem:
    """The training images, in the basis in which they are easiest to fit."""

    def __init__(self, features_nD: Tensor, labels_n: Tensor, n_classes: int) -> None:
        n = len(features_nD)
        self.n, self.n_classes, self.labels_n1 = n, n_classes, labels_n[:, None]
        self.mean_D = features_nD.mean(dim=0, dtype=torch.float64)
        centred = features_nD - self.mean_D.float()
        covariance_DD = (centred.T @ centred).double() / n
        values_D, self.basis_DD = torch.linalg.eigh(covariance_DD)
        self.x_nD = torch.cat([centred @ self.basis_DD.float(), torch.ones(n, 1)], dim=1)
        del centred
        self.spread_D1 = torch.cat([values_D.clamp_min(0).float(), torch.ones(1)])[:, None]
        self.penalised_D1 = torch.ones_like(self.spread_D1)
        self.penalised_D1[-1] = 0
        self.products = 0
        self._buffer_nK = torch.empty(n, n_classes)
        at_zero_DK = self.gradient(torch.full((n, n_classes), 1 / n_classes))
        self.zero_gradient = max(float(at_zero_DK.abs().max()), 1e-12)  # all-zero features have none

    def logits(self, weight_DK: Tensor) -> Tensor:
        """[n, K] of a weight or a direction."""
        self.products += 1
        return self.x_nD @ weight_DK

    def gradient(self, probability_nK: Tensor) -> Tensor:
        """Of the mean cross-entropy, [D, K]. Changes its argument."""
        self.products += 1
        probability_nK.scatter_add_(1, self.labels_n1, torch.full((self.n, 1), -1.0))
        return (self.x_nD.T @ probability_nK).div_(self.n)

    def along(self, logits_nK: Tensor, change_nK: Tensor, t: float, penalty: tuple[float, float, float]) -> Point:
        """Objective and slope at step t; `penalty` are the coefficients of 1, t and t^2. Overwrites the last point's
        probabilities."""
        shifted = torch.add(logits_nK, change_nK, alpha=t, out=self._buffer_nK)
        own_n = shifted.gather(1, self.labels_n1)[:, 0].double()
        top_n1 = shifted.amax(dim=1, keepdim=True)
        powers = shifted.sub_(top_n1).exp_()
        total_n1 = powers.sum(dim=1, keepdim=True)
        loss = float((total_n1[:, 0].double().log() + top_n1[:, 0] - own_n).mean())
        probability_nK = powers.div_(total_n1)
        expected = torch.linalg.vecdot(probability_nK, change_nK).double().sum()
        slope = float((expected - change_nK.gather(1, self.labels_n1).double().sum()) / self.n)
        constant, linear, square = penalty
        return Point(loss + constant + linear * t + square * t * t, slope + linear + 2 * square * t, probability_nK)

    def curvature(self, probability_nK: Tensor) -> Tensor:
        """c_k = mean p_k (1 - p_k) [1, K], kept away from 0."""
        mean_K = probability_nK.mean(dim=0)
        square_K = torch.linalg.vecdot(probability_nK.T, probability_nK.T) / self.n
        return (mean_K - square_K).clamp_min(1e-6)[None, :]

    def in_given_basis(self, weight_DK: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K] for features as they were given."""
        weight_KD = (self.basis_DD @ weight_DK[:-1].double()).T
        return weight_KD.float(), (weight_DK[-1].double() - weight_KD @ self.mean_D).float()


class Memory:
    """What L-BFGS knows of the Hessian: pairs of steps and changes of the cross-entropy's gradient."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)

    def add(self, step_DK: Tensor, change_DK: Tensor) -> None:
        """Remember a pair, unless it says that the function is not convex."""
        if float((step_DK * change_DK).sum()) > 0:
            self._pairs.append((step_DK, change_DK))

    def direction(self, gradient_DK: Tensor, inverse_DK: Tensor, penalty_D1: Tensor) -> Tensor:
        """Minus the inverse Hessian times the gradient (Nocedal and Wright, algorithm 7.4)."""
        pairs = [(s, y + penalty_D1 * s) for s, y in self._pairs]
        scale = [1 / float((s * y).sum()) for s, y in pairs]
        q_DK, alphas = gradient_DK.clone(), []
        for (s, y), rho in zip(reversed(pairs), reversed(scale), strict=True):
            alphas.append(rho * float((s * q_DK).sum()))
            q_DK.sub_(y, alpha=alphas[-1])
        gain = 1.0
        if pairs:
            s, y = pairs[-1]
            gain = float((s * y).sum() / (y * y * inverse_DK).sum())
        q_DK.mul_(inverse_DK).mul_(gain)
        for (s, y), rho, alpha in zip(pairs, scale, reversed(alphas), strict=True):
            q_DK.add_(s, alpha=alpha - rho * float((y * q_DK).sum()))
        return q_DK.neg_()


def fit_path(
    features_nD: Tensor,
    labels_n: Tensor,
    n_classes: int,
    Cs: Sequence[float],
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Fit]:
    """A fit at every C, in ascending order of C. `tolerance` bounds the gradient relative to its value at zero weights."""
    problem = Problem(features_nD, labels_n, n_classes)
    weight_DK = torch.zeros(problem.x_nD.shape[1], n_classes)
    logits_nK = torch.zeros(problem.n, n_classes)
    memory, fits = Memory(), []
    move: tuple[Tensor, Tensor] | None = None
    for number, C in enumerate(sorted(Cs)):
        penalty_D1 = problem.penalised_D1 / (C * problem.n)
        before = (weight_DK.clone(), logits_nK.clone()) if number else None
        problem.products = 0
        if move is not None:
            step = _search(problem, weight_DK, logits_nK, *move, penalty_D1)
            if step is not None:
                weight_DK.add_(move[0], alpha=step[0])
                logits_nK.add_(move[1], alpha=step[0])
        found = _minimise(problem, weight_DK, logits_nK, penalty_D1, memory, tolerance, max_iterations)
        value, gradient, iterations, stopped = found
        where = problem.in_given_basis(weight_DK)
        fits.append(Fit(C, *where, value, gradient, iterations, problem.products, stopped))
        if before is not None:
            move = (weight_DK - before[0], logits_nK - before[1])
        if progress:
            progress(number + 1, len(Cs))
    return fits


def _minimise(
    problem: Problem,
    weight_DK: Tensor,
    logits_nK: Tensor,
    penalty_D1: Tensor,
    memory: Memory,
    tolerance: float,
    max_iterations: int,
) -> tuple[float, float, int, Stop]:
    """L-BFGS from where the weights are, which it changes; returns objective, relative gradient, iterations, why it ended."""
    still = torch.zeros(1).expand_as(logits_nK)
    point = problem.along(logits_nK, still, 0.0, _penalty(weight_DK, torch.zeros_like(weight_DK), penalty_D1))
    inverse_DK = 1 / (problem.curvature(point.probability_nK) * problem.spread_D1 + penalty_D1 + 1e-12)
    slope_DK = problem.gradient(point.probability_nK)
    idle = iteration = 0
    while True:
        gradient_DK = slope_DK + penalty_D1 * weight_DK
        left = point.value / math.log(problem.n_classes)
        size = float(gradient_DK.abs().max()) / (problem.zero_gradient * max(min(left, 1.0), 1e-12))
        if size <= tolerance:
            return point.value, size, iteration, "gradient"
        if idle == 2:
            return point.value, size, iteration, "precision"
        if iteration == max_iterations:
            return point.value, size, iteration, "iterations"
        iteration += 1
        direction_DK = memory.direction(gradient_DK, inverse_DK, penalty_D1)
        change_nK = problem.logits(direction_DK)
        found = _search(problem, weight_DK, logits_nK, direction_DK, change_nK, penalty_D1)
        if found is None:
            return point.value, size, iteration, "precision"
        t, reached = found
        idle = idle + 1 if point.value - reached.value <= MIN_PROGRESS * abs(point.value) else 0
        point = reached
        weight_DK.add_(direction_DK, alpha=t)
        logits_nK.add_(change_nK, alpha=t)
        next_slope_DK = problem.gradient(point.probability_nK)
        memory.add(direction_DK.mul_(t), next_slope_DK - slope_DK)
        slope_DK = next_slope_DK


def _penalty(weight_DK: Tensor, direction_DK: Tensor, penalty_D1: Tensor) -> tuple[float, float, float]:
    """Coefficients of |W + t d|^2 / (2 C n) in t."""
    constant = float((penalty_D1 * weight_DK).mul_(weight_DK).sum()) / 2
    linear = float((penalty_D1 * weight_DK).mul_(direction_DK).sum())
    return constant, linear, float((penalty_D1 * direction_DK).mul_(direction_DK).sum()) / 2


def _search(
    problem: Problem,
    weight_DK: Tensor,
    logits_nK: Tensor,
    direction_DK: Tensor,
    change_nK: Tensor,
    penalty_D1: Tensor,
    most: int = 12,
) -> tuple[float, Point] | None:
    """A step at which the slope has fallen to a third: secants, kept within a bracket. None where there is no descent.

    The point's probabilities are those of the step returned.
    """
    penalty = _penalty(weight_DK, direction_DK, penalty_D1)
    start = problem.along(logits_nK, change_nK, 0.0, penalty)
    if start.slope >= 0:
        return None
    low, low_slope, high, high_slope, t = 0.0, start.slope, math.inf, math.nan, 1.0
    for _ in range(most):
        point = problem.along(logits_nK, change_nK, t, penalty)
        if math.isfinite(point.value) and abs(point.slope) <= abs(start.slope) / 3:
            break
        if point.slope < 0 and math.isfinite(point.value):
            low, low_slope = t, point.slope
        else:
            high, high_slope = t, point.slope
        if math.isinf(high):
            t = 3 * t
        else:
            secant = (
                low - low_slope * (high - low) / (high_slope - low_slope) if math.isfinite(high_slope) else math.nan
            )
            margin = 0.05 * (high - low)
            t = secant if low + margin < secant < high - margin else (low + high) / 2
    return (t, point) if point.value < start.value else None
