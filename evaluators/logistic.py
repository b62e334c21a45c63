"""Features in, the accuracy of a logistic regression on them out, along the 45 values of C of DINOv2.

C is chosen on held-out training images (one tenth of the groups), then all training images are fitted once more with
it. The published alternative, the C that is best on the test images, is reported beside it as `top1_best_on_val`. Every
C comes with its objective and gradient, so that a winner that nobody's solver has converged at is seen as one.
Read in this order: LogisticSpec, fit, evaluate, run.
Legend: n images, K classes, D feature size.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from data.errors import InputError, run_cli
from data.preprocess import Preprocess
from evaluators.accuracy import Guesses, accuracies, accuracy_metrics, rank_classes
from evaluators.bootstrap import drawn_groups
from evaluators.classification import (
    ClassificationRun,
    check_head_place,
    index_labels,
    print_result,
    progress_bar,
    run_classification,
)
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.linear import save_linear_head
from evaluators.logistic_path import Fit, fit_path
from evaluators.presets import check_words, evaluator_cli
from evaluators.results import Measurement
from evaluators.splits import hash_bucket
from evaluators.view_batches import ViewSpec

VERSION = 1
PROTOCOL_C = tuple(float(10**power) for power in np.linspace(-6, 5, 45))
"""Values of C of DINOv2's evaluation."""
OTHER_VIEWS = (
    "the saved head was fitted to images without the margin that is cut off where the network is served; leave --preset out "
    "to fit it to what it will see"
)
HELD_OUT_ONE_IN = 10
"""Share of the training groups on which C is chosen."""


@dataclass(frozen=True, kw_only=True)
class LogisticSpec:
    """The logistic regression protocol."""

    preset: Literal["dino", "dinov2"] | None = None
    """What the network is shown. dinov2, as published: the short side is resized to the size of the crop, with no margin.
    dino and left out: the centre views of k-NN and the linear probe, so that features are extracted once (DINO
    published no such evaluation)."""
    C: tuple[float, ...] = PROTOCOL_C
    """Inverse strengths of the penalty, as scikit-learn counts them; left out: 45 from 1e-6 to 1e5."""
    backend: Literal["path", "sklearn"] = "path"
    """path: our solver, warm-started along C. sklearn: scikit-learn's, cold at each C, the reference."""
    max_iterations: int = 1000
    """At each C."""
    select_on: Literal["train", "val"] = "train"
    """Where the headline's C is chosen: held-out training images, or the test images."""

    def __post_init__(self) -> None:
        check_words(self)
        if not self.C or not all(0 < C < math.inf for C in self.C):
            raise InputError(f"--C {' '.join(map(str, self.C)) or '(empty)'}: wanted numbers above 0")
        if self.max_iterations < 1:
            raise InputError(f"--max-iterations {self.max_iterations}: wanted at least 1")


def fit(features_nD: Tensor, labels_n: Tensor, n_classes: int, Cs: Sequence[float], spec: LogisticSpec) -> list[Fit]:
    """A regression at every C, ascending. Classes without images in the labels get no share."""
    if spec.backend == "sklearn":
        return fit_sklearn(features_nD, labels_n, n_classes, Cs, spec.max_iterations)
    with progress_bar("C path") as progress:
        return fit_path(features_nD, labels_n, n_classes, Cs, max_iterations=spec.max_iterations, progress=progress)


def fit_sklearn(
    features_nD: Tensor, labels_n: Tensor, n_classes: int, Cs: Sequence[float], max_iterations: int
) -> list[Fit]:
    """The reference: scikit-learn's L-BFGS, cold at each C. Its gradient is not known, and given as NaN."""
    from sklearn.linear_model import LogisticRegression  # half a second that the other backend need not wait for

    fits = []
    with progress_bar("C path, scikit-learn") as progress:
        for number, C in enumerate(sorted(Cs)):
            model = LogisticRegression(C=C, tol=1e-12, max_iter=max_iterations)
            with warnings.catch_warnings():  # of too few iterations, which the result tells
                warnings.simplefilter("ignore")
                model.fit(features_nD.numpy(), labels_n.numpy())
            weight_KD, bias_K = torch.zeros(n_classes, features_nD.shape[1]), torch.full((n_classes,), -math.inf)
            seen, coefficients = torch.from_numpy(model.classes_), torch.from_numpy(model.coef_).float()
            intercepts = torch.from_numpy(model.intercept_).float()
            if len(seen) == 2:  # scikit-learn keeps one row for two classes; half to each is the same
                coefficients, intercepts = (
                    torch.cat([-coefficients, coefficients]) / 2,
                    torch.cat([-intercepts, intercepts]) / 2,
                )
            weight_KD[seen], bias_K[seen] = coefficients, intercepts
            loss = torch.nn.functional.cross_entropy(features_nD @ weight_KD.T + bias_K, labels_n)
            objective = float(loss + weight_KD.square().sum() / (2 * C * len(labels_n)))
            iterations = int(model.n_iter_[0])
            stopped = "iterations" if iterations == max_iterations else "precision"
            fits.append(Fit(C, weight_KD, bias_K, objective, math.nan, iterations, 0, stopped))  # type: ignore[arg-type]
            progress(number + 1, len(Cs))
    return fits


def evaluate(train: FeatureTable, test: FeatureTable, spec: LogisticSpec = LogisticSpec()) -> Measurement:
    """The accuracy of `test` after fitting `train`. Raises InputError where nothing can be held out."""
    train_labels, test_labels_n, classes = index_labels(train, test)
    labels_n, features_nD = torch.from_numpy(train_labels), torch.tensor(train.features)
    test_nD = torch.tensor(test.features)
    out_n = torch.tensor([hash_bucket(f"fold/{group}", HELD_OUT_ONE_IN) == 0 for group in train.groups])
    held_out = spec.select_on == "train" and len(spec.C) > 1
    if held_out and (not out_n.any() or len(labels_n[~out_n].unique()) < 2):
        raise InputError(
            f"{len(train)} training images are too few to choose C on a tenth of them; name one --C, or use --select-on val"
        )
    if len(labels_n.unique()) < 2:
        raise InputError(
            f"all {len(train)} training images are of class {train.labels[0]!r}; wanted at least two classes"
        )
    seen_n = ~out_n if held_out else torch.ones_like(out_n)
    fits = fit(features_nD[seen_n], labels_n[seen_n], len(classes), spec.C, spec)
    grid: list[dict[str, Any]] = []
    for one in fits:
        entry: dict[str, Any] = {
            "C": one.C,
            **accuracies(_guess(one, test_nD, test_labels_n), test_labels_n, len(classes)),
        }
        if held_out:
            entry["train_held_out_top1"] = _top1(one, features_nD[out_n], train_labels[out_n.numpy()])
        grid.append(entry | _convergence(one))
    chosen = max(grid, key=lambda entry: entry["train_held_out_top1" if held_out else "top1"])
    best = max(grid, key=lambda entry: entry["top1"])
    final = dict(zip(sorted(spec.C), fits, strict=True))
    if held_out:  # all training images, at the C that were chosen
        wanted = sorted({chosen["C"], best["C"]})
        final = dict(zip(wanted, fit(features_nD, labels_n, len(classes), wanted, spec), strict=True))
    groups_n, too_few = drawn_groups(test.groups)
    guesses = _guess(final[chosen["C"]], test_nD, test_labels_n)
    metrics = accuracy_metrics(guesses, test_labels_n, len(classes), groups_n)
    best_guesses = _guess(final[best["C"]], test_nD, test_labels_n)
    metrics["top1_best_on_val"] = accuracy_metrics(best_guesses, test_labels_n, len(classes), groups_n)["top1"]
    winner = final[chosen["C"]]
    return Measurement(
        evaluator="logistic",
        protocol=f"multinomial logistic regression on CLS features as they are, L2 penalty, {len(spec.C)} values of C",
        version=VERSION,
        metrics=metrics,
        headline="top1",
        selected_on="train, one held-out tenth" if held_out else "val" if len(spec.C) > 1 else "nothing",
        chosen={"C": chosen["C"], "features": "cls"},
        grid=grid,
        settings=asdict(spec) | {"C": list(spec.C)},
        notes=_notes(grid, chosen, winner) + too_few,
        predictions={
            "names": np.array(test.names),
            "labels": test_labels_n,
            "predicted": guesses.predicted_N,
            "rank": guesses.rank_N,
            "score": guesses.correct_N.astype(np.float32),
            "groups": groups_n,
            "classes": np.array(classes),
        },
        learned={
            "weight": winner.weight_KD.numpy(),
            "bias": np.maximum(winner.bias_K.numpy(), np.finfo(np.float32).min / 2),
            "classes": np.array(classes),
        },
    )


def _guess(one: Fit, features_nD: Tensor, labels_n: np.ndarray) -> Guesses:
    return rank_classes((features_nD @ one.weight_KD.T + one.bias_K).numpy(), labels_n)


def _top1(one: Fit, features_nD: Tensor, labels_n: np.ndarray) -> float:
    return float(_guess(one, features_nD, labels_n).correct_N.mean())


def _convergence(one: Fit) -> dict[str, Any]:
    gradient = one.gradient if math.isfinite(one.gradient) else None
    return {"objective": one.objective, "gradient": gradient, "iterations": one.iterations, "stopped": one.stopped}


def _notes(grid: Sequence[dict[str, Any]], chosen: dict[str, Any], winner: Fit) -> list[str]:
    notes = []
    if len(grid) > 1 and chosen["C"] in (grid[0]["C"], grid[-1]["C"]):
        notes.append(f"the chosen C {chosen['C']:g} is at the edge of the path; widen it with --C")
    if chosen["stopped"] == "iterations" or (chosen["C"] > 100 and chosen["stopped"] != "gradient"):
        notes.append(
            f"at the chosen C {chosen['C']:g} the fit has not converged: accuracies there depend on where a solver stops"
        )
    gradient = f"relative gradient {winner.gradient:.1e}" if math.isfinite(winner.gradient) else "gradient not told"
    notes.append(f"fit at the chosen C: {gradient} after {winner.iterations} iterations")
    return notes


def run(
    options: ClassificationRun, spec: LogisticSpec = LogisticSpec(), save_head_to: Path | None = None
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    if save_head_to is not None:
        check_head_place(save_head_to)

    margin_px = 0

    def shown(preprocess: Preprocess) -> ExtractSpec:
        if spec.preset != "dinov2":
            return ExtractSpec()
        nonlocal margin_px
        margin_px = preprocess.resize_px - preprocess.size_px
        return ExtractSpec(view=ViewSpec(resize_px=preprocess.size_px))

    def fitted(train: FeatureTable, test: FeatureTable) -> Measurement:
        found = evaluate(train, test, spec)
        if save_head_to is not None and margin_px:
            found.notes.append(OTHER_VIEWS)
        return found

    result, measurement = run_classification(options, fitted, shown)
    if save_head_to is not None:
        save_linear_head(save_head_to, measurement, result)
    return result


def main(
    options: Annotated[ClassificationRun, tyro.conf.arg(name="")],
    spec: Annotated[LogisticSpec, tyro.conf.arg(name="")],
    save_head: Path | None = None,
) -> None:
    """Accuracy of a logistic regression on the features of a frozen network.

    Args:
        save_head: Write the chosen classifier, bound to this network, to this .safetensors file.
    """
    print_result(run(options, spec, save_head), options.out, save_head)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
