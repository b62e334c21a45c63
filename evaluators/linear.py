"""Features in, the accuracy of a linear classifier on them out (the linear probe of DINO and DINOv2).

Two combinations of features (CLS; CLS and mean patch, concatenated) times thirteen learning rates, trained on cached
features in one pass a combination. The headline is clean: combination and learning rate are chosen on held-out parts
of the training images, and the test images are looked at once. The published protocol, the best head on the test
images themselves, is reported beside it as `top1_best_on_val`.
Read in this order: LinearSpec, combinations, held_out_scores, evaluate, run.
Legend: n images, H heads (one per learning rate), C classes, D feature size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from backbones.heads import HeadManifest, LinearHead, LinearHeadSpec, save_head
from data.errors import CheckFailed, InputError, run_cli
from evaluators.accuracy import Guesses, accuracies, accuracy_metrics, rank_classes
from evaluators.classification import (
    ClassificationRun,
    index_groups,
    index_labels,
    print_result,
    run_classification,
    summary,
)
from evaluators.extract import FeatureTable
from evaluators.linear_grid import Heads, train_heads
from evaluators.results import Measurement, check_writable
from evaluators.splits import hash_bucket, held_out_words, parts_to_hold_out

VERSION = 1
LR_PER_256 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates of DINOv2's linear evaluation, for a batch of 256 images."""
FOLDS = 5
"""Parts the training images are cut into by a hash of their group; selection holds out some of them in turn."""


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """The linear protocol."""

    lr: tuple[float, ...] = LR_PER_256
    """Learning rates for a batch of 256; multiplied by batch / 256 for the batch used."""
    batch: int | None = None
    """Images a step; left out: 1024 as published, or 256 where an epoch would have fewer than 10 such batches."""
    epochs: int = 10
    """Passes over the training images."""
    min_steps: int = 1000
    """Small sets are passed over more often, until this many steps are made."""
    held_out: int | None = None
    """How many fifths of the training images are held out in turn to choose the head (1 to 5); left out: 3 below
    10,000 images, else 1."""
    select_on: Literal["train", "val"] = "train"
    """Where the headline's head is chosen: held-out training images, or, as published, the test images."""

    def __post_init__(self) -> None:
        if not self.lr or not all(0 < lr < math.inf for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.epochs < 1 or self.min_steps < 1 or (self.batch is not None and self.batch < 1):
            raise InputError("--epochs, --min-steps and --batch: wanted at least 1 each")
        if self.held_out is not None and not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training images")

    def batch_for(self, n_train: int) -> int:
        """Images a step on a training set of this size."""
        return min(n_train, self.batch or (1024 if n_train >= 10 * 1024 else 256))

    def steps_for(self, n_train: int) -> int:
        """Steps on a training set of this size."""
        return max(self.min_steps, self.epochs * (n_train // self.batch_for(n_train)))

    def folds_for(self, n_train: int) -> int:
        """Parts held out in turn."""
        return self.held_out or (3 if n_train < 10_000 else 1)


def combinations(table: FeatureTable) -> dict[str, np.ndarray]:
    """Feature combinations [n, D or 2D] by name; a network without patch tokens has the first only."""
    combined = {"cls": table.features}
    if "patch_mean" in table.columns:
        combined["cls+patch_mean"] = np.concatenate([table.features, table.columns["patch_mean"]], axis=1)
    return combined


def held_out_scores(
    features: Mapping[str, Tensor], labels_n: Tensor, folds_n: np.ndarray, n_classes: int, spec: LinearSpec, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each combination, accuracy [H] and mean cross-entropy [H] on training images that the heads did not see.

    Raises InputError where the images cannot be cut into parts.
    """
    parts = parts_to_hold_out(folds_n, spec.folds_for(len(labels_n)))
    if not parts:
        raise InputError(
            f"{len(labels_n)} training images cannot be cut into parts to choose a head on "
            "(too few, or all of one group); use --group-by none or --select-on val"
        )
    scores = {}
    for name, features_nD in features.items():
        hits, losses = [], []
        for fold in parts:
            out_n = torch.from_numpy(folds_n == fold)
            heads = _train(features_nD[~out_n], labels_n[~out_n], n_classes, spec, seed)
            logits = heads.logits(features_nD[out_n])
            truth = labels_n[out_n]
            hits.append((logits.argmax(dim=2) == truth[:, None]).float())
            losses.append(-logits.log_softmax(dim=2)[torch.arange(len(truth)), :, truth])
        scores[name] = (torch.cat(hits).mean(dim=0).numpy(), torch.cat(losses).mean(dim=0).numpy())
    return scores


def _train(features_nD: Tensor, labels_n: Tensor, n_classes: int, spec: LinearSpec, seed: int) -> Heads:
    n = len(labels_n)
    batch = spec.batch_for(n)
    rates = [lr * batch / 256 for lr in spec.lr]
    return train_heads(features_nD, labels_n, n_classes, rates, steps=spec.steps_for(n), batch=batch, seed=seed)


def evaluate(
    train: FeatureTable,
    test: FeatureTable,
    spec: LinearSpec = LinearSpec(),
    seed: int = 0,
) -> Measurement:
    """The linear accuracy of `test` after training on `train`; the chosen head is in `learned`.

    Raises InputError for sets that do not fit, CheckFailed where every head diverged.
    """
    train_labels, test_labels_n, classes = index_labels(train, test)
    labels_n = torch.from_numpy(train_labels)
    train_features = {name: torch.tensor(array) for name, array in combinations(train).items()}
    test_features = {name: torch.tensor(array) for name, array in combinations(test).items()}
    folds_n = np.array([hash_bucket(f"fold/{group}", FOLDS) for group in train.groups])
    held_out = (
        held_out_scores(train_features, labels_n, folds_n, len(classes), spec, seed)
        if spec.select_on == "train"
        else {}
    )
    grid: list[dict[str, Any]] = []
    fitted: list[tuple[Guesses, Tensor, Tensor]] = []
    for name, features_nD in train_features.items():
        heads = _train(features_nD, labels_n, len(classes), spec, seed)
        logits_nHC = heads.logits(test_features[name]).numpy()
        for head, lr in enumerate(spec.lr):
            guesses = rank_classes(logits_nHC[:, head], test_labels_n)
            entry = {"features": name, "lr_per_256": lr, "lr": lr * spec.batch_for(len(labels_n)) / 256}
            entry |= accuracies(guesses, test_labels_n, len(classes))
            entry["diverged"] = not bool(heads.finite_H[head])
            if held_out:
                entry["train_held_out_top1"] = float(held_out[name][0][head])
                loss = float(held_out[name][1][head])
                entry["train_held_out_loss"] = loss if math.isfinite(loss) else None  # JSON knows no infinity
            grid.append(entry)
            fitted.append((guesses, heads.weight_DHC[:, head].T.contiguous(), heads.bias_HC[head]))
    if all(entry["diverged"] for entry in grid):
        raise CheckFailed(f"all {len(grid)} heads diverged; lower the learning rates with --lr")
    parts = parts_to_hold_out(folds_n, spec.folds_for(len(labels_n)))
    selected_on = held_out_words(parts) if spec.select_on == "train" else "val, as published"
    return _measurement(train, test, spec, grid, fitted, test_labels_n, classes, selected_on)


def _measurement(
    train: FeatureTable,
    test: FeatureTable,
    spec: LinearSpec,
    grid: list[dict[str, Any]],
    fitted: list[tuple[Guesses, Tensor, Tensor]],
    test_labels_n: np.ndarray,
    classes: list[str],
    selected_on: str,
) -> Measurement:
    """Choose the heads and put the figures together."""
    # A diverged head guesses one class throughout, which may even be the best guess, but is no linear classifier.
    best = max(range(len(grid)), key=lambda row: (not grid[row]["diverged"], grid[row]["top1"]))
    chosen = max(range(len(grid)), key=lambda row: _merit(grid[row])) if spec.select_on == "train" else best
    guesses, weight_CD, bias_C = fitted[chosen]
    groups_n = index_groups(test)
    metrics = accuracy_metrics(guesses, test_labels_n, len(classes), groups_n)
    metrics["top1_best_on_val"] = accuracy_metrics(fitted[best][0], test_labels_n, len(classes), groups_n)["top1"]
    n = len(train)
    return Measurement(
        evaluator="linear",
        protocol=(
            f"linear classifiers on fixed features of centre views, SGD momentum 0.9, cosine, no decay, "
            f"{spec.steps_for(n)} steps of {spec.batch_for(n)} images"
        ),
        version=VERSION,
        metrics=metrics,
        headline="top1",
        selected_on=selected_on,
        chosen={key: grid[chosen][key] for key in ("features", "lr_per_256")},
        grid=grid,
        settings=asdict(spec) | {"batch": spec.batch_for(n), "steps": spec.steps_for(n)},
        notes=_notes(grid, chosen, spec),
        predictions={
            "names": np.array(test.names),
            "labels": test_labels_n,
            "predicted": guesses.predicted_N,
            "rank": guesses.rank_N,
            "score": guesses.correct_N.astype(np.float32),
            "groups": groups_n,
            "classes": np.array(classes),
        },
        learned={"weight": weight_CD.numpy(), "bias": bias_C.numpy(), "classes": np.array(classes)},
    )


def _merit(entry: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Order of choice: accuracy on held-out training images, then their cross-entropy."""
    loss = entry["train_held_out_loss"]
    return not entry["diverged"], entry["train_held_out_top1"], -math.inf if loss is None else -loss


def _notes(grid: list[dict[str, Any]], chosen: int, spec: LinearSpec) -> list[str]:
    notes = []
    lr = grid[chosen]["lr_per_256"]
    if len(spec.lr) > 1 and lr in (min(spec.lr), max(spec.lr)):
        notes.append(f"the chosen learning rate {lr:g} is at the edge of the grid; widen it with --lr")
    diverged = sum(entry["diverged"] for entry in grid)
    if diverged:
        notes.append(f"{diverged} of {len(grid)} heads diverged (learning rate too high for these features)")
    return notes


def save_linear_head(path: Path, measurement: Measurement, result: Mapping[str, Any]) -> HeadManifest:
    """Write the chosen head, bound to the backbone that `result` is about; returns its manifest.

    The manifest's `features` is a key of `combinations`: what the head wants of this backbone's centre views.
    """
    weight_CD = torch.from_numpy(measurement.learned["weight"])
    n_classes, width_in = weight_CD.shape
    head = LinearHead(LinearHeadSpec(n_classes=n_classes, width_in=width_in))
    head.load_state_dict({"linear.weight": weight_CD, "linear.bias": torch.from_numpy(measurement.learned["bias"])})
    manifest = HeadManifest(
        kind="linear",
        backbone_sha256=result["model"]["weights_sha256"],
        spec={},
        features=measurement.chosen["features"],
        classes=tuple(measurement.learned["classes"].tolist()),
        source=f"evaluators.linear on {result['data']['source']}",
        data_fingerprint=result["data"]["fingerprint"]["train"],
        metrics=result["metrics"],
    )
    return save_head(path, head, manifest)


def run(
    options: ClassificationRun,
    spec: LinearSpec = LinearSpec(),
    save_head_to: Path | None = None,
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    if save_head_to is not None:
        check_writable(save_head_to, "--save-head", ".safetensors")
    result, measurement = run_classification(options, lambda train, test: evaluate(train, test, spec, options.seed))
    if save_head_to is not None:
        save_linear_head(save_head_to, measurement, result)
    return result


def main(
    options: Annotated[ClassificationRun, tyro.conf.arg(name="")],
    spec: Annotated[LinearSpec, tyro.conf.arg(name="")],
    save_head: Path | None = None,
) -> None:
    """Accuracy of a linear classifier on the features of a frozen network.

    Args:
        save_head: Write the chosen classifier, bound to this network, to this .safetensors file.
    """
    print_result(run(options, spec, save_head), options.out, save_head)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.linear", description=summary(__doc__)))
