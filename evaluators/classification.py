"""A network and labelled images in, one result out: what the commands have in common (k-NN and linear most of it).

The network, then each baseline asked for, is run over the same two parts of the data; the evaluator, a function of two
feature tables, is applied to each; differences are paired, image by image.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from backbones.checkpoints import MANIFEST_KEY, Manifest
from backbones.heads import HEADS
from data.datasets import Dataset
from data.errors import CheckFailed, InputError
from data.preprocess import Preprocess
from evaluators.baselines import BaselineName, open_baseline
from evaluators.bootstrap import mean_interval95
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.processes import Helpers, extract_by_processes
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    metrics_json,
    result_json,
    result_table,
    save_result,
)
from evaluators.splits import Splits, labelled, open_splits
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

CENTER_FEATURES = ExtractSpec()
Evaluate = Callable[[FeatureTable, FeatureTable], Measurement]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is measured, on what, and where the result goes."""

    ckpt: str
    """The network: a checkpoint, published weights, a Hugging Face folder, an .onnx, a TensorRT plan, a catalog name, or a
    running server (grpc://host:port, http://host:port; with TLS grpcs://, https://)."""
    data: str
    """The images: a folder (train/CLASS/*, val/CLASS/*), a CSV, tar shards, or a packed set."""
    out: Path | None = None
    """Result file to write (.json); the predictions go beside it."""
    device: str = "auto"
    """Where the network runs: auto, cpu, cuda."""
    threads: int | None = None
    """CPU threads of the network, and of what is fitted to its features."""
    batch_size: int = 64
    """Images that go through the network at a time."""
    workers: int = 1
    """Threads that decode images, in each process."""
    processes: int = 1
    """Processes that run the network, on a GPU each where there are several; needs the feature cache."""
    cache_dir: Path | None = Path(".cache/features")
    """Root of the feature cache; None to do without."""
    seed: int = 0
    """Of everything random: initial heads, the untrained baseline."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: wanted a whole number of at least 0 and below 2**63")
        if min(self.batch_size, self.workers, self.processes) < 1:
            raise InputError("--batch-size, --workers and --processes: wanted at least 1 of each")
        if self.processes > 1 and self.cache_dir is None:
            raise InputError("--processes: several processes meet in the feature cache; name a --cache-dir")


def refuse_processes(options: RunOptions) -> None:
    """Raise InputError where several processes were asked of an evaluator that runs in one."""
    if options.processes > 1:
        raise InputError(
            f"--processes {options.processes}: evaluators of maps and videos run in one process; leave it out, and use "
            "--threads and --workers"
        )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(RunOptions):
    """Options of the evaluators that fit something to training images and test it on others."""

    train_split: str | None = None
    """Name of the training split; left out: `train`."""
    val_split: str | None = None
    """Name of the test split; left out: `val`, or `test` where there is none."""
    group_by: str = "auto"
    """Column that ties images together (views of one object); `auto`: instance, family, concept or group; `none`."""


@dataclass(frozen=True, kw_only=True)
class ClassificationRun(NetworkOptions):
    """Options of the classification evaluators."""

    baselines: tuple[Literal["pixels", "hog", "untrained"], ...] = ()
    """Measured beside the network on the same images: pixels (32 x 32 RGB), hog (histograms of oriented gradients),
    untrained (same network, random weights)."""


def run_classification(
    options: ClassificationRun,
    evaluate: Evaluate,
    shown: Callable[[Preprocess], ExtractSpec] = lambda _: CENTER_FEATURES,
) -> tuple[dict[str, Any], Measurement]:
    """Measure the network and its baselines; returns the result, written to `options.out`, and the measurement.

    `shown` says, for the network's preprocessing, what is extracted of which views.
    """
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    splits = labelled(open_splits(options.data, options.train_split, options.val_split, options.group_by), options.data)
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest = runtime.manifest
        spec = shown(manifest.preprocess)
        measurement, timing, counts = measure(runtime.name, runtime, splits, options, evaluate, spec)
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data=describe_data(options.data, splits, counts),
            preprocess=manifest.preprocess.to_json() | spec.view.to_json(),
            timing=timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    baselines: dict[str, Any] = {
        name: measure_baseline(name, manifest, splits, options, evaluate, measurement, spec)
        for name in options.baselines
    }
    measurement.notes[:0] = splits.notes
    result = result_json(measurement, context, baselines)
    if options.out is not None:
        save_result(options.out, result, measurement.predictions)
    return result, measurement


def measure(
    title: str,
    runtime: Runtime,
    splits: Splits,
    options: RunOptions,
    evaluate: Evaluate,
    spec: ExtractSpec = CENTER_FEATURES,
) -> tuple[Measurement, dict[str, float], dict[str, Any]]:
    """Extract both parts (columns and view of `spec`) and evaluate; also returns seconds spent, and what was read."""
    parts = {"train": splits.train, "val": splits.val}
    return measure_parts(title, runtime, parts, splits.group_column, options, lambda tables: evaluate(*tables), spec)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Count numbers below 1.2e-38 (2.2e-308 in double precision) as zero within; afterwards as it was before.

    Probes at high rates give such probabilities, on which a processor's products are many times slower than on zeros.
    The mode is the calling thread's; threads that it begins within inherit it.
    """
    were_flushed = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


@denormals_flushed()
def measure_parts(
    title: str,
    runtime: Runtime,
    parts: Mapping[str, Dataset],
    group_column: str | None,
    options: RunOptions,
    evaluate: Callable[[list[FeatureTable]], Measurement],
    spec: ExtractSpec = CENTER_FEATURES,
) -> tuple[Measurement, dict[str, float], dict[str, Any]]:
    """Extract each named part and evaluate the tables in that order; also returns seconds spent, and what was read."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    spec = replace(spec, batch_size=options.batch_size, workers=options.workers, cache_dir=options.cache_dir)
    spec = replace(spec, group_column=group_column)
    started = time.perf_counter()
    tables = []
    for what, part in parts.items():
        tables.append(_extract(f"{title}: {what}", title, runtime, part, spec, options))
        if what == "train" and spec.augmented:
            tables[-1] = replace(tables[-1], augmented=_augmented(title, runtime, part, spec, options))
    extracted = time.perf_counter()
    measurement = evaluate(tables)
    for what, table in zip(parts, tables, strict=True):
        measurement.notes.extend(table_notes(what, table))
    timing = {
        "extract_s": round(extracted - started, 3),
        "evaluate_s": round(time.perf_counter() - extracted, 3),
        "features_from_cache": all(one.cached for table in tables for one in (table, *table.augmented)),
    }
    counts: dict[str, Any] = {f"n_{what}": len(table) for what, table in zip(parts, tables, strict=True)}
    labels = {label for table in tables for label in table.labels}
    if None not in labels:
        classes = sorted(map(str, labels))
        counts |= {"n_classes": len(classes), "classes": classes}
    counts["skipped"] = {name: reason for table in tables for name, reason in table.skipped}
    return measurement, timing, counts


def _extract(
    bar: str, title: str, runtime: Runtime, part: Dataset, spec: ExtractSpec, options: RunOptions
) -> FeatureTable:
    """The features of a part, by several processes where that is asked for; baselines need no help."""
    with progress_bar(bar) as progress:
        if options.processes > 1 and title not in get_args(BaselineName):
            helpers = Helpers(options.ckpt, options.device, options.threads, options.processes)
            was_there = extract_by_processes(runtime, part, spec, helpers, progress)
            return replace(extract(runtime, part, spec, progress), cached=was_there)
        return extract(runtime, part, spec, progress)


def _augmented(
    title: str, runtime: Runtime, part: Dataset, spec: ExtractSpec, options: RunOptions
) -> tuple[FeatureTable, ...]:
    """The training images in each of the further views."""
    tables = []
    for number, view in enumerate(spec.augmented, start=1):
        bar = f"{title}: train, view {number} of {len(spec.augmented)}"
        tables.append(_extract(bar, title, runtime, part, replace(spec, view=view, augmented=()), options))
    return tuple(tables)


def measure_baseline(
    name: BaselineName,
    manifest: Manifest,
    splits: Splits,
    options: NetworkOptions,
    evaluate: Evaluate,
    network: Measurement,
    spec: ExtractSpec = CENTER_FEATURES,
) -> dict[str, Any]:
    """One baseline's figures, and by how much the network is above it (paired over the same test images)."""
    with open_baseline(name, manifest, options.device, options.seed) as runtime:
        measurement, timing, _ = measure(name, runtime, splits, options, evaluate, spec)
    return baseline_json(measurement, network, timing) | {
        "architecture": runtime.manifest.architecture,
        "weights_sha256": runtime.manifest.weights_sha256,
        "seed": options.seed if name == "untrained" else None,
    }


def baseline_json(baseline: Measurement, network: Measurement, timing: dict[str, float]) -> dict[str, Any]:
    """A baseline as the result file holds it; `difference` is the network's headline minus the baseline's, paired."""
    ours, theirs = network.metrics[network.headline], baseline.metrics[network.headline]
    gain_N = network.predictions["score"] - baseline.predictions["score"]
    difference = replace(ours, value=ours.value - theirs.value, ci95=None)
    if math.isclose(gain_N.mean(), difference.value, abs_tol=1e-6):  # else the headline is no mean over items
        ci95 = mean_interval95(gain_N, network.predictions["groups"])
        difference = replace(difference, ci95=ci95, n=len(gain_N))
    return {
        "metrics": metrics_json(baseline.metrics),
        "difference": metrics_json({network.headline: difference})[network.headline],
        "chosen": baseline.chosen,
        "timing": timing,
    }


def describe_model(ckpt: str, runtime: Runtime) -> dict[str, Any]:
    """What was measured, for the result file."""
    manifest = runtime.manifest
    return {
        "ckpt": str(ckpt),
        "runtime": runtime.name,
        "weights_sha256": manifest.weights_sha256,
        "architecture": manifest.architecture,
        "step": manifest.step,
        "source": manifest.source,
        "revision": manifest.revision,
    }


def describe_data(data: str, splits: Splits, counts: dict[str, Any]) -> dict[str, Any]:
    """What it was measured on, for the result file."""
    return {
        "source": str(data),
        "split": splits.how,
        "grouped_by": splits.group_column,
        "fingerprint": {"train": splits.train.fingerprint(), "val": splits.val.fingerprint()},
        **counts,
    }


def table_notes(what: str, table: FeatureTable) -> list[str]:
    """Oddities of a feature table, as lines for the user."""
    notes = table.sanity.notes(what) if table.sanity else []
    if table.skipped:
        some = ", ".join(f"{name} ({reason})" for name, reason in table.skipped[:3])
        more = f" and {len(table.skipped) - 3} more" if len(table.skipped) > 3 else ""
        notes.append(f"{len(table.skipped)} {what} images could not be decoded and were left out: {some}{more}")
    return notes


def index_labels(train: FeatureTable, test: FeatureTable) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Class indices (int64) of both tables in the sorted union of their labels, and these labels.

    Raises InputError where a row has no label, and as `check_tables` does.
    """
    check_tables(train, test)
    for table in (train, test):
        if None in table.labels:
            raise InputError(f"{table.names[table.labels.index(None)]!r} has no label; wanted one for every image")
    classes = sorted({str(label) for label in (*train.labels, *test.labels)})
    index = {label: number for number, label in enumerate(classes)}
    train_labels, test_labels = (
        np.array([index[str(label)] for label in table.labels], dtype=np.int64) for table in (train, test)
    )
    return train_labels, test_labels, classes


def check_tables(*tables: FeatureTable) -> None:
    """Raise CheckFailed for features that are not finite, InputError for tables that are empty, of two widths, or not a row an image."""
    widths = {table.features.shape[1] for table in tables}
    if len(widths) > 1:
        raise InputError(f"the tables hold features of {sorted(widths)} numbers; wanted all from one network")
    for table in tables:
        if not len(table):
            raise InputError("a table has no rows; wanted features of at least one image")
        counts = {"names": len(table.names), "labels": len(table.labels), "groups": len(table.groups)}
        counts |= {f"rows of {name}": len(values) for name, values in table.columns.items()}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} {what}" for what, count in counts.items())
            raise InputError(f"a table has {said}; wanted one of each for every image, in one order")
        for name, values in table.columns.items():
            bad = [row for row in range(len(values)) if not np.isfinite(values[row]).all()] if _any_odd(values) else []
            if bad:
                raise CheckFailed(
                    f"{name} of {len(bad)} images is not finite, first of {table.names[bad[0]]!r}; nothing was evaluated"
                )


def check_head_place(path: Path) -> None:
    """As `check_writable`, for --save-head. Raises InputError too where a file lies there that is no head: weights would be lost."""
    check_writable(path, "--save-head", ".safetensors")
    if not path.exists():
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            kind = json.loads((file.metadata() or {})[MANIFEST_KEY])["kind"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        kind = "file that is no head of ours"
    if kind not in HEADS:
        raise InputError(f"--save-head {path}: there is a {kind} already, which would be lost; name another file")


def check_length(what: str, values: Sequence[Any], table: FeatureTable) -> None:
    """Raise InputError unless there is one of `values` for each image of the table."""
    if len(values) != len(table):
        raise InputError(
            f"{len(values)} {what} for {len(table)} images; wanted one for every image, in the table's order"
        )


def _any_odd(values: np.ndarray, rows_at_once: int = 65_536) -> bool:
    """Whether anything in an array is infinite or no number; its sum says so without a mask of its size."""
    parts = range(0, len(values), rows_at_once)
    return not all(np.isfinite(np.sum(values[start : start + rows_at_once], dtype=np.float64)) for start in parts)


def index_groups(table: FeatureTable) -> np.ndarray:
    """A number [n] per row, equal for rows that are tied together."""
    return np.unique(np.array(table.groups), return_inverse=True)[1].astype(np.int64)


Watch = Callable[[str, int, int], None]
_watchers: list[Watch] = []


def watch_progress(watch: Watch) -> None:
    """From now on tell `watch(title, done, total)` too, whenever a bar moves: for programs that run evaluators."""
    _watchers.append(watch)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; in a log file one line every ten seconds at most."""
    with tqdm(desc=title, unit="img", file=sys.stderr, mininterval=0.2 if sys.stderr.isatty() else 10.0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            for watch in _watchers:
                watch(title, done, total)

        yield show


def summary(module_doc: str | None) -> str:
    """What a module's docstring says to whoever runs it, without what it says to whoever reads its code."""
    return (module_doc or "").split("Read in this order")[0].strip()


def print_result(result: dict[str, Any], *written: Path | None) -> None:
    """The table, and which files were written."""
    data = result["data"]
    print(f"{result['evaluator']}: {result['model']['ckpt']} ({result['model']['runtime']}) on {data['source']}")
    classes = f", {data['n_classes']} classes" if "n_classes" in data else ""
    kinds = {"train": "training", "val": "test"}
    counts = [f"{data[f'n_{part}']} {kinds.get(part, part)}" for part in data["fingerprint"]]
    print(f"{' and '.join(counts)} {data.get('counted', 'images')}{classes}; {data['split']}")
    print(result_table(result))
    for path in written:
        if path is not None:
            print(f"written: {path}")
