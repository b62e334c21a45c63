"""Two ways to run one network in, how far they differ out: feature by feature, and metric by metric.

A checkpoint, its export and a server that serves it should say the same. Both see the same images, each by its own preprocessing; what both
can give is compared image by image, and evaluators are run on both. Beyond the tolerances the command ends with status 3.
Read in this order: ParitySpec, difference, compare_features, run.
Legend: n images, D numbers of one image's feature.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.datasets import Dataset
from data.errors import CheckFailed, InputError, run_cli
from evaluators.benchmark_images import images_to_test
from evaluators.classification import RunOptions, progress_bar, summary
from evaluators.compare import load_scored, metric_pair, paired
from evaluators.results import check_writable, load_result, replacing
from evaluators.suite import Entry, available, evaluate
from evaluators.view_batches import Batch, ViewSpec, decoded_batches
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

SCHEMA = "dinoscope.parity/1"


@dataclass(frozen=True, kw_only=True)
class ParitySpec:
    """What is compared, and how far it may differ."""

    evaluators: tuple[str, ...] = ("knn",)
    """Evaluators whose figures are compared; none: features only."""
    images: int = 256
    """Test images whose features are compared, evenly spread."""
    feature_tolerance: float = 1e-3
    """Largest distance of two features of an image, over the length of the first. Rounding of float32 gives about 1e-5; 16 bits 1e-2."""
    metric_tolerance: float = 2e-3
    """Largest difference of a figure, in its own unit."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.evaluators if name not in available()]
        if unknown:
            raise InputError(f"--evaluators {unknown[0]}: want some of {', '.join(available())}")
        if self.images < 1 or not self.feature_tolerance >= 0 or not self.metric_tolerance >= 0:
            raise InputError("--images: wanted at least 1; tolerances: at least 0")


@dataclass(frozen=True, kw_only=True)
class ParityRun(RunOptions):
    """Where and on what both are run."""

    ckpt: tyro.conf.Suppress[str] = ""
    cache_dir: tyro.conf.Suppress[Path | None] = field(default=None)


def difference(a_nX: np.ndarray, b_nX: np.ndarray) -> dict[str, Any]:
    """How far two outputs of the same n images are apart; row by row over all that belongs to an image.

    `relative`: length of the difference over that of the first; `cosine`: between both; `largest`: of a single number. Outputs of
    two shapes, or that are not finite, have no distance: they are told instead.
    """
    finite = [np.isfinite(x.reshape(len(x), -1)).all(axis=1) for x in (a_nX, b_nX)]
    if not np.logical_and(*finite).all():
        counts = [int((~one).sum()) for one in finite]
        return {"not_finite": counts, "n": len(a_nX), "worst_row": int(np.logical_and(*finite).argmin())}
    if a_nX.shape != b_nX.shape:
        return {"shapes": [list(a_nX.shape[1:]), list(b_nX.shape[1:])]}
    a_nD, b_nD = (x.reshape(len(x), -1).astype(np.float64) for x in (a_nX, b_nX))
    lengths_a, lengths_b = np.linalg.norm(a_nD, axis=1), np.linalg.norm(b_nD, axis=1)
    relative_n = np.linalg.norm(a_nD - b_nD, axis=1) / np.maximum(lengths_a, 1e-12)
    cosine_n = (a_nD * b_nD).sum(axis=1) / np.maximum(lengths_a * lengths_b, 1e-24)
    return {
        "relative_max": float(relative_n.max()),
        "relative_median": float(np.median(relative_n)),
        "cosine_min": float(cosine_n.min()),
        "largest": float(np.abs(a_nD - b_nD).max()),
        "n": len(a_nD),
        "worst_row": int(relative_n.argmax()),
    }


def compare_features(a: Runtime, b: Runtime, options: RunOptions, spec: ParitySpec) -> dict[str, Any]:
    """Every output that both give, over the same test images. Raises InputError where there is none, or no readable image."""
    outputs = [name for name in a.outputs if name in b.outputs]
    if not outputs:
        raise InputError(f"A gives {', '.join(a.outputs)}, B {', '.join(b.outputs)}: nothing to compare")
    dataset = images_to_test(options.data)
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(spec.images, len(dataset))).round().astype(int))
    shown, found, names = dataset.subset(rows), {name: ([], []) for name in outputs}, []  # type: ignore[var-annotated]
    with progress_bar("parity") as progress:
        for batch, batch_of_b in _seen_by_both(a, b, shown, options):
            names += [shown.items[row].name for row in batch.rows]
            if batch.views:
                for side, (runtime, seen) in enumerate(((a, batch), (b, batch_of_b))):
                    got = runtime.run(np.stack(seen.views), outputs)
                    for name in outputs:
                        found[name][side].append(got[name])
            progress(batch.stop, len(rows))
    if not names:
        raise InputError(f"{options.data}: none of {len(rows)} test images can be read")
    compared = {name: difference(np.concatenate(x), np.concatenate(y)) for name, (x, y) in found.items()}
    for one in compared.values():
        if "worst_row" in one:
            one["worst_image"] = names[one.pop("worst_row")]
    return compared


def _seen_by_both(a: Runtime, b: Runtime, shown: Dataset, options: RunOptions) -> Iterator[tuple[Batch, Batch]]:
    """The same images as each is meant to see them; decoded once where that is the same."""
    ours, theirs = (
        decoded_batches(shown, one.manifest.preprocess, ViewSpec(), options.batch_size, 0, options.workers)
        for one in (a, b)
    )
    if a.manifest.preprocess == b.manifest.preprocess:
        return ((batch, batch) for batch in ours)
    return zip(ours, theirs, strict=True)


def compare_metrics(a: str, b: str, options: RunOptions, spec: ParitySpec) -> dict[str, Any]:
    """Figures of both by evaluator, and the paired difference of their scores."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in spec.evaluators:
            paths = []
            for side, ckpt in (("a", a), ("b", b)):
                paths.append(Path(folder) / f"{name}.{side}.json")
                evaluate(Entry(name, options.data, paths[-1].name), paths[-1], replace(options, ckpt=ckpt))
            results = [load_result(path) for path in paths]
            shared = [metric for metric in results[0]["metrics"] if metric in results[1]["metrics"]]
            found[name] = {metric: metric_pair(results[0], results[1], metric) for metric in shared}
            scores = [load_scored(path).predictions for path in paths]
            if scores[0]["names"].tolist() == scores[1]["names"].tolist():
                score = paired(scores[0]["score"], scores[1]["score"], scores[0]["groups"])
                found[name]["mean score, paired"] = {key: score[key] for key in ("a", "b", "difference")} | {
                    "unit": None
                }
    return found


def complaints(found: Mapping[str, Any], spec: ParitySpec) -> list[str]:
    """What differs by more than its tolerance, in words."""
    lines = []
    for name, one in found["features"].items():
        if "not_finite" in one:
            bad = " and ".join(
                f"{count} of {one['n']} images in {side}"
                for side, count in zip("AB", one["not_finite"], strict=True)
                if count
            )
            lines.append(
                f"{name} is not finite for {bad}, first {one['worst_image']!r}: the weights are damaged or overflow"
            )
        elif "shapes" in one:
            lines.append(f"{name} is {one['shapes'][0]} in A and {one['shapes'][1]} in B")
        elif not one["relative_max"] <= spec.feature_tolerance:
            lines.append(
                f"{name} of {one['worst_image']!r} differs by {one['relative_max']:.3g} of its length, tolerance {spec.feature_tolerance:g}"
            )
    for name, metrics in found["metrics"].items():
        for metric, one in metrics.items():
            if not abs(one["difference"]) <= spec.metric_tolerance:
                lines.append(
                    f"{name} {metric} is {one['a']:.4f} in A and {one['b']:.4f} in B, tolerance {spec.metric_tolerance:g}"
                )
    return lines


def run(a: str, b: str, options: ParityRun, spec: ParitySpec) -> dict[str, Any]:
    """Compare; returns the report, written to `options.out`. Tolerances are the caller's to act upon: see `complaints`."""
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    with (
        open_runtime(a, device=options.device, threads=options.threads) as first,
        open_runtime(b, device=options.device, threads=options.threads) as second,
    ):
        models = [
            {
                "ckpt": ckpt,
                "runtime": one.name,
                "precision": one.precision,
                "weights_sha256": one.manifest.weights_sha256,
            }
            for ckpt, one in ((a, first), (b, second))
        ]
        pre = [one.manifest.preprocess.to_json() for one in (first, second)]
        features = compare_features(first, second, options, spec)
    damaged = any("not_finite" in one for one in features.values())  # evaluators would end at the first of them
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "a": models[0],
        "b": models[1],
        "data": options.data,
        "same_weights": models[0]["weights_sha256"] == models[1]["weights_sha256"],
        "preprocess_differs": sorted(key for key in pre[0] if pre[0][key] != pre[1].get(key)),
        "features": features,
        "metrics": {} if damaged else compare_metrics(a, b, options, spec),
        "tolerances": asdict(spec),
    }
    found["complaints"] = complaints(found, spec)
    if found["preprocess_differs"]:
        found["complaints"].append(f"preprocessing differs: {', '.join(found['preprocess_differs'])}")
    if options.out is not None:
        try:
            with replacing(options.out) as path:
                path.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"--out {options.out}: cannot write there ({error.strerror}); name another place"
            ) from error
    return found


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{side.upper()}: {found[side]['ckpt']} ({found[side]['runtime']}, {found[side]['precision']})" for side in "ab"
    ]
    if not found["same_weights"]:
        lines.append("the two name different weights")
    for name, one in found["features"].items():
        if "not_finite" in one:
            lines.append(
                f"{name:<10} not finite for {one['not_finite'][0]} and {one['not_finite'][1]} of {one['n']} images"
            )
        elif "shapes" in one:
            lines.append(f"{name:<10} shapes {one['shapes'][0]} and {one['shapes'][1]}")
        else:
            lines.append(
                f"{name:<10} relative {one['relative_max']:.2e} at most, {one['relative_median']:.2e} median; "
                f"cosine {one['cosine_min']:.6f} at least; {one['n']} images"
            )
    for name, metrics in found["metrics"].items():
        lines += [
            f"{name} {metric}: {x['a']:.4f} and {x['b']:.4f}, B - A {x['difference']:+.4f}"
            for metric, x in metrics.items()
        ]
    return "\n".join(lines)


def main(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    options: Annotated[ParityRun, tyro.conf.arg(name="")],
    spec: Annotated[ParitySpec, tyro.conf.arg(name="")],
) -> None:
    """Compare two runtimes of a network; status 3 where they differ by more than the tolerances.

    Args:
        a: A network, as `--ckpt` takes it elsewhere: usually the checkpoint.
        b: The other one: its .onnx, a TensorRT plan, grpc://host:port.
    """
    found = run(a, b, options, spec)
    print(table(found))
    if options.out is not None:
        print(f"written: {options.out}")
    if found["complaints"]:
        raise CheckFailed("; ".join(found["complaints"]))
    print("within tolerance")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.parity", description=summary(__doc__)))
