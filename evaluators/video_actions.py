"""Videos with a class in, accuracy out: what happens in them, told from frames alone (Oquab et al. 2023, section 7.2).

Frames, evenly spaced, go through the network one by one as images do (resize, centre crop); their features are averaged, or
set side by side in order, and a linear classifier (`evaluators.linear`) or k-NN (`evaluators.knn`) is fitted to that.
UCF-101 and Kinetics are published with the mean of 8 frames, Something-Something with their concatenation.
Read in this order: VideoActionsSpec, pooled, evaluate, run.
Legend: n videos, T frames, D feature size.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from data.datasets import Dataset
from data.errors import InputError, run_cli
from evaluators import knn, linear
from evaluators.classification import (
    NetworkOptions,
    describe_data,
    describe_model,
    measure,
    measure_baseline,
    print_result,
    refuse_processes,
)
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.presets import check_words, evaluator_cli, settled_by
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    result_json,
    save_result,
)
from evaluators.splits import labelled, split_dataset
from evaluators.video_frames import CLIP, has_lists, open_actions
from runtimes.open import open_runtime

VERSION = 3
FEATURES = ExtractSpec(columns=("embedding", "patch_mean"))
Pool = Literal["mean", "concat"]
Classifier = Literal["linear", "knn"]
PUBLISHED: dict[str, Any] = {"frames": 8, "pool": "mean", "classifier": "linear"}
PRESETS: dict[str, dict[str, Any]] = {"dino": PUBLISHED, "dinov2": PUBLISHED}
"""As published for UCF-101 and Kinetics by DINOv2's authors, who measured DINO the same way."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class VideoActionsSpec:
    """The protocol."""

    preset: Literal["dino", "dinov2"] | None = None
    """dinov2: 8 frames, averaged, and the linear grid, as published for UCF-101 and Kinetics; dino, whose networks DINOv2's authors
    measured: the same. Settings given beside it win."""
    frames: int = 8
    """Frames of each video, evenly spaced."""
    pool: Pool = "mean"
    """How they become one feature: mean (UCF-101, Kinetics) or concat, in order (Something-Something)."""
    classifier: Classifier = "linear"
    """What is fitted: the linear grid, or k-NN."""

    def __post_init__(self) -> None:
        check_words(self)
        if not 1 <= self.frames <= 256:
            raise InputError(f"--frames {self.frames}: wanted 1 to 256")


def pooled(frames: FeatureTable, spec: VideoActionsSpec) -> tuple[FeatureTable, int]:
    """One row a video, and how many videos were left out because a frame of theirs could not be read."""
    rows: dict[str, list[int]] = {}
    for row, clip in enumerate(frames.groups):
        rows.setdefault(clip, []).append(row)
    whole = {clip: own for clip, own in rows.items() if len(own) == spec.frames}
    index_nT = np.array(list(whole.values()), np.int64).reshape(len(whole), spec.frames)
    columns = {}
    for name, values in frames.columns.items():
        shape = (len(whole), -1)
        columns[name] = (
            np.stack(
                [values[own].mean(axis=0) if spec.pool == "mean" else values[own].reshape(-1) for own in index_nT]
            ).reshape(shape)
            if len(whole)
            else np.empty((0, values.shape[1]), np.float32)
        )
    if spec.pool == "concat":  # the mean patch of each frame would double a width that is large already
        columns.pop("patch_mean", None)
    names = tuple(whole)
    labels = tuple(frames.labels[own[0]] for own in whole.values())
    skipped = {name.rpartition("#")[0] for name, _ in frames.skipped} | (set(rows) - set(whole))
    return FeatureTable(names, labels, tuple(map(source_film, names)), columns), len(skipped)


def source_film(name: str) -> str:
    """What ties videos together: in UCF-101 clips c01, c02 ... of one group were cut from the same film; others stand alone."""
    found = re.fullmatch(r"(.*_g\d+)_c\d+(\.\w+)?", name)
    return found[1] if found else name


def evaluate(train: FeatureTable, test: FeatureTable, spec: VideoActionsSpec, seed: int = 0) -> Measurement:
    """Accuracy on `test`; the tables hold the frames of each video, tied together by their groups. Raises InputError."""
    (train_videos, train_lost), (test_videos, test_lost) = pooled(train, spec), pooled(test, spec)
    if not len(train_videos) or not len(test_videos):
        raise InputError("no video of one part could be read whole; wanted readable videos in both")
    by_neighbours = spec.classifier == "knn"
    parts = (train_videos, test_videos)
    found = knn.evaluate(*parts) if by_neighbours else linear.evaluate(*parts, seed=seed)
    how = "averaged" if spec.pool == "mean" else "side by side"
    notes = list(found.notes)
    for what, lost in (("training", train_lost), ("test", test_lost)):
        if lost:
            notes.append(f"{lost} {what} videos have frames that cannot be read, and were left out")
    return replace(
        found,
        evaluator="video_actions",
        version=VERSION,
        protocol=f"{spec.frames} evenly spaced frames a video, centre views, features {how}; {found.protocol}",
        settings=asdict(spec) | {spec.classifier: found.settings},
        notes=notes,
        learned={},
    )


@dataclass(frozen=True, kw_only=True)
class VideoActionsRun(NetworkOptions):
    """Options of the video action evaluator."""

    data: str
    """Videos with classes: ucf101:ROOT, or a folder with train/CLASS/* and val/CLASS/*, or CLASS/*; each a video file or a
    folder of frames."""
    split_list: int = 1
    """Which of UCF-101's three splits (trainlist01 ...)."""
    baselines: tuple[Literal["pixels", "untrained"], ...] = ()
    """Measured beside the network on the same frames: pixels (32 x 32 RGB), untrained (same network, random weights)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.split_list <= 3:
            raise InputError(f"--split-list {self.split_list}: UCF-101 has the splits 1, 2 and 3")


def check_videos(train: Dataset, val: Dataset, data: str) -> None:
    """Raise InputError where there are fewer training videos than classes, however many frames they have."""
    n_videos = len({item.row[CLIP] for item in train.items})
    n_classes = len({item.label for part in (train, val) for item in part.items})
    if n_videos < n_classes:
        raise InputError(f"{data}: {n_videos} training videos for {n_classes} classes; wanted at least one a class")


def run(options: VideoActionsRun, spec: VideoActionsSpec = VideoActionsSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    refuse_processes(options)
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    dataset = open_actions(options.data, spec.frames, options.split_list)
    splits = labelled(split_dataset(dataset, options.train_split, options.val_split, CLIP), options.data)
    check_videos(splits.train, splits.val, options.data)
    videos = {
        f"n_{what}": len({item.row[CLIP] for item in part.items})
        for what, part in (("train", splits.train), ("val", splits.val))
    }

    def fitted(train: FeatureTable, test: FeatureTable) -> Measurement:
        return evaluate(train, test, spec, options.seed)

    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        measurement, timing, counts = measure(runtime.name, runtime, splits, options, fitted, FEATURES)
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, splits, counts | videos)
            | {"counted": "videos"}
            | ({"split_list": options.split_list} if has_lists(options.data) else {}),
            preprocess=manifest.preprocess.to_json() | FEATURES.view.to_json(),
            timing=timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    baselines: dict[str, Any] = {
        name: measure_baseline(name, manifest, splits, options, fitted, measurement, FEATURES)
        for name in options.baselines
    }
    measurement.notes[:0] = splits.notes
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        save_result(options.out, result, measurement.predictions)
    return result


def main(
    options: Annotated[VideoActionsRun, tyro.conf.arg(name="")],
    spec: Annotated[VideoActionsSpec, tyro.conf.arg(name="")],
) -> None:
    """Accuracy of action classification from the frames of videos."""
    print_result(run(options, spec), options.out)


if __name__ == "__main__":
    run_cli(lambda: evaluator_cli(main))
