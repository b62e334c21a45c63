"""Patch features in, metric depth out: how well a head on a frozen network reads distance (Oquab et al. 2023, section 7.4).

The head sees whole images: the last layer's patches with CLS (linear1), or four layers' through a linear layer (linear4) or
convolutions (dpt). Its learning rate is chosen on held-out training scenes; the test images are looked at once. Figures are
taken per image over the measured pixels, then averaged over images. Disparities are scored after a scale and a shift. With
--out, a picture (image, measured, predicted) lies beside the result.
Read in this order: depth_protocol.DepthSpec, evaluate, choose_lr, run.
Legend: n images, H W pixels.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from backbones.checkpoints import Manifest
from backbones.heads import AnyDepthHead, DepthHeadSpec, HeadManifest, save_head
from data.errors import InputError, run_cli
from data.preprocess import check_view_px
from evaluators.baselines import open_baseline
from evaluators.classification import (
    NetworkOptions,
    baseline_json,
    check_head_place,
    describe_data,
    describe_model,
    print_result,
    progress_bar,
    refuse_processes,
    table_notes,
)
from evaluators.depth_dpt import train_dpt_head
from evaluators.depth_metrics import image_metrics
from evaluators.depth_pictures import save_comparison
from evaluators.depth_probe import DepthTable, TrainSpec, predict_depth, train_head
from evaluators.depth_protocol import LINEAR_LR, DepthSpec, for_data
from evaluators.depth_scores import HEADLINE, SHORT_UNITS, aligned, evaluate_mean, in_range, score
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.layers import MirroredRuntime, spread_layers, with_layers
from evaluators.presets import evaluator_cli
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    result_json,
    save_result,
)
from evaluators.rgbd import DepthSet, MeasuredDepth, open_depth, truth_fingerprint
from evaluators.splits import FOLDS, hash_bucket, held_out_words, parts_to_hold_out
from evaluators.view_batches import ViewSpec
from runtimes.open import open_runtime
from runtimes.runtime import Runtime, step_px

FEATURES = "patches+cls of whole views"
"""The head manifest's word for what goes in; which layers, its spec says."""
ON_TRAIN = f"train_held_out_{HEADLINE}"
"""Key of the grid: what a learning rate is chosen by."""
DepthBaseline = Literal["mean", "colour", "untrained"]


def evaluate(
    train: DepthTable,
    test: DepthTable,
    spec: DepthSpec,
    seed: int = 0,
    layers: tuple[int, ...] = (),
    unit: str = "metre",
) -> tuple[Measurement, AnyDepthHead]:
    """The depth figures on `test` of a head trained on `train`, and the head. Raises InputError."""
    head_spec = spec.head_spec(2 * train.cls_nD.shape[1], layers, unit)
    grid = choose_lr(train, head_spec, spec, seed)
    lr = min((entry for entry in grid if entry[ON_TRAIN] is not None), key=lambda entry: entry[ON_TRAIN])["lr"]
    head = fit(train, np.arange(len(train.names)), head_spec, spec.training(lr, seed))
    measurement = score(
        (predict_depth(head, test, row) for row in range(len(test.names))),
        test,
        spec,
        protocol=spec.in_words(head_spec.bins, SHORT_UNITS.get(unit, unit)),
        selected_on=f"{held_out_words(parts_to_hold_out(_folds(train), spec.held_out))} of the scenes",
        chosen={"lr": lr},
        grid=grid,
        unit=unit,
    )
    if len(spec.lr) > 1 and lr in (min(spec.lr), max(spec.lr)):
        measurement.notes.append(f"the chosen learning rate {lr:g} is at the edge of the grid; widen it with --lr")
    return measurement, head


def fit(table: DepthTable, rows: np.ndarray, head_spec: DepthHeadSpec, spec: TrainSpec) -> AnyDepthHead:
    """Train the head that the spec names on these rows."""
    train = train_dpt_head if head_spec.decoder == "dpt" else train_head
    return train(table, rows, head_spec, spec)


def _folds(train: DepthTable) -> np.ndarray:
    """The part that each row falls to, by its scene."""
    return np.array([hash_bucket(f"fold/{group}", FOLDS) for group in train.groups])


def choose_lr(train: DepthTable, head_spec: DepthHeadSpec, spec: DepthSpec, seed: int) -> list[dict[str, Any]]:
    """For each learning rate, the headline on training images whose scenes its probe did not see; None: not finite.

    Raises InputError where the images cannot be cut into parts.
    """
    folds_n = _folds(train)
    parts = parts_to_hold_out(folds_n, spec.held_out)
    if not parts:
        raise InputError(
            f"{len(folds_n)} training images cannot be cut into parts to choose a learning rate on (too few, or all of "
            "one scene); wanted more images, or --group-by none"
        )
    grid: list[dict[str, Any]] = []
    for lr in spec.lr:
        errors: list[float] = []
        for fold in parts:
            seen, unseen = np.flatnonzero(folds_n != fold), np.flatnonzero(folds_n == fold)
            head = fit(train, seen, head_spec, spec.training(lr, seed))
            for row in unseen.tolist():
                measured_HW = in_range(train.depth_m[row], spec)
                predicted_HW = predict_depth(head, train, row)
                figures = image_metrics(aligned(predicted_HW, measured_HW) if spec.align else predicted_HW, measured_HW)
                errors += [figures[HEADLINE]] if figures else []
        error = float(np.mean(errors)) if errors else np.nan
        grid.append({"lr": lr, ON_TRAIN: error if np.isfinite(error) else None})
    if all(entry[ON_TRAIN] is None for entry in grid):
        raise InputError(
            "no learning rate gave finite depth on held-out training images; "
            "check that these have measurements within --max-depth, or lower --lr"
        )
    return grid


@dataclass(frozen=True, kw_only=True)
class DepthRun(NetworkOptions):
    """Options of the depth evaluator."""

    data: str
    """Images with 16-bit depth PNG in millimetres (0: none): a packed set or tar shards with `depth_mm` (or
    `disparity_x64`), a CSV with a column `depth_mm`, a folder with images/ and depth_mm/, nyud:ROOT or kitti:ROOT."""
    group_by: str = "auto"
    """Column that ties images together (views of one scene); `auto`: scene, room, objects, instance, family, concept or group; `none`."""
    baselines: tuple[DepthBaseline, ...] = ()
    """Measured beside the network on the same images: mean (the mean training map for every image), colour (mean and
    spread of colour in each patch, linear1 probe), untrained (same network, random weights)."""


@dataclass(frozen=True)
class Evaluated:
    """A head with the tables it was trained and tested on, and what it came to."""

    measurement: Measurement
    train: DepthTable
    test: DepthTable
    head: AnyDepthHead
    timing: dict[str, Any]
    counts: dict[str, Any]


def measure(title: str, runtime: Runtime, depth: DepthSet, options: DepthRun, spec: DepthSpec) -> Evaluated:
    """Extract both parts, train and score. Raises InputError where the runtime cannot give the layers that are read."""
    layers: tuple[int, ...] = ()
    if spec.head != "linear1":
        layers = spread_layers(runtime)
        runtime = with_layers(runtime, layers, norm=False)
    started = time.perf_counter()
    features = {}
    for what in ("train", "val", *["mirrored"] * spec.mirror):
        part = depth.splits.train if what == "train" else depth.splits.val
        extraction = ExtractSpec(
            columns=("embedding", "patches"),
            view=ViewSpec(view="whole", size_px=view_px(runtime, spec)),
            batch_size=options.batch_size,
            workers=options.workers,
            cache_dir=options.cache_dir,
            group_column=depth.splits.group_column,
        )
        with progress_bar(f"{title}: {what}") as progress:
            features[what] = extract(
                MirroredRuntime(runtime) if what == "mirrored" else runtime, part, extraction, progress
            )
    extracted = time.perf_counter()
    train = depth_table(features["train"], MeasuredDepth(depth.splits.train, features["train"].rows))
    test = depth_table(features["val"], MeasuredDepth(depth.splits.val, features["val"].rows, depth.scored))
    if spec.mirror:
        test = replace(test, mirrored=(features["mirrored"].columns["patches"], features["mirrored"].features))
    measurement, head = evaluate(train, test, spec, options.seed, layers, depth.unit)
    timing = {
        "extract_s": round(extracted - started, 3),
        "evaluate_s": round(time.perf_counter() - extracted, 3),
        "features_from_cache": all(table.cached for table in features.values()),
    }
    pairs = [(what, features[what]) for what in ("train", "val")]
    for what, table in pairs:
        measurement.notes.extend(table_notes(what, table))
    counts: dict[str, Any] = {f"n_{what}": len(table) for what, table in pairs}
    counts["skipped"] = dict(item for _, table in pairs for item in table.skipped)
    return Evaluated(measurement, train, test, head, timing, counts)


def depth_table(features: FeatureTable, depth_m: MeasuredDepth) -> DepthTable:
    """Features of whole views beside the depth maps of the same images."""
    return DepthTable(features.names, features.groups, features.columns["patches"], features.features, depth_m)


def view_px(runtime: Runtime, spec: DepthSpec) -> int:
    """Side of the view in whole patches."""
    step = step_px(runtime.manifest)
    side = max(1, round((spec.size or runtime.manifest.preprocess.whole_px) / step)) * step
    return check_view_px(side, "--size: a view's side")


def run(
    options: DepthRun,
    spec: DepthSpec = DepthSpec(),  # noqa: B008 (frozen)
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
    depth = open_depth(options.data, options.train_split, options.val_split, options.group_by)
    spec = for_data(spec, depth.unit, depth.max_depth)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        evaluated = measure(runtime.name, runtime, depth, options, spec)
        parts = {"train": depth.splits.train, "val": depth.splits.val}
        truth = {what: truth_fingerprint(part) for what, part in parts.items()}
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, depth.splits, evaluated.counts) | {"truth_fingerprint": truth},
            preprocess=manifest.preprocess.to_json() | {"view": "whole", "size_px": view_px(runtime, spec)},
            timing=evaluated.timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    measurement = evaluated.measurement
    measurement.notes[:0] = depth.splits.notes
    baselines: dict[str, Any] = {
        name: measure_baseline(name, evaluated, manifest, depth, options, spec) for name in options.baselines
    }
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        picture = picture_path(options.out)
        save_comparison(picture, evaluated.head, evaluated.test, depth.splits.val, measurement.predictions)
        save_result(options.out, result | {"picture_file": picture.name}, measurement.predictions)
    if save_head_to is not None:
        save_depth_head(save_head_to, evaluated.head, result)
    return result


def measure_baseline(
    name: DepthBaseline, network: Evaluated, manifest: Manifest, depth: DepthSet, options: DepthRun, spec: DepthSpec
) -> dict[str, Any]:
    """One baseline's figures, and by how much the network differs from it."""
    if name == "mean":
        return baseline_json(
            evaluate_mean(network.train, network.test, spec, depth.unit), network.measurement, {"evaluate_s": 0.0}
        )
    if name == "colour":  # has one layer
        spec = replace(spec, head="linear1", lr=LINEAR_LR)
    with open_baseline(name, manifest, options.device, options.seed) as runtime:
        other = measure(name, runtime, depth, options, spec)
    return baseline_json(other.measurement, network.measurement, other.timing)


def picture_path(out: Path) -> Path:
    """The picture beside a result file."""
    return out.with_suffix(".png")


def save_depth_head(path: Path, head: AnyDepthHead, result: Mapping[str, Any]) -> HeadManifest:
    """Write the probe, bound to the backbone that `result` is about; returns its manifest."""
    manifest = HeadManifest(
        kind="depth",
        backbone_sha256=result["model"]["weights_sha256"],
        spec={},
        features=FEATURES,
        source=f"evaluators.depth on {result['data']['source']}",
        data_fingerprint=result["data"]["fingerprint"]["train"],
        metrics=result["metrics"],
    )
    return save_head(path, head, manifest)


def main(
    options: Annotated[DepthRun, tyro.conf.arg(name="")],
    spec: Annotated[DepthSpec, tyro.conf.arg(name="")],
    save_head: Path | None = None,
) -> None:
    """Depth by a head on the features of a frozen network.

    Args:
        save_head: Write the probe, bound to this network, to this .safetensors file.
    """
    result = run(options, spec, save_head)
    print_result(result, options.out, options.out and picture_path(options.out), save_head)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
