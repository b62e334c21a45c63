"""Features in, the accuracy of a linear classifier on them out (the linear probe of DINO and DINOv2).

Combinations of features times learning rates, all heads trained side by side on the same batches of features that were
extracted once: of centre views, or, as published, of randomly cropped and flipped ones (a fixed number of them, so that
the network need not run again at each step). The headline is clean: combination and learning rate are chosen on held-out
parts of the training images, and the test images are looked at once. The published protocol, the best head on the test
images themselves, is reported beside it as `top1_best_on_val`.
Read in this order: LinearSpec, held_out_scores, evaluate, run.
Legend: n images, H heads (one per learning rate), C classes, D feature size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from backbones.heads import HeadManifest, LinearHead, LinearHeadSpec, save_head
from data.errors import CheckFailed, InputError, run_cli
from data.preprocess import Interpolation
from evaluators.accuracy import Guesses, accuracies, accuracy_metrics, rank_classes
from evaluators.bootstrap import drawn_groups
from evaluators.classification import (
    ClassificationRun,
    check_head_place,
    index_labels,
    print_result,
    run_classification,
)
from evaluators.combinations import Wide, has_cls, names_for, wide
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.imagenet_sets import measure_sets, open_sets, parse_sets
from evaluators.linear_grid import Anneal, Heads, train_grid
from evaluators.presets import check_words, evaluator_cli, settled_by, was_given
from evaluators.published_figures import published_reference
from evaluators.results import Measurement, check_writable, metrics_json, save_result
from evaluators.splits import FOLDS, hash_bucket, held_out_words, parts_to_hold_out
from evaluators.view_batches import ViewSpec

VERSION, DINO_VERSION = 2, 3
"""2: chooses by held-out loss among heads of like accuracy. 3, of `--preset dino` alone: lowers its rate once an epoch."""
LR_PER_256 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates of DINOv2's linear evaluation, for a batch of 256 images."""
DINO_LR_PER_256 = (1e-3,)
"""DINO's default, for a batch of 256 images."""
DINO_RESNET_LR_PER_256 = (0.075,)
"""For features of a ResNet, from which the default learns next to nothing: 0.3 at the published batch of 1024, as in the authors' log."""
ROWS_AT_ONCE = 8192
"""Test images that are classified at a time."""
LOGITS_AT_ONCE = 2**24
"""Logits of held-out images by all heads of a combination, about; those of a fifth of ImageNet would take 13 GB."""


PRESETS: dict[str, dict[str, Any]] = {
    "dino": {"lr": DINO_LR_PER_256, "epochs": 100, "views": 10},
    "dinov2": {"lr": LR_PER_256, "epochs": 10, "views": 10},
}
"""What `--preset` sets, beside the feature combinations and the filter of the crops."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """The linear protocol."""

    preset: Literal["dino", "dinov2"] | None = None
    """dinov2: CLS of the last 1 and 4 blocks, each without and with the mean patch, times 13 learning rates: 52 heads, 10
    epochs, rates lowered each step. dino: CLS of the last 4 blocks (ViT-S), CLS with mean patch (wider), or the embedding of a
    ResNet, 1 learning rate, 100 epochs, lowered after each. Both on cropped and flipped training images. The last 4 blocks need
    torch (a checkpoint, not an exported file or a server).
    Left out: CLS without and with mean patch of the last block, 13 learning rates, centre views, on any engine."""
    lr: tuple[float, ...] = LR_PER_256
    """Learning rates for a batch of 256; multiplied by batch / 256 for the batch used."""
    batch: int | None = None
    """Images a step; left out: 1024 as published, or 256 where an epoch would have fewer than 10 such batches."""
    epochs: int = 10
    """Passes over the training images."""
    min_steps: int = 1000
    """Small sets are passed over more often, until this many steps are made."""
    views: int = 0
    """Randomly cropped and flipped views of each training image, extracted once and taken in turn, one an epoch; 0: its
    centre view. Presets: 10."""
    held_out: int | None = None
    """How many fifths of the training images are held out in turn to choose the head (1 to 5); left out: 3 below
    10,000 images, else 1."""
    select_on: Literal["train", "val"] = "train"
    """Where the headline's head is chosen: held-out training images, or, as published, the test images."""

    def __post_init__(self) -> None:
        check_words(self)
        if not self.lr or not all(0 < lr < math.inf for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.epochs < 1 or self.min_steps < 1 or (self.batch is not None and self.batch < 1):
            raise InputError("--epochs, --min-steps and --batch: wanted at least 1 each")
        if self.views < 0:
            raise InputError(f"--views {self.views}: wanted 0 or more")
        if self.held_out is not None and not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training images")

    def extraction(self) -> ExtractSpec:
        """What is extracted: centre views of all images, and random ones of those trained on."""
        filter_used: Interpolation = "bilinear" if self.preset == "dino" else "bicubic"
        random = (ViewSpec(view="random", number=number, interpolation=filter_used) for number in range(self.views))
        return ExtractSpec(augmented=tuple(random))

    @property
    def anneal(self) -> Anneal:
        """When learning rates follow the cosine: DINO's script calls its schedule once an epoch."""
        return "epoch" if self.preset == "dino" else "step"

    def batch_for(self, n_train: int) -> int:
        """Images a step on a training set of this size."""
        return min(n_train, self.batch or (1024 if n_train >= 10 * 1024 else 256))

    def steps_for(self, n_train: int) -> int:
        """Steps on a training set of this size."""
        return max(self.min_steps, self.epochs * (n_train // self.batch_for(n_train)))

    def folds_for(self, n_train: int) -> int:
        """Parts held out in turn."""
        return self.held_out or (3 if n_train < 10_000 else 1)


def held_out_scores(
    seen: Wide, center: Wide, labels_n: Tensor, folds_n: np.ndarray, n_classes: int, spec: LinearSpec, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each combination, accuracy [H] and mean cross-entropy [H] on training images that the heads did not see.

    Heads are trained on `seen` and judged on the `center` views. Raises InputError where the images cannot be cut into
    parts.
    """
    parts = parts_to_hold_out(folds_n, spec.folds_for(len(labels_n)))
    if not parts:
        raise InputError(
            f"{len(labels_n)} training images cannot be cut into parts to choose a head on "
            "(too few, or all of one group); use --group-by none or --select-on val"
        )
    hits: dict[str, list[Tensor]] = {name: [] for name in seen.slices}
    losses: dict[str, list[Tensor]] = {name: [] for name in seen.slices}
    for fold in parts:
        out = np.flatnonzero(folds_n == fold)
        grid = _train(seen, np.flatnonzero(folds_n != fold), labels_n, n_classes, spec, seed)
        at_once = max(1, LOGITS_AT_ONCE // (len(spec.lr) * n_classes))
        for rows in (out[start : start + at_once] for start in range(0, len(out), at_once)):
            truth, features = labels_n[rows], center.take(rows)
            for name, heads in grid.items():
                logits = heads.logits(features[:, center.slices[name]])
                hits[name].append((logits.argmax(dim=2) == truth[:, None]).float())
                losses[name].append(-logits.log_softmax(dim=2)[torch.arange(len(truth)), :, truth])
    return {
        name: (torch.cat(hits[name]).mean(dim=0).numpy(), torch.cat(losses[name]).mean(dim=0).numpy()) for name in hits
    }


def _train(
    seen: Wide, rows_n: np.ndarray, labels_n: Tensor, n_classes: int, spec: LinearSpec, seed: int
) -> dict[str, Heads]:
    """Every head on these rows of the training images."""
    n, rows = len(rows_n), torch.from_numpy(rows_n)
    batch = spec.batch_for(n)
    return train_grid(
        lambda picked, epoch, columns, out: seen.take_into(rows[picked], epoch, columns, out),
        seen.slices,
        labels_n[rows],
        n_classes,
        [lr * batch / 256 for lr in spec.lr],
        steps=spec.steps_for(n),
        batch=batch,
        seed=seed,
        anneal=spec.anneal,
    )


def at_rate_for(train: FeatureTable, spec: LinearSpec) -> LinearSpec:
    """The protocol with DINO's other learning rate for a ResNet, unless one was given."""
    if spec.preset != "dino" or was_given(spec, "lr") or has_cls(train):
        return spec
    return replace(spec, lr=DINO_RESNET_LR_PER_256)


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
    labels_n, spec = torch.from_numpy(train_labels), at_rate_for(train, spec)
    names = names_for(spec.preset, train)
    center, tested = wide([train], names), wide([test], names)
    seen = wide(train.augmented, names) if train.augmented else center
    folds_n = np.array([hash_bucket(f"fold/{group}", FOLDS) for group in train.groups])
    held_out = (
        held_out_scores(seen, center, labels_n, folds_n, len(classes), spec, seed) if spec.select_on == "train" else {}
    )
    grid: list[dict[str, Any]] = []
    fitted: list[tuple[Guesses, Tensor, Tensor]] = []
    for name, heads in _train(seen, np.arange(len(train)), labels_n, len(classes), spec, seed).items():
        for head, lr in enumerate(spec.lr):
            guesses = _guess(heads, head, tested, name, test_labels_n)
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
    n_held_out = len({group for group, fold in zip(train.groups, folds_n, strict=True) if fold in parts})
    return _measurement(train, test, spec, grid, fitted, test_labels_n, classes, selected_on, n_held_out)


def _guess(heads: Heads, head: int, tested: Wide, name: str, labels_n: np.ndarray) -> Guesses:
    """What one head says of the test images, some rows at a time."""
    one = Heads(heads.weight_DHC[:, head : head + 1], heads.bias_HC[head : head + 1])
    parts = []
    for start in range(0, len(labels_n), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(labels_n)))
        logits_nC = one.logits(tested.take(rows)[:, tested.slices[name]])[:, 0].numpy()
        parts.append(rank_classes(logits_nC, labels_n[rows]))
    return Guesses(*(np.concatenate([getattr(part, which) for part in parts]) for which in ("predicted_N", "rank_N")))


def _measurement(
    train: FeatureTable,
    test: FeatureTable,
    spec: LinearSpec,
    grid: list[dict[str, Any]],
    fitted: list[tuple[Guesses, Tensor, Tensor]],
    test_labels_n: np.ndarray,
    classes: list[str],
    selected_on: str,
    n_held_out: int,
) -> Measurement:
    """Choose the heads and put the figures together."""
    # A diverged head guesses one class throughout, which may even be the best guess, but is no linear classifier.
    best = max(range(len(grid)), key=lambda row: (not grid[row]["diverged"], grid[row]["top1"]))
    chosen = choose(grid, n_held_out) if spec.select_on == "train" else best
    guesses, weight_CD, bias_C = fitted[chosen]
    groups_n, too_few = drawn_groups(test.groups)
    metrics = accuracy_metrics(guesses, test_labels_n, len(classes), groups_n)
    metrics["top1_best_on_val"] = accuracy_metrics(fitted[best][0], test_labels_n, len(classes), groups_n)["top1"]
    n, by_epoch = len(train), spec.anneal == "epoch"
    return Measurement(
        evaluator="linear",
        protocol=(
            f"linear classifiers on fixed features of {_views_in_words(train)}, SGD momentum 0.9, "
            f"{'cosine by epoch' if by_epoch else 'cosine'}, no decay, {spec.steps_for(n)} steps of {spec.batch_for(n)} images"
        ),
        version=DINO_VERSION if by_epoch else VERSION,
        metrics=metrics,
        headline="top1",
        selected_on=selected_on,
        chosen={key: grid[chosen][key] for key in ("features", "lr_per_256")},
        grid=grid,
        settings=asdict(spec)
        | {"batch": spec.batch_for(n), "steps": spec.steps_for(n), "lr": list(spec.lr), "views": len(train.augmented)},
        notes=_notes(grid, chosen, spec, train) + too_few,
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


def choose(grid: Sequence[Mapping[str, Any]], n_groups: int) -> int:
    """The head to take by held-out training images, of which there were so many independent ones.

    Among heads whose accuracy there is within one standard error of the best, the one of the least cross-entropy: on a hundred images
    accuracy alone picks by chance, on a hundred thousand the error is so small that it decides (the rule of Breiman et al. 1984).
    """
    sound = [row for row, entry in enumerate(grid) if not entry["diverged"]]
    best = max(grid[row]["train_held_out_top1"] for row in sound)
    error = math.sqrt(best * (1 - best) / n_groups)

    def loss(row: int) -> float:
        value = grid[row]["train_held_out_loss"]
        return math.inf if value is None else float(value)

    return min((row for row in sound if grid[row]["train_held_out_top1"] >= best - error), key=loss)


def _views_in_words(train: FeatureTable) -> str:
    if not train.augmented:
        return "centre views"
    return f"{len(train.augmented)} random crops of each image, flipped at random, one an epoch"


def _notes(grid: list[dict[str, Any]], chosen: int, spec: LinearSpec, train: FeatureTable) -> list[str]:
    notes = []
    lr = grid[chosen]["lr_per_256"]
    rates = sorted(entry["lr"] for entry in grid)
    notes.append(f"effective learning rates {rates[0]:.3g} to {rates[-1]:.3g}, scaled to the batch that is used")
    if spec.preset is not None and "cls_last4" not in train.columns:
        notes.append("the last 4 blocks are not to be had here (they need a ViT of 4 blocks on torch): last block only")
    if len(spec.lr) > 1 and lr in (min(spec.lr), max(spec.lr)):
        notes.append(f"the chosen learning rate {lr:g} is at the edge of the grid; widen it with --lr")
    diverged = sum(entry["diverged"] for entry in grid)
    if diverged:
        notes.append(f"{diverged} of {len(grid)} heads diverged (learning rate too high for these features)")
    return notes


def save_linear_head(path: Path, measurement: Measurement, result: Mapping[str, Any]) -> HeadManifest:
    """Write the chosen head, bound to the backbone that `result` is about; returns its manifest.

    The manifest's `features` is a key of `combinations.combinations`: what the head wants of this backbone's centre views.
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
    test_data: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    extras = parse_sets(test_data)
    if save_head_to is not None:
        check_head_place(save_head_to)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    if extras:
        open_sets(extras, options)  # what is wrong with them is told before anything is fitted
    result, measurement = run_classification(
        replace(options, out=None),
        lambda train, test: evaluate(train, test, spec, options.seed),
        lambda _: spec.extraction(),
    )
    predictions = measurement.predictions
    if extras:
        scores = measure_sets(extras, options, measurement)
        result["metrics"] |= metrics_json(scores.metrics)
        result["notes"] += scores.notes
        comparable = {name: one for name, one in result["metrics"].items() if name != "c_mce" or not scores.notes}
        result["published"] = published_reference("linear", options.ckpt, options.data, comparable, result["settings"])
        result["settings"] |= {"corruption_errors": scores.errors} if scores.errors else {}
        predictions = predictions | scores.predictions
    if options.out is not None:
        save_result(options.out, result, predictions)
    if save_head_to is not None:
        save_linear_head(save_head_to, measurement, result)
    return result


def main(
    options: Annotated[ClassificationRun, tyro.conf.arg(name="")],
    spec: Annotated[LinearSpec, tyro.conf.arg(name="")],
    save_head: Path | None = None,
    test_data: tuple[str, ...] = (),
) -> None:
    """Accuracy of a linear classifier on the features of a frozen network.

    Args:
        save_head: Write the chosen classifier, bound to this network, to this .safetensors file.
        test_data: Further test sets for a classifier trained on ImageNet, as distributed: imagenet-v2:ROOT,
            imagenet-real:real.json, imagenet-a:ROOT, imagenet-r:ROOT, imagenet-sketch:ROOT, imagenet-c:ROOT.
    """
    print_result(run(options, spec, save_head, test_data), options.out, save_head)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
