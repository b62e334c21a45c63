"""Patch features in, metric depth out: how well a linear probe on a frozen network reads distance (DINOv2's "linear-1").

The probe sees whole images, the last layer's patches with CLS, and is trained with a scale-invariant loss. Its learning
rate is chosen on held-out training scenes; the test images are looked at once. Figures are taken per image over the
measured pixels, then averaged over images. With --out, a picture (image, measured, predicted) lies beside the result.
Read in this order: DepthSpec, evaluate, choose_lr, run.
Legend: n images, H W pixels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro

from backbones.heads import DepthHead, DepthHeadSpec, HeadManifest, save_head
from data.errors import InputError, run_cli
from evaluators.bootstrap import mean_interval95
from evaluators.classification import (
    NetworkOptions,
    baseline_json,
    describe_data,
    describe_model,
    measure,
    measure_baseline,
    print_result,
    summary,
)
from evaluators.depth_metrics import LOWER_IS_BETTER, METRE_METRICS, image_metrics
from evaluators.depth_pictures import save_comparison
from evaluators.depth_probe import DepthTable, TrainSpec, predict_depth, sample_nearest, train_head
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.results import (
    Context,
    Measurement,
    Metric,
    check_writable,
    describe_environment,
    result_json,
    save_result,
)
from evaluators.rgbd import MeasuredDepth, open_rgbd
from evaluators.splits import Splits, hash_bucket, held_out_words, parts_to_hold_out
from evaluators.view_batches import ViewSpec
from runtimes.open import open_runtime

VERSION = 1
HEADLINE = "abs_rel"
FOLDS = 5
"""Parts the training images are cut into by a hash of their scene; some of them choose the learning rate."""
EXTRACT = ExtractSpec(columns=("embedding", "patches"), view=ViewSpec(view="whole"))
FEATURES = "patches+cls of whole views"
"""The head manifest's word for what goes in."""
ON_TRAIN = f"train_held_out_{HEADLINE}"
"""Key of the grid: what a learning rate is chosen by."""
DepthBaseline = Literal["mean", "colour", "untrained"]


@dataclass(frozen=True, kw_only=True)
class DepthSpec:
    """The depth protocol."""

    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates tried (AdamW, one cosine)."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    steps: int = 1000
    """Training steps."""
    batch: int = 16
    """Images a step."""
    held_out: int = 1
    """How many fifths of the training scenes are held out in turn to choose the learning rate (1 to 5)."""
    max_depth: float = 10.0
    """Far end of the head's range in metres (10: indoors; 80: streets); measurements beyond it do not count."""

    def __post_init__(self) -> None:
        if not self.lr or not all(0 < lr < math.inf for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.steps < 1 or self.batch < 1 or not 0 <= self.weight_decay < math.inf:
            raise InputError("--steps and --batch: wanted at least 1 each; --weight-decay: at least 0")
        if not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training scenes")
        if not 0.1 <= self.max_depth < math.inf:
            raise InputError(f"--max-depth {self.max_depth}: wanted at least 0.1 metres")

    def head(self, width: int) -> DepthHeadSpec:
        """The head for a backbone of `width` channels."""
        return DepthHeadSpec(width_in=2 * width, max_depth=self.max_depth)

    def training(self, lr: float, seed: int) -> TrainSpec:
        """One training with this learning rate."""
        return TrainSpec(lr=lr, weight_decay=self.weight_decay, steps=self.steps, batch=self.batch, seed=seed)


def depth_table(features: FeatureTable, depth_m: MeasuredDepth) -> DepthTable:
    """Features of whole views beside the depth maps of the same images."""
    return DepthTable(features.names, features.groups, features.columns["patches"], features.features, depth_m)


def evaluate(train: DepthTable, test: DepthTable, spec: DepthSpec, seed: int = 0) -> tuple[Measurement, DepthHead]:
    """The depth figures on `test` of a probe trained on `train`, and the probe. Raises InputError."""
    head_spec = spec.head(train.cls_nD.shape[1])
    grid = choose_lr(train, head_spec, spec, seed)
    lr = min((entry for entry in grid if entry[ON_TRAIN] is not None), key=lambda entry: entry[ON_TRAIN])["lr"]
    head = train_head(train, np.arange(len(train.names)), head_spec, spec.training(lr, seed))
    measurement = score(
        (predict_depth(head, test, row) for row in range(len(test.names))),
        test,
        spec,
        protocol=(
            f"linear probe on last-layer patches with CLS of whole views, {head_spec.bins} uniform bins to "
            f"{spec.max_depth:g} m, scale-invariant loss, AdamW, {spec.steps} steps of {spec.batch} images"
        ),
        selected_on=f"{held_out_words(parts_to_hold_out(_folds(train), spec.held_out))} of the scenes",
        chosen={"lr": lr},
        grid=grid,
    )
    if len(spec.lr) > 1 and lr in (min(spec.lr), max(spec.lr)):
        measurement.notes.append(f"the chosen learning rate {lr:g} is at the edge of the grid; widen it with --lr")
    return measurement, head


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
            "one scene); wanted more images, a larger --held-out, or --group-by none"
        )
    grid: list[dict[str, Any]] = []
    for lr in spec.lr:
        errors: list[float] = []
        for fold in parts:
            seen, unseen = np.flatnonzero(folds_n != fold), np.flatnonzero(folds_n == fold)
            head = train_head(train, seen, head_spec, spec.training(lr, seed))
            for row in unseen.tolist():
                figures = image_metrics(predict_depth(head, train, row), in_range(train.depth_m[row], spec))
                errors += [figures[HEADLINE]] if figures else []
        error = float(np.mean(errors)) if errors else np.nan
        grid.append({"lr": lr, ON_TRAIN: error if np.isfinite(error) else None})
    if all(entry[ON_TRAIN] is None for entry in grid):
        raise InputError(
            "no learning rate gave finite depth on held-out training images; "
            "check that these have measurements within --max-depth, or lower --lr"
        )
    return grid


def in_range(depth_HW: np.ndarray, spec: DepthSpec) -> np.ndarray:
    """The measured map without what lies beyond the head's range."""
    return np.where(depth_HW > spec.max_depth, np.float32(0), depth_HW)


def mean_map(train: DepthTable, spec: DepthSpec, side: int = 64) -> np.ndarray:
    """Geometric mean of the measured maps, place by place, [side, side]: what is known before looking at an image."""
    total, count = np.zeros((side, side)), np.zeros((side, side))
    for depth_HW in train.depth_m:
        depth = sample_nearest(in_range(depth_HW, spec), (side, side)).numpy()
        total += np.log(np.where(depth > 0, depth, 1))
        count += depth > 0
    everywhere = total.sum() / max(count.sum(), 1)
    mean: np.ndarray = np.exp(np.where(count > 0, total / np.maximum(count, 1), everywhere)).astype(np.float32)
    return mean


def evaluate_mean(train: DepthTable, test: DepthTable, spec: DepthSpec) -> Measurement:
    """The figures of one map for every image."""
    mean = mean_map(train, spec)
    maps = (cv2.resize(mean, depth.shape[::-1], interpolation=cv2.INTER_LINEAR) for depth in test.depth_m)
    return score(maps, test, spec, protocol="geometric mean of training maps", selected_on="train", chosen={}, grid=[])


def score(
    maps: Iterator[np.ndarray],
    test: DepthTable,
    spec: DepthSpec,
    *,
    protocol: str,
    selected_on: str,
    chosen: dict[str, Any],
    grid: list[dict[str, Any]],
) -> Measurement:
    """Figures of predicted maps, in the order of `test`. Raises InputError where no test image has a measurement."""
    figures: list[dict[str, float]] = []
    rows: list[int] = []
    beyond = 0
    for row, (predicted_HW, measured_HW) in enumerate(zip(maps, test.depth_m, strict=True)):
        found = image_metrics(predicted_HW, in_range(measured_HW, spec))
        beyond += int((measured_HW > spec.max_depth).sum())
        if found is not None:
            figures.append(found)
            rows.append(row)
    if not figures:
        raise InputError(f"none of the {len(test.names)} test images has a measured depth up to {spec.max_depth:g} m")
    notes = []
    if len(rows) < len(test.names):
        notes.append(f"{len(test.names) - len(rows)} test images have no measurement and were left out")
    if beyond:
        notes.append(f"{beyond} measured test pixels lie beyond {spec.max_depth:g} m and do not count; see --max-depth")
    groups_n = np.unique([test.groups[row] for row in rows], return_inverse=True)[1].astype(np.int64)
    columns = {name: np.array([one[name] for one in figures]) for name in figures[0]}
    return Measurement(
        evaluator="depth",
        protocol=protocol,
        version=VERSION,
        metrics={name: depth_metric(name, values, groups_n) for name, values in columns.items()},
        headline=HEADLINE,
        selected_on=selected_on,
        chosen=chosen,
        grid=grid,
        settings=asdict(spec),
        notes=notes,
        predictions={
            "names": np.array([test.names[row] for row in rows]),
            "rows": np.array(rows),
            "score": columns[HEADLINE],
            "groups": groups_n,
            **columns,
        },
    )


def depth_metric(name: str, values_n: np.ndarray, groups_n: np.ndarray) -> Metric:
    """Mean over images with its interval."""
    return Metric(
        value=float(values_n.mean()),
        ci95=mean_interval95(values_n, groups_n),
        n=len(values_n),
        unit="m" if name in METRE_METRICS else None,
        lower_is_better=name in LOWER_IS_BETTER,
    )


@dataclass(frozen=True, kw_only=True)
class DepthRun(NetworkOptions):
    """Options of the depth evaluator."""

    data: str
    """Images with 16-bit depth PNG in millimetres (0: none): a packed set or tar shards with `depth_mm`, a CSV with a column
    `depth_mm`, or a folder with images/ and depth_mm/."""
    group_by: str = "auto"
    """Column that ties images together (views of one scene); `auto`: scene, room, objects, instance or group; `none`."""
    baselines: tuple[DepthBaseline, ...] = ()
    """Measured beside the network on the same images: mean (the mean training map for every image), colour (mean and
    spread of colour in each patch, same probe), untrained (same network, random weights)."""


def run(
    options: DepthRun,
    spec: DepthSpec = DepthSpec(),
    save_head_to: Path | None = None,
) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result; files are written where asked."""
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    if save_head_to is not None:
        check_writable(save_head_to, "--save-head", ".safetensors")
    splits = open_rgbd(options.data, options.train_split, options.val_split, options.group_by)
    probe = Probe(splits, spec, options.seed)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        measurement, timing, counts = measure(runtime.name, runtime, splits, options, probe, EXTRACT)
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, splits, counts),
            preprocess=manifest.preprocess.to_json() | {"view": EXTRACT.view.view},
            timing=timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    trained = probe.latest()
    measurement.notes[:0] = splits.notes
    baselines: dict[str, Any] = {}
    for name in options.baselines:
        if name == "mean":
            mean = evaluate_mean(trained.train, trained.test, spec)
            baselines[name] = baseline_json(mean, measurement, {})
        else:
            baselines[name] = measure_baseline(name, manifest, splits, options, probe, measurement, EXTRACT)
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        save_comparison(picture_path(options.out), trained.head, trained.test, splits.val, measurement.predictions)
        save_result(options.out, result | {"picture_file": picture_path(options.out).name}, measurement.predictions)
    if save_head_to is not None:
        save_depth_head(save_head_to, trained.head, result)
    return result


@dataclass(frozen=True)
class Trained:
    """A probe with the tables it was trained and tested on."""

    train: DepthTable
    test: DepthTable
    head: DepthHead


class Probe:
    """`evaluate` as the commands' shared parts call it, on feature tables; keeps what it trained."""

    def __init__(self, splits: Splits, spec: DepthSpec, seed: int) -> None:
        self._splits, self._spec, self._seed = splits, spec, seed
        self._trained: list[Trained] = []

    def __call__(self, train: FeatureTable, test: FeatureTable) -> Measurement:
        train_table = depth_table(train, MeasuredDepth(self._splits.train, train.rows))
        test_table = depth_table(test, MeasuredDepth(self._splits.val, test.rows))
        measurement, head = evaluate(train_table, test_table, self._spec, self._seed)
        self._trained.append(Trained(train_table, test_table, head))
        return measurement

    def latest(self) -> Trained:
        """What the last call trained."""
        return self._trained[-1]


def picture_path(out: Path) -> Path:
    """The picture beside a result file."""
    return out.with_suffix(".png")


def save_depth_head(path: Path, head: DepthHead, result: Mapping[str, Any]) -> HeadManifest:
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
    """Depth by a linear probe on the features of a frozen network.

    Args:
        save_head: Write the probe, bound to this network, to this .safetensors file.
    """
    result = run(options, spec, save_head)
    print_result(result, options.out, options.out and picture_path(options.out), save_head)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.depth", description=summary(__doc__)))
