"""A network and named parts of a data set in, one result out: commands that need no training part.

Retrieval and copy detection compare images with images. What they read, and which parts of it, differs; running the
network and its baselines over the parts, and writing the result, does not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.datasets import Dataset
from evaluators.baselines import BaselineName, open_baseline
from evaluators.classification import RunOptions, baseline_json, describe_model, measure_parts
from evaluators.extract import ExtractSpec, FeatureTable
from evaluators.results import (
    Context,
    Measurement,
    check_writable,
    describe_environment,
    result_json,
    save_result,
)
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

Evaluate = Callable[[list[FeatureTable]], Measurement]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The images that an evaluator compares."""

    datasets: Mapping[str, Dataset]
    how: str
    """Which images these are, in words."""
    group_column: str | None = None
    notes: list[str] = field(default_factory=list)


def evaluate_parts(
    options: RunOptions,
    parts: Parts,
    evaluate: Evaluate,
    spec: Callable[[Runtime], ExtractSpec],
    baselines: Sequence[BaselineName] = (),
) -> tuple[dict[str, Any], Measurement]:
    """Measure the network and its baselines on the same parts; returns the result, written to `options.out`."""
    if options.out is not None:
        check_writable(options.out, "--out", ".json")
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        manifest, extraction = runtime.manifest, spec(runtime)
        measurement, timing, counts = measure_parts(
            runtime.name, runtime, parts.datasets, parts.group_column, options, evaluate, extraction
        )
        context = Context(
            model=describe_model(options.ckpt, runtime),
            data={
                "source": options.data,
                "split": parts.how,
                "grouped_by": parts.group_column,
                "fingerprint": {what: part.fingerprint() for what, part in parts.datasets.items()},
                **counts,
            },
            preprocess=manifest.preprocess.to_json() | extraction.view.to_json() | {"scales": list(extraction.scales)},
            timing=timing,
            environment=describe_environment(runtime.device, options.threads),
        )
    found: dict[str, Any] = {}
    for name in baselines:
        with open_baseline(name, manifest, options.device, options.seed) as runtime:
            other, timing, _ = measure_parts(
                name, runtime, parts.datasets, parts.group_column, options, evaluate, spec(runtime)
            )
            found[name] = baseline_json(other, measurement, timing) | {
                "architecture": runtime.manifest.architecture,
                "weights_sha256": runtime.manifest.weights_sha256,
            }
    measurement.notes[:0] = parts.notes
    result = result_json(measurement, context, found)
    if options.out is not None:
        save_result(options.out, result, measurement.predictions)
    return result, measurement
