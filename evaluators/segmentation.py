"""Patch features in, mean IoU out: how well a linear layer on a frozen network tells what each pixel shows (Oquab et al. 2023).

The probe is trained on cached patches, of whole images squashed to a square or, as published, of random crops; its learning rate is
chosen on held-out training images, and the test images are looked at once, whole or by a sliding window, at the size of their masks.
`last4` reads four layers, and several scales and a mirror are averaged at test time ("+ms").
Read in this order: evaluate, choose_lr, run; the settings are in segmentation_protocol.
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
from evaluators.baselines import open_baseline
from evaluators.bootstrap import drawn_groups
from evaluators.classification import (
    NetworkOptions,
    baseline_json,
    check_head_place,
    describe_data,
    describe_model,
    print_result,
    refuse_processes,
)
from evaluators.layers import last_layers, with_layers
from evaluators.presets import evaluator_cli
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    metrics_json,
    result_json,
    save_result,
)
from evaluators.segmentation_pictures import masks_path, picture_path, save_masks, save_pictures
from evaluators.segmentation_probe import ImageTable, SegmentationTable, check_range, predict, train_head
from evaluators.segmentation_protocol import SegmentationSpec
from evaluators.segmentation_scores import (
    Counts,
    class_iou,
    count,
    image_mean_iou,
    mean_iou,
    miou_difference,
    segmentation_metrics,
)
from evaluators.segmentation_views import Parts, look, open_parts, view_px
from evaluators.splits import FOLDS, hash_bucket, held_out_words, parts_to_hold_out
from runtimes.open import open_runtime
from runtimes.runtime import Runtime
from runtimes.torch_runtime import TorchRuntime

VERSION = 1
HEADLINE = "miou"
ON_TRAIN = f"train_held_out_{HEADLINE}"
SegmentationBaseline = Literal["colour", "untrained"]


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
    tests: Sequence[ImageTable],
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
    groups_n, notes = drawn_groups(test.groups)
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
        notes=notes,
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
            "together); wanted more images, --group-by none, or a single --lr"
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
    """Images with masks of classes (PNG; 255: does not count): ade20k:ROOT, voc2012:ROOT, cityscapes:ROOT, a folder with
    images/ and masks/, or a packed set, CSV or tar shards with `sem` or `masks`."""
    group_by: str = "auto"
    """Column that ties images together (views of one scene, a city of Cityscapes); `auto`: scene, room, objects, instance, family, concept
    or group; `none`."""
    baselines: tuple[SegmentationBaseline, ...] = ()
    """Measured beside the network on the same images: colour (mean and spread of colour in each patch, same probe),
    untrained (same network, random weights)."""


def measure(
    title: str, runtime: Runtime, parts: Parts, options: SegmentationRun, spec: SegmentationSpec
) -> tuple[Evaluated, dict[str, Any], dict[str, Any]]:
    """Extract both parts and evaluate; also returns seconds spent, and what was read."""
    layered = spec.layers == "last4" and isinstance(runtime, TorchRuntime)
    layers = last_layers(runtime) if layered else ()
    if spec.layers == "last4" and title != "colour":
        runtime = with_layers(runtime, layers or last_layers(runtime), norm=True)
    started = time.perf_counter()
    views = look(title, runtime, parts, options, spec)
    extracted = time.perf_counter()
    evaluated = evaluate(views.train, views.tests, parts.classes, spec, layers, options.seed)
    timing = {
        "extract_s": round(extracted - started, 3),
        "evaluate_s": round(time.perf_counter() - extracted, 3),
        "features_from_cache": views.cached,
    }
    evaluated.measurement.notes.extend(views.notes)
    return evaluated, timing, views.counts


def run(
    options: SegmentationRun,
    spec: SegmentationSpec = SegmentationSpec(),  # noqa: B008 (frozen)
    save_head_to: Path | None = None,
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result; files are written where asked."""
    refuse_processes(options)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    if save_head_to is not None:
        check_head_place(save_head_to)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    parts = open_parts(options)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        evaluated, timing, counts = measure(runtime.name, runtime, parts, options, spec)
        truth = {what: images.truth_fingerprint() for what, images in parts.images.items()}
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, parts.splits, counts)
            | {"n_classes": len(parts.classes), "classes": list(parts.classes), "truth_fingerprint": truth},
            preprocess=manifest.preprocess.to_json() | {"view": spec.seen, "size_px": view_px(runtime, spec)},
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
        save_masks(masks_path(options.out), names, evaluated.predicted, val)
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
        features="patches",
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
    run_cli(lambda: evaluator_cli(main))
