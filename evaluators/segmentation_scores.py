"""Predicted and true classes of pixels in, mean IoU with its interval out.

Intersections and areas are counted for each image and summed over the whole set before a class's IoU is taken, so large
and small images count by their pixels; a class that is in neither truth nor prediction does not count. Pixels are those of
the true mask, at its own size.
Legend: n images, C classes, R resamples.
"""

from dataclasses import dataclass

import numpy as np

from evaluators.bootstrap import interval95
from evaluators.results import Metric


@dataclass(frozen=True)
class Counts:
    """Pixels of each image and class, int64 [n, C]."""

    both: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    @staticmethod
    def of(images: list[np.ndarray]) -> "Counts":
        """From the arrays [3, C] that `count` gave."""
        stacked = np.stack(images, axis=1)
        return Counts(*stacked)

    @property
    def columns(self) -> np.ndarray:
        """[n, 3 C], for resampling."""
        return np.concatenate([self.both, self.predicted, self.true], axis=1)


def count(predicted_HW: np.ndarray, truth_HW: np.ndarray, n_classes: int) -> np.ndarray:
    """Pixels in both, predicted and true of each class, int64 [3, C]; where the truth is below 0 nothing counts."""
    known = truth_HW >= 0
    predicted, true = predicted_HW[known], truth_HW[known]
    agreed = true[predicted == true]
    return np.stack([np.bincount(one, minlength=n_classes) for one in (agreed, predicted, true)])


def class_iou(sums: np.ndarray) -> np.ndarray:
    """IoU of each class [..., C] from sums [..., 3 C]; NaN where a class is in neither."""
    both, predicted, true = np.split(sums, 3, axis=-1)
    either = predicted + true - both
    iou: np.ndarray = np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)
    return iou


def mean_iou(sums_R3C: np.ndarray) -> np.ndarray:
    """[R]"""
    return np.nanmean(class_iou(sums_R3C), axis=-1)


def pixel_accuracy(sums_R3C: np.ndarray) -> np.ndarray:
    """[R]"""
    both, _, true = np.split(sums_R3C, 3, axis=-1)
    shares: np.ndarray = both.sum(axis=-1) / true.sum(axis=-1)
    return shares


def class_accuracy(sums_R3C: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of the share of their pixels that was found, [R]."""
    both, _, true = np.split(sums_R3C, 3, axis=-1)
    return np.nanmean(np.divide(both, true, out=np.full(both.shape, np.nan), where=true > 0), axis=-1)


STATISTICS = {"miou": mean_iou, "pixel_accuracy": pixel_accuracy, "class_accuracy": class_accuracy}


def segmentation_metrics(counts: Counts, groups_n: np.ndarray) -> dict[str, Metric]:
    """Mean IoU, the share of right pixels, and its mean over classes, with intervals over images (or groups of them)."""
    columns = counts.columns.astype(np.float64)
    total = columns.sum(axis=0)[None]
    return {
        name: Metric(float(statistic(total)[0]), interval95(columns, statistic, groups_n), len(columns))
        for name, statistic in STATISTICS.items()
    }


def miou_difference(ours: Counts, theirs: Counts, groups_n: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean IoU of one model minus that of another on the same images, and its paired interval."""
    columns = np.concatenate([ours.columns, theirs.columns], axis=1).astype(np.float64)

    def difference(sums: np.ndarray) -> np.ndarray:
        first, second = np.split(sums, 2, axis=-1)
        return mean_iou(first) - mean_iou(second)

    return float(difference(columns.sum(axis=0)[None])[0]), interval95(columns, difference, groups_n)


def image_mean_iou(counts: Counts) -> np.ndarray:
    """Mean over an image's classes of their IoU in it, [n]: what pictures and paired tests by image are sorted by."""
    iou_nC = class_iou(counts.columns.astype(np.float64))
    return np.nan_to_num(np.nanmean(iou_nC, axis=1))
