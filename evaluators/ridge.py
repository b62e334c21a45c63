"""Features and labels in, the accuracy of ridge regression from few images a class out, in closed form: the cheap probe.

One-hot targets are regressed on centred features of length 1. One singular value decomposition of the few training
images gives the answer at every strength of the penalty, and how each of these images fares when it is left out of its
own fit, without fitting again: the strength is chosen by that. Seconds where a linear probe takes minutes, with nothing
random but the draw of images, so it suits curves during training.
Read in this order: RidgeSpec, Ridge, evaluate, run.
Legend: n few training images, q test images, D feature size, K classes, L strengths.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from data.errors import InputError, run_cli
from evaluators.accuracy import Guesses, mean_metric, mean_per_class, rank_classes
from evaluators.bootstrap import drawn_groups
from evaluators.classification import (
    ClassificationRun,
    index_labels,
    print_result,
    run_classification,
)
from evaluators.extract import FeatureTable
from evaluators.knn import few_shot_voters
from evaluators.neighbours import unit_rows
from evaluators.presets import evaluator_cli
from evaluators.results import Measurement

VERSION = 1
STRENGTHS = tuple(float(10**power) for power in np.linspace(-4, 2, 13))
"""Penalties relative to the mean squared singular value of the features."""


@dataclass(frozen=True, kw_only=True)
class RidgeSpec:
    """The few-shot ridge protocol."""

    n_per_class: tuple[int, ...] = (5, 10)
    """Training images a class; a class that has fewer gives all it has, and sizes above every class are left out."""
    tries: int = 5
    """Random training sets of each size; try t is drawn with seed t."""
    strength: tuple[float, ...] = STRENGTHS
    """Penalties tried, relative to the features' mean squared singular value."""

    def __post_init__(self) -> None:
        if not self.n_per_class or min(self.n_per_class) < 1 or self.tries < 1:
            raise InputError("--n-per-class and --tries: wanted whole numbers of at least 1")
        if not self.strength or not all(0 < one < math.inf for one in self.strength):
            raise InputError(f"--strength {' '.join(map(str, self.strength)) or '(empty)'}: wanted numbers above 0")


class Ridge:
    """Ridge regression at any strength: min |X W + b - Y|^2 + strength * s |W|^2 with s the mean squared singular value of centred X."""

    def __init__(self, features_nD: Tensor, targets_nK: Tensor) -> None:
        self.targets_nK, self.mean_D = targets_nK, features_nD.double().mean(dim=0)
        self.mean_K = targets_nK.double().mean(dim=0)
        centred_nD = features_nD.double() - self.mean_D
        self.left_nr, self.values_r, self.right_rD = torch.linalg.svd(centred_nD, full_matrices=False)
        self.turned_rK = self.left_nr.T @ (targets_nK.double() - self.mean_K)
        self.scale = float(self.values_r.square().mean().clamp_min(1e-12))

    def _shrink_r(self, strength: float) -> Tensor:
        return self.values_r / (self.values_r.square() + strength * self.scale)

    def predict(self, queries_qD: Tensor, strength: float) -> Tensor:
        """For queries, [q, K]."""
        queries_qr = (queries_qD.double() - self.mean_D) @ self.right_rD.T
        return queries_qr @ (self._shrink_r(strength)[:, None] * self.turned_rK) + self.mean_K

    def left_out(self, strength: float) -> Tensor:
        """For each training image by the fit without it, [n, K].

        It is y - r / (1 - h) with residual r and leverage h (Allen 1974), the intercept's 1/n included.
        """
        hat_nr = self.left_nr * (self.values_r * self._shrink_r(strength))
        n = len(hat_nr)
        leverage_n1 = ((hat_nr * self.left_nr).sum(dim=1, keepdim=True) + 1 / n).clamp_max(1 - 1e-9)
        fitted_nK = hat_nr @ self.turned_rK + self.mean_K
        return self.targets_nK - (self.targets_nK - fitted_nK) / (1 - leverage_n1)


def ridge_path(
    features_nD: Tensor, targets_nK: Tensor, queries_qD: Tensor, strengths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Predictions for queries [L, q, K], and for each training image by the fit without it [L, n, K]."""
    path = Ridge(features_nD, targets_nK)
    found, left_out = ([of(one) for one in strengths] for of in (partial(path.predict, queries_qD), path.left_out))
    return torch.stack(found), torch.stack(left_out)


def evaluate(train: FeatureTable, test: FeatureTable, spec: RidgeSpec = RidgeSpec()) -> Measurement:
    """The few-shot accuracy of `test`; each try chooses its strength on its own few images."""
    train_labels_n, test_labels_q, classes = index_labels(train, test)
    bank_nD, queries_qD = unit_rows(train.features), unit_rows(test.features)
    (groups_q, too_few), identity_KK = drawn_groups(test.groups), torch.eye(len(classes))
    grid: list[dict[str, Any]] = []
    hits: dict[int, np.ndarray] = {}
    guesses: Guesses | None = None
    largest = int(np.bincount(train_labels_n).max())
    # Sizes above every class would only repeat the one before; the least is refused where none is left.
    for n_per_class in [n for n in spec.n_per_class if n <= largest] or [min(spec.n_per_class)]:
        per_try = []
        for seed, some in enumerate(few_shot_voters(train_labels_n, n_per_class, spec.tries, (n_per_class,))):
            assert some.rows is not None
            labels_n = train_labels_n[some.rows.numpy()]
            targets_nK = identity_KK[torch.from_numpy(labels_n)]
            path = Ridge(bank_nD[some.rows], targets_nK)
            # one strength at a time: all of them, for all test images and classes, are 5 GB on ImageNet
            left_out_L = [float((path.left_out(one).argmax(dim=1).numpy() == labels_n).mean()) for one in spec.strength]
            at = int(np.argmax(left_out_L))
            guesses = rank_classes(path.predict(queries_qD, spec.strength[at]).numpy(), test_labels_q)
            per_try.append(guesses.correct_N)
            grid.append(
                {
                    "n_per_class": n_per_class,
                    "try": seed,
                    "strength": spec.strength[at],
                    "train_left_out_top1": left_out_L[at],
                    "top1": float(guesses.correct_N.mean()),
                    "mean_per_class": mean_per_class(guesses.correct_N, test_labels_q),
                }
            )
        hits[n_per_class] = np.mean(per_try, axis=0)
    most = max(hits)
    assert guesses is not None
    return Measurement(
        evaluator="ridge",
        protocol=f"closed-form ridge regression on CLS features of length 1, {spec.tries} random sets of each size",
        version=VERSION,
        metrics={f"top1_{n}_per_class": mean_metric(values, groups_q) for n, values in hits.items()},
        headline=f"top1_{most}_per_class",
        selected_on="train, leave-one-out",
        chosen={"n_per_class": most},
        grid=grid,
        settings=asdict(spec),
        notes=too_few,
        predictions={
            "names": np.array(test.names),
            "labels": test_labels_q,
            "score": hits[most],
            "groups": groups_q,
            "classes": np.array(classes),
        },
    )


def run(options: ClassificationRun, spec: RidgeSpec = RidgeSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    return run_classification(options, lambda train, test: evaluate(train, test, spec))[0]


def main(
    options: Annotated[ClassificationRun, tyro.conf.arg(name="")],
    spec: Annotated[RidgeSpec, tyro.conf.arg(name="")],
) -> None:
    """Few-shot accuracy of ridge regression on the features of a frozen network."""
    print_result(run(options, spec), options.out)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
