"""Patch features in, mean IoU out: how well a linear layer on a frozen network tells what each pixel shows (Oquab et al. 2023).

The probe sees whole images, squashed to a square, and is trained on cached patches; its learning rate is chosen on held-out
training images, and the test images are looked at once, at the size of their masks. `last4` reads four layers, and several
scales and a mirror are averaged at test time ("+ms"). The published protocol differs in one point: it trains on random
crops and tests by a sliding window, which keeps small things larger; figures here are those of whole views.
Read in this order: SegmentationSpec, evaluate, choose_lr, run.
Legend: n images, C classes, H W pixels.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from backbones.heads import HeadManifest, SegmentationHead, SegmentationHeadSpec, save_head
from data.errors import InputError, run_cli
from data.preprocess import check_view_px
from evaluators.baselines import open_baseline
from evaluators.classification import (
    NetworkOptions,
    baseline_json,
    describe_data,
    describe_model,
    print_result,
    progress_bar,
    refuse_processes,
    summary,
    table_notes,
)
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.layers import MirroredRuntime, last_layers, with_layers
from evaluators.presets import with_preset
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    metrics_json,
    result_json,
    save_result,
)
from evaluators.segmentation_data import VOID_VALUE, MaskedImages, Masks, open_masks
from evaluators.segmentation_pictures import masks_path, picture_path, save_masks, save_pictures
from evaluators.segmentation_probe import SegmentationTable, TrainSpec, check_range, predict, train_head
from evaluators.segmentation_scores import (
    Counts,
    class_iou,
    count,
    image_mean_iou,
    mean_iou,
    miou_difference,
    segmentation_metrics,
)
from evaluators.splits import Splits, hash_bucket, held_out_words, parts_to_hold_out, split_dataset
from evaluators.view_batches import ViewSpec
from runtimes.open import open_runtime
from runtimes.runtime import Runtime, step_px
from runtimes.torch_runtime import TorchRuntime

VERSION = 1
HEADLINE = "miou"
FOLDS = 5
"""Parts the training images are cut into by a hash; some of them choose the learning rate."""
ON_TRAIN = f"train_held_out_{HEADLINE}"
Layers = Literal["last", "last4"]
Preset = Literal["dinov2", "dinov2-ms"]
SegmentationBaseline = Literal["colour", "untrained"]


@dataclass(frozen=True, kw_only=True)
class SegmentationSpec:
    """The segmentation protocol."""

    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates tried (AdamW, warm-up, then a straight fall to 0)."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    steps: int = 600
    """Training steps."""
    batch: int = 16
    """Images a step."""
    held_out: int = 1
    """How many fifths of the training images are held out in turn to choose the learning rate (1 to 5)."""
    layers: Layers = "last"
    """What the head reads: the last layer, or the last four side by side (a checkpoint on torch only)."""
    size: int | None = None
    """Side in pixels that images are squashed to, to the nearest whole patches; None: the manifest's whole view."""
    scales: tuple[float, ...] = (1.0,)
    """Multiples of that size at which test images are seen; class probabilities are averaged."""
    mirror: bool = False
    """Whether test images are seen in a mirror as well."""

    def __post_init__(self) -> None:
        if not self.lr or not all(0 < lr < 1e6 for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.steps < 1 or self.batch < 1 or not 0 <= self.weight_decay < 1e6:
            raise InputError("--steps and --batch: wanted at least 1 each; --weight-decay: at least 0")
        if not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training images")
        if not self.scales or not all(0.1 <= scale <= 8 for scale in self.scales):
            raise InputError(f"--scales {' '.join(map(str, self.scales)) or '(empty)'}: wanted multiples from 0.1 to 8")
        if self.size is not None:
            check_view_px(self.size, "--size")

    def training(self, lr: float, seed: int) -> TrainSpec:
        """One training with this learning rate."""
        return TrainSpec(lr=lr, weight_decay=self.weight_decay, steps=self.steps, batch=self.batch, seed=seed)

    def in_words(self) -> str:
        """The protocol for a result file."""
        seen = f"scales {' '.join(f'{scale:g}' for scale in self.scales)}" + (" and mirrored" if self.mirror else "")
        read = "the last layer" if self.layers == "last" else "the last four layers"
        return (
            f"batch norm and a linear layer on patches of {read} of whole views, cross-entropy, AdamW, {self.steps} steps of "
            f"{self.batch} images; tested at {seen}, scored at the mask's size"
        )


PRESETS: dict[str, SegmentationSpec] = {
    "dinov2": SegmentationSpec(lr=(1e-3,), steps=40_000, size=518),
    "dinov2-ms": SegmentationSpec(
        lr=(1e-3,), steps=40_000, size=644, layers="last4", scales=(1.0, 1.32, 1.73), mirror=True
    ),
}
"""Rates, decay, steps and sizes of the published heads (on ADE20K: ViT-S/14 44.3 and 47.2); views are whole here, see above."""


@dataclass(frozen=True)
class Evaluated:
    """What one network came to."""

    measurement: Measurement
    head: SegmentationHead
    counts: Counts
    predicted: list[np.ndarray]
    """Class of each pixel of each test image, uint8 [H, W]."""
    per_class: dict[str, float | None]
    """IoU of each class; None where it is in neither truth nor prediction."""


def evaluate(
    train: SegmentationTable,
    tests: Sequence[SegmentationTable],
    classes: Sequence[str],
    spec: SegmentationSpec,
    layers: tuple[int, ...] = (),
    seed: int = 0,
) -> Evaluated:
    """Mean IoU of a probe trained on `train`; `tests` holds the same test images once a scale (and mirror).

    Raises InputError for classes out of range and masks without a labelled pixel.
    """
    test = tests[0]
    head_spec = SegmentationHeadSpec(n_classes=len(classes), width_in=train.patches_nND.shape[2], layers=layers)
    grid = choose_lr(train, head_spec, spec, seed) if len(spec.lr) > 1 else [{"lr": spec.lr[0]}]
    lr = max(grid, key=lambda entry: entry.get(ON_TRAIN, 0.0))["lr"]
    head = train_head(train, np.arange(len(train.names)), head_spec, spec.training(lr, seed))
    counted, predicted = [], []
    for row in range(len(test.names)):
        mask_HW = test.masks[row]
        check_range(mask_HW, len(classes), test.names[row])
        found_HW = predict(head, tests, row, (mask_HW.shape[0], mask_HW.shape[1]))
        counted.append(count(found_HW, mask_HW, len(classes)))
        predicted.append(found_HW.astype(np.uint8))
    counts = Counts.of(counted)
    if not counts.true.sum():
        raise InputError(f"none of the {len(test.names)} test masks has a labelled pixel; wanted class numbers in them")
    groups_n = np.unique(np.array(test.groups), return_inverse=True)[1].astype(np.int64)
    iou_C = class_iou(counts.columns.sum(axis=0).astype(np.float64))
    folds = parts_to_hold_out(_folds(train), spec.held_out)
    measurement = Measurement(
        evaluator="segmentation",
        protocol=spec.in_words(),
        version=VERSION,
        metrics=segmentation_metrics(counts, groups_n),
        headline=HEADLINE,
        selected_on=f"{held_out_words(folds)} of the images" if len(spec.lr) > 1 else "nothing: one learning rate",
        chosen={"lr": lr},
        grid=grid,
        settings=asdict(spec),
        predictions={
            "names": np.array(test.names),
            "score": image_mean_iou(counts),
            "groups": groups_n,
            "both": counts.both,
            "predicted": counts.predicted,
            "true": counts.true,
        },
    )
    if len(spec.lr) > 1 and lr in (min(spec.lr), max(spec.lr)):
        measurement.notes.append(f"the chosen learning rate {lr:g} is at the edge of the grid; widen it with --lr")
    per_class = {name: None if np.isnan(iou) else float(iou) for name, iou in zip(classes, iou_C, strict=True)}
    return Evaluated(measurement, head, counts, predicted, per_class)


def _folds(train: SegmentationTable) -> np.ndarray:
    """The part that each row falls to, by what ties it to others."""
    return np.array([hash_bucket(f"fold/{group}", FOLDS) for group in train.groups])


def choose_lr(
    train: SegmentationTable, head_spec: SegmentationHeadSpec, spec: SegmentationSpec, seed: int
) -> list[dict[str, Any]]:
    """For each learning rate, mean IoU on training images that its probe did not see. Raises InputError for too few."""
    folds_n = _folds(train)
    parts = parts_to_hold_out(folds_n, spec.held_out)
    if not parts:
        raise InputError(
            f"{len(folds_n)} training images cannot be cut into parts to choose a learning rate on (too few, or all tied "
            "together); wanted more images, a larger --held-out, --group-by none, or a single --lr"
        )
    grid: list[dict[str, Any]] = []
    for lr in spec.lr:
        counted = []
        for fold in parts:
            head = train_head(train, np.flatnonzero(folds_n != fold), head_spec, spec.training(lr, seed))
            for row in np.flatnonzero(folds_n == fold).tolist():
                mask_HW = train.masks[row]
                found_HW = predict(head, [train], row, (mask_HW.shape[0], mask_HW.shape[1]))
                counted.append(count(found_HW, mask_HW, head_spec.n_classes))
        sums = Counts.of(counted).columns.sum(axis=0, dtype=np.float64)
        grid.append({"lr": lr, ON_TRAIN: float(np.nan_to_num(mean_iou(sums[None])[0]))})
    return grid


@dataclass(frozen=True, kw_only=True)
class SegmentationRun(NetworkOptions):
    """Options of the segmentation evaluator."""

    data: str
    """Images with masks of classes (PNG; 255: does not count): ade20k:ROOT, voc2012:ROOT, a folder with images/ and masks/,
    or a packed set, CSV or tar shards with `sem` or `masks`."""
    preset: Preset | None = None
    """dinov2: one layer, 518 px, 40,000 steps; dinov2-ms: four layers, 644 px, three scales and a mirror. Settings given
    beside it win."""
    baselines: tuple[SegmentationBaseline, ...] = ()
    """Measured beside the network on the same images: colour (mean and spread of colour in each patch, same probe),
    untrained (same network, random weights)."""


@dataclass(frozen=True)
class Parts:
    """The set, its two parts, and its classes."""

    images: dict[str, MaskedImages]
    splits: Splits
    classes: tuple[str, ...]


def open_parts(options: SegmentationRun) -> Parts:
    """Open the set. Raises InputError."""
    whole = open_masks(options.data, "classes")
    classes = whole.class_names()
    if not 2 <= len(classes) <= VOID_VALUE:
        raise InputError(f"{options.data}: its masks tell {len(classes)} class apart; wanted 2 to {VOID_VALUE}")
    splits = split_dataset(whole.dataset, options.train_split, options.val_split, options.group_by)
    images = {"train": replace(whole, dataset=splits.train), "val": replace(whole, dataset=splits.val)}
    return Parts(images, splits, classes)


def view_px(runtime: Runtime, spec: SegmentationSpec, scale: float = 1.0) -> int:
    """Side of the view in whole patches."""
    side = (spec.size or runtime.manifest.preprocess.whole_px) * scale
    step = step_px(runtime.manifest)
    return check_view_px(max(1, round(side / step)) * step, "--size and --scales: a view's side")


def measure(
    title: str, runtime: Runtime, parts: Parts, options: SegmentationRun, spec: SegmentationSpec
) -> tuple[Evaluated, dict[str, Any], dict[str, Any]]:
    """Extract both parts and evaluate; also returns seconds spent, and what was read."""
    layered = spec.layers == "last4" and isinstance(runtime, TorchRuntime)
    layers = last_layers(runtime) if layered else ()
    if spec.layers == "last4" and title != "colour":
        runtime = with_layers(runtime, layers or last_layers(runtime), norm=True)
    started, found = time.perf_counter(), []
    for what, scale, mirrored in [
        ("train", 1.0, False),
        *(("val", scale, m) for scale in spec.scales for m in (False, True)[: 1 + spec.mirror]),
    ]:
        part = parts.images[what]
        extraction = ExtractSpec(
            columns=("patches",),
            view=ViewSpec(view="whole", size_px=view_px(runtime, spec, scale)),
            batch_size=options.batch_size,
            workers=options.workers,
            cache_dir=options.cache_dir,
            group_column=parts.splits.group_column,
        )
        with progress_bar(f"{title}: {what}") as progress:
            seen = MirroredRuntime(runtime) if mirrored else runtime
            found.append((extract(seen, part.dataset, extraction, progress), part))
    extracted = time.perf_counter()
    tables = [segmentation_table(features, images) for features, images in found]
    evaluated = evaluate(tables[0], tables[1:], parts.classes, spec, layers, options.seed)
    timing = {
        "extract_s": round(extracted - started, 3),
        "evaluate_s": round(time.perf_counter() - extracted, 3),
        "features_from_cache": all(features.cached for features, _ in found),
    }
    counts: dict[str, Any] = {"n_train": len(found[0][0]), "n_val": len(found[1][0])}
    counts["skipped"] = dict(item for features, _ in found[:2] for item in features.skipped)
    for what, (features, _) in zip(("train", "val"), found[:2], strict=True):
        evaluated.measurement.notes.extend(table_notes(what, features))
    return evaluated, timing, counts


def segmentation_table(features: FeatureTable, images: MaskedImages) -> SegmentationTable:
    """Features of whole views beside the masks of the same images."""
    return SegmentationTable(features.names, features.groups, features.columns["patches"], Masks(images, features.rows))


def run(
    options: SegmentationRun, spec: SegmentationSpec = SegmentationSpec(), save_head_to: Path | None = None
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result; files are written where asked."""
    refuse_processes(options)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    if save_head_to is not None:
        check_writable(save_head_to, "--save-head", ".safetensors")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    spec = with_preset(spec, PRESETS, options.preset)
    parts = open_parts(options)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        evaluated, timing, counts = measure(runtime.name, runtime, parts, options, spec)
        truth = {what: images.truth_fingerprint() for what, images in parts.images.items()}
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, parts.splits, counts)
            | {"n_classes": len(parts.classes), "classes": list(parts.classes), "truth_fingerprint": truth},
            preprocess=manifest.preprocess.to_json() | {"view": "whole", "size_px": view_px(runtime, spec)},
            timing=timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    measurement = evaluated.measurement
    measurement.notes[:0] = parts.splits.notes
    baselines: dict[str, Any] = {}
    for name in options.baselines:
        with open_baseline(name, manifest, options.device, options.seed) as baseline:
            other, timing, _ = measure(name, baseline, parts, options, spec)
        plain = baseline_json(other.measurement, measurement, timing)
        value, ci95 = miou_difference(evaluated.counts, other.counts, measurement.predictions["groups"])
        difference = replace(measurement.metrics[HEADLINE], value=value, ci95=ci95)
        baselines[name] = plain | {"difference": metrics_json({HEADLINE: difference})[HEADLINE]}
    result = result_json(measurement, context, baselines) | {"per_class": {HEADLINE: evaluated.per_class}}
    if options.out is not None:
        names, val = measurement.predictions["names"].tolist(), parts.images["val"]
        save_masks(masks_path(options.out), names, evaluated.predicted, val.zero_is_void)
        save_pictures(picture_path(options.out), val, names, evaluated.predicted, measurement.predictions["score"])
        files = {"picture_file": picture_path(options.out).name, "masks_folder": masks_path(options.out).name}
        save_result(options.out, result | files, measurement.predictions)
    if save_head_to is not None:
        save_segmentation_head(save_head_to, evaluated.head, result)
    return result


def save_segmentation_head(path: Path, head: SegmentationHead, result: dict[str, Any]) -> HeadManifest:
    """Write the probe with its classes' names, bound to the backbone that `result` is about; returns its manifest."""
    manifest = HeadManifest(
        kind="segmentation",
        backbone_sha256=result["model"]["weights_sha256"],
        spec={},
        features="patches of whole views",
        classes=tuple(result["data"]["classes"]),
        source=f"evaluators.segmentation on {result['data']['source']}",
        data_fingerprint=result["data"]["fingerprint"]["train"],
        metrics=result["metrics"],
    )
    return save_head(path, head, manifest)


def main(
    options: Annotated[SegmentationRun, tyro.conf.arg(name="")],
    spec: Annotated[SegmentationSpec, tyro.conf.arg(name="")],
    save_head: Path | None = None,
) -> None:
    """Mean IoU of a linear segmentation probe on the features of a frozen network.

    Args:
        save_head: Write the probe, bound to this network, to this .safetensors file.
    """
    result = run(options, spec, save_head)
    written = (picture_path(options.out), masks_path(options.out)) if options.out else ()
    print_result(result, options.out, *written, save_head)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.segmentation", description=summary(__doc__)))
