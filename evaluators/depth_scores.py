"""Predicted maps beside measured ones in, the figures of a set out, with those of one mean map to compare with.

Figures are taken per image over the measured pixels, then averaged over images.
Legend: n images, H W pixels.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import cv2
import numpy as np

from data.errors import InputError
from evaluators.bootstrap import drawn_groups, mean_interval95
from evaluators.depth_metrics import LOWER_IS_BETTER, METRE_METRICS, image_metrics
from evaluators.depth_probe import DepthTable, sample_nearest
from evaluators.depth_protocol import DepthSpec
from evaluators.results import Measurement, Metric

VERSION = 1
HEADLINE = "abs_rel"
SHORT_UNITS = {"metre": "m", "pixel of disparity": "px"}


def in_range(depth_HW: np.ndarray, spec: DepthSpec) -> np.ndarray:
    """The measured map without what lies beyond the head's range."""
    return np.where(depth_HW > spec.max_depth, np.float32(0), depth_HW)


def aligned(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> np.ndarray:
    """A predicted map times a scale plus a shift, those that bring it nearest (least squares) to what was measured.

    A scale below 0 (near taken for far) is not granted: the mean is then all that is left. Results stay above 0.
    """
    known = measured_HW > 0
    if not known.any():
        return predicted_HW
    x, y = predicted_HW[known].astype(np.float64), measured_HW[known].astype(np.float64)
    spread = x.var()
    scale = max(0.0, float(((x - x.mean()) * (y - y.mean())).mean() / spread)) if spread > 1e-12 else 0.0
    brought: np.ndarray = np.maximum((predicted_HW - x.mean()) * scale + y.mean(), 1e-3)
    return brought


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


def evaluate_mean(train: DepthTable, test: DepthTable, spec: DepthSpec, unit: str = "metre") -> Measurement:
    """The figures of one map for every image."""
    mean = mean_map(train, spec)
    maps = (cv2.resize(mean, depth.shape[::-1], interpolation=cv2.INTER_LINEAR) for depth in test.depth_m)
    words = "geometric mean of training maps"
    return score(maps, test, spec, protocol=words, selected_on="train", chosen={}, grid=[], unit=unit)


def score(
    maps: Iterator[np.ndarray],
    test: DepthTable,
    spec: DepthSpec,
    *,
    protocol: str,
    selected_on: str,
    chosen: dict[str, Any],
    grid: list[dict[str, Any]],
    unit: str = "metre",
) -> Measurement:
    """Figures of predicted maps, in the order of `test`. Raises InputError where no test image has a measurement."""
    short = SHORT_UNITS.get(unit, unit)
    figures: list[dict[str, float]] = []
    rows: list[int] = []
    beyond = 0
    for row, (predicted_HW, measured_HW) in enumerate(zip(maps, test.depth_m, strict=True)):
        counted_HW = in_range(measured_HW, spec)
        found = image_metrics(aligned(predicted_HW, counted_HW) if spec.align else predicted_HW, counted_HW)
        beyond += int((measured_HW > spec.max_depth).sum())
        if found is not None:
            figures.append(found)
            rows.append(row)
    if not figures:
        raise InputError(
            f"none of the {len(test.names)} test images has a measured depth up to {spec.max_depth:g} {short}"
        )
    notes = []
    if len(rows) < len(test.names):
        notes.append(f"{len(test.names) - len(rows)} test images have no measurement and were left out")
    if beyond:
        notes.append(
            f"{beyond} measured test pixels lie beyond {spec.max_depth:g} {short} and do not count; see --max-depth"
        )
    groups_n, too_few = drawn_groups([test.groups[row] for row in rows])
    columns = {name: np.array([one[name] for one in figures]) for name in figures[0]}
    return Measurement(
        evaluator="depth",
        protocol=protocol,
        version=VERSION,
        metrics={name: depth_metric(name, values, groups_n, unit) for name, values in columns.items()},
        headline=HEADLINE,
        selected_on=selected_on,
        chosen=chosen,
        grid=grid,
        settings=asdict(spec),
        notes=notes + too_few,
        predictions={
            "names": np.array([test.names[row] for row in rows]),
            "rows": np.array(rows),
            "score": columns[HEADLINE],
            "groups": groups_n,
            **columns,
        },
    )


def depth_metric(name: str, values_n: np.ndarray, groups_n: np.ndarray, unit: str = "metre") -> Metric:
    """Mean over images with its interval."""
    return Metric(
        value=float(values_n.mean()),
        ci95=mean_interval95(values_n, groups_n),
        n=len(values_n),
        unit=SHORT_UNITS.get(unit, unit) if name in METRE_METRICS else None,
        lower_is_better=name in LOWER_IS_BETTER,
    )
