"""A measurement in, one JSON file and a readable table out: the result format shared by all evaluators.

The file holds one object (DESIGN: `metrics: {top1: {value, ci95, n}, ...}`, values as fractions of 1 unless a metric
names a unit). Predictions, one row per test item, lie beside it as `NAME.predictions.npz`, readable without pickle,
so that intervals and paired comparisons can be computed later without the network.
"""

import hashlib
import io
import json
import math
import os
import platform
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from evaluators.published_figures import published_reference, source_text
from runtimes.onnx_build import installed_builds

SCHEMA = "dinoscope.result/1"
REQUIRED: dict[str, type] = {
    "evaluator": str,
    "version": int,
    "metrics": dict,
    "headline": str,
    "chosen": dict,
    "grid": list,
    "settings": dict,
    "baselines": dict,
    "notes": list,
    "model": dict,
    "data": dict,
    "preprocess": dict,
    "timing": dict,
    "environment": dict,
}
"""What every result file holds, and of which type."""


@dataclass(frozen=True)
class Metric:
    """One figure of a result."""

    value: float
    ci95: tuple[float, float] | None
    """95 % interval; None where it cannot be estimated."""
    n: int
    """Test items behind the figure."""
    unit: str | None = None
    """None: a fraction of 1."""
    lower_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a pure evaluator returns: figures and how they were chosen; nothing about files or machines."""

    evaluator: str
    protocol: str
    """What was done, in words that let someone else repeat it."""
    version: int
    """Raised whenever the same features would give another figure."""
    metrics: dict[str, Metric]
    headline: str
    """Name of the metric to quote."""
    selected_on: str
    """The data on which free choices (k, learning rate) behind the headline were made."""
    chosen: dict[str, Any]
    """The values of these choices."""
    grid: list[dict[str, Any]]
    """Every choice tried, with its figures."""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays with one row per test item (`names`, `labels`, `predicted`, ...)."""
    learned: dict[str, np.ndarray] = field(default_factory=dict)
    """Weights that the evaluator fitted; they go into a head file, not into the result."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a measurement was made on: the rest of the result file."""

    model: dict[str, Any]
    data: dict[str, Any]
    preprocess: dict[str, Any]
    timing: dict[str, Any]
    environment: dict[str, Any]


def describe_environment(device: str, threads: int | None) -> dict[str, Any]:
    """Versions and machine behind a figure."""
    packages = {name: version(name) for name in ("torch", "numpy", "opencv-python-headless", "pillow")}
    packages["onnxruntime"] = next(iter(installed_builds().values()))
    return {
        "python": platform.python_version(),
        **packages,
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": threads,
    }


def result_json(
    measurement: Measurement, context: Context, baselines: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The result file as a plain object."""
    metrics = metrics_json(measurement.metrics)
    ckpt, source = str(context.model["ckpt"]), str(context.data["source"])
    return {
        "schema": SCHEMA,
        "evaluator": measurement.evaluator,
        "protocol": measurement.protocol,
        "version": measurement.version,
        "metrics": metrics,
        "published": published_reference(measurement.evaluator, ckpt, source, metrics, measurement.settings),
        "headline": measurement.headline,
        "selected_on": measurement.selected_on,
        "chosen": measurement.chosen,
        "grid": measurement.grid,
        "settings": measurement.settings,
        "baselines": dict(baselines or {}),
        "notes": measurement.notes,
        **asdict(context),
    }


def metrics_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Metrics as the file holds them; `unit` and `lower_is_better` are written only where there is something to say."""
    return {
        name: {k: v for k, v in asdict(metric).items() if k not in ("unit", "lower_is_better") or v}
        for name, metric in metrics.items()
    }


def check_writable(path: Path, flag: str, suffix: str) -> None:
    """Make the folder of a file that will be written, before the work starts. Raises InputError where it cannot be."""
    if path.suffix != suffix:
        raise InputError(f"{flag} {path}: wanted a name that ends in {suffix}, such as {path.with_suffix(suffix).name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot write there ({error.strerror}); name another place") from error


def save_result(out: Path, result: dict[str, Any], predictions: Mapping[str, np.ndarray]) -> None:
    """Write `out` and, beside it, its predictions; each file appears whole or not at all. Raises InputError.

    The result holds the predictions' hash: stopped between the two, an older result does not pass for that of newer predictions.
    """
    check_writable(out, "--out", ".json")
    body = dict(result)
    try:
        if predictions:
            beside = out.with_suffix(".predictions.npz")
            body["predictions_file"] = beside.name
            with replacing(beside) as path, path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(predictions))
            body["predictions_sha256"] = hashlib.sha256(beside.read_bytes()).hexdigest()
        with replacing(out) as path:
            text = json.dumps(body, indent=1, ensure_ascii=False, default=_plain, allow_nan=False) + "\n"
            path.write_bytes(
                text.encode("utf-8", "backslashreplace")
            )  # of a name's bytes that are no UTF-8: JSON's own escapes
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror}); name another place") from error


def load_result(path: Path) -> dict[str, Any]:
    """Read a result file back. Raises InputError when it is none, of another schema, or damaged."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: no readable result file ({type(error).__name__}); name one, or run the evaluator again"
        ) from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        came = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise InputError(f"{path}: schema {came!r}, wanted {SCHEMA!r}; run the evaluator again to remake it")
    try:
        complaint = _complaint(body)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        complaint = f"{type(error).__name__} {error}"
    if complaint:
        raise InputError(f"{path}: damaged result file ({complaint}); run the evaluator again to remake it")
    return body


def _complaint(body: Mapping[str, Any]) -> str | None:
    """What keeps a result file from being read by others, or None."""
    missing = [name for name in REQUIRED if not isinstance(body.get(name), REQUIRED[name])]
    if missing:
        return f"no {missing[0]} of type {REQUIRED[missing[0]].__name__}"
    for name, metric in body["metrics"].items():
        pair = metric["ci95"]
        numbers = [metric["value"], *(pair if pair is not None else ())]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            return f"{name} is no number"
        if not isinstance(metric["n"], int) or len(numbers) not in (1, 3):
            return f"{name} lacks its interval or n"
    if body["headline"] not in body["metrics"]:
        return f"the headline {body['headline']!r} is no metric"
    if not all(isinstance(body["data"][key], kind) for key, kind in (("source", str), ("fingerprint", dict))):
        return "the data has no source or fingerprint"
    return None


def load_predictions(path: Path, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays beside a result file, one row a test item. Raises InputError where they are missing or damaged."""
    name = result.get("predictions_file")
    if not isinstance(name, str):
        raise InputError(f"{path}: holds no predictions; run the evaluator again with --out")
    beside = path.parent / Path(name).name
    try:
        data = beside.read_bytes()
        if result.get("predictions_sha256") not in (None, hashlib.sha256(data).hexdigest()):
            raise InputError(f"{beside}: its predictions are not those of {path.name}; run the evaluator again")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{beside}: predictions cannot be read ({type(error).__name__}); run the evaluator again"
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside the target that takes its place once the block ends without an error."""
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield path
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


def _plain(value: object) -> object:
    """What json cannot write by itself: numpy scalars and paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result holds a {type(value).__name__}, which JSON has no form for")


def result_table(result: Mapping[str, Any]) -> str:
    """The result as lines for a terminal: one row a metric, one column a network."""
    baselines: Mapping[str, Any] = result["baselines"]
    rows = [["metric", "value", "95 % interval", "n", *baselines]]
    for name, metric in result["metrics"].items():
        mark = "*" * (name == result["headline"]) + " (lower is better)" * bool(metric.get("lower_is_better"))
        others = [_figure(baseline["metrics"].get(name)) for baseline in baselines.values()]
        rows.append([f"{name}{mark}", _figure(metric), _interval(metric), str(metric["n"]), *others])
    lines = _columns(rows)
    lines += [
        f"published: {name} {reference['value']:.4f} ({source_text(reference)}); measured minus published {reference['difference']:+.4f}"
        for name, reference in result.get("published", {}).items()
    ]
    lines.append(f"* headline; chosen {_chosen(result['chosen'])} on {result['selected_on']}")
    lines.extend(_difference_line(result["headline"], name, baseline) for name, baseline in baselines.items())
    lines.extend(f"note: {note}" for note in result["notes"])
    return "\n".join(lines)


def _figure(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    unit = f" {metric['unit']}" if metric.get("unit") else ""
    return f"{metric['value']:.4f}{unit}"


def _interval(metric: Mapping[str, Any]) -> str:
    return "-" if metric["ci95"] is None else f"{metric['ci95'][0]:.4f} .. {metric['ci95'][1]:.4f}"


def _chosen(chosen: Mapping[str, Any]) -> str:
    words = (f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in chosen.items())
    return ", ".join(words) or "nothing"


def _difference_line(headline: str, name: str, baseline: Mapping[str, Any]) -> str:
    difference = baseline["difference"]
    return f"{headline} minus {name}: {_figure(difference)} (95 % {_interval(difference)}, paired)"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
