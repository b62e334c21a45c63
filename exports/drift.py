"""Two runtimes and real images in, how far the second departs from the first out: angles, and what they cost in k-NN accuracy.

Both see the same images in the same preprocessing. Legend: n images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.datasets import Dataset
from data.errors import CheckFailed, InputError
from evaluators.classification import progress_bar
from evaluators.extract import ExtractSpec, FeatureTable, extract
from evaluators.knn import evaluate
from evaluators.results import Measurement
from evaluators.splits import Splits, labelled, open_splits
from runtimes.runtime import Runtime

MAX_IMAGES = 2000
"""Of each part; more would not make the figures sharper than the gate is."""
MIN_IMAGES = 8
"""With fewer a cosine says little about the network."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The most drift that a file may have and still be written."""

    min_cosine: float = 0.995
    """Mean cosine between its embeddings and the checkpoint's."""
    max_knn_loss: float = 0.005
    """k-NN accuracy lost, as a fraction of 1; judged where the images have labels."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_cosine <= 1 or not 0 <= self.max_knn_loss <= 1:
            raise InputError(
                f"--min-cosine {self.min_cosine} --max-knn-loss {self.max_knn_loss}: wanted fractions of 1"
            )


USUAL_TOLERANCE = Tolerance()


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What was measured; stored in the file."""

    images: int
    cosine_mean: float
    cosine_min: float
    knn_images: int | None = None
    """Images judged by k-NN; None: the set has no labels or no second class."""
    knn_before: float | None = None
    """Top-1 of the checkpoint, k chosen on training images. Test images are judged by the training images, and those by one another
    (each by all but its own group), since on the test images of a small set alone one image is more than the gate."""
    knn_after: float | None = None
    """Top-1 of the file with the same k."""
    data_fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def knn_loss(self) -> float | None:
        """Top-1 lost; below 0 where the file is better."""
        if self.knn_before is None or self.knn_after is None:
            return None
        return self.knn_before - self.knn_after

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"cosine of embeddings on {self.images} images: mean {self.cosine_mean:.5f}, lowest {self.cosine_min:.5f}"
        ]
        if self.knn_before is not None and self.knn_after is not None:
            told.append(
                f"k-NN top-1 on {self.knn_images} images: {100 * self.knn_before:.2f} before, "
                f"{100 * self.knn_after:.2f} after"
            )
        return told


def measure_drift(before: Runtime, after: Runtime, data: str) -> Drift:
    """Run both over `data`. Raises InputError for data that cannot be used, CheckFailed for features that are not finite."""
    splits, has_labels = open_parts(data)
    tables = [
        [_table(name, runtime, part, splits.group_column) for part in (splits.train, splits.val)]
        for name, runtime in (("before", before), ("after", after))
    ]
    cosines_n = np.concatenate([cosines(one, other) for one, other in zip(*tables, strict=True)])
    if len(cosines_n) < MIN_IMAGES:
        raise InputError(f"--data {data}: {len(cosines_n)} images; wanted at least {MIN_IMAGES} to measure drift on")
    fingerprint = splits.val.fingerprint()
    found = {"images": len(cosines_n), "cosine_mean": float(cosines_n.mean()), "cosine_min": float(cosines_n.min())}
    if not has_labels:
        return Drift(**found, data_fingerprint=fingerprint)  # type: ignore[arg-type]
    measured = [evaluate(train, val) for train, val in tables]
    judged = len(tables[0][1]), len(tables[0][0])
    top1 = [_accuracy(one, measured[0].chosen["k"], judged) for one in measured]
    return Drift(
        **found,  # type: ignore[arg-type]
        knn_images=sum(judged),
        knn_before=top1[0],
        knn_after=top1[1],
        data_fingerprint=fingerprint,
    )


def _accuracy(measured: Measurement, k: int, judged: tuple[int, int]) -> float:
    """Top-1 over test and training images together, so many of either."""
    entry = next(entry for entry in measured.grid if entry["k"] == k)
    right = entry["top1"] * judged[0] + entry["train_left_out_top1"] * judged[1]
    return float(right / sum(judged))


def open_parts(data: str) -> tuple[Splits, bool]:
    """The two parts of a set, and whether a k-NN can be judged on them; an unlabelled set is cut in two by name."""
    splits = open_splits(data)
    try:
        splits, has_labels = labelled(splits, data), True
    except InputError:
        has_labels = False
    parts = [part.subset(evenly(len(part), MAX_IMAGES)) for part in (splits.train, splits.val)]
    return Splits(parts[0], parts[1], splits.how, splits.group_column, splits.notes), has_labels


def evenly(n: int, wanted: int) -> Sequence[int]:
    """At most `wanted` of n positions, spread over all of them."""
    return sorted(set(np.linspace(0, n - 1, min(n, wanted)).astype(int).tolist())) if n else []


def _table(name: str, runtime: Runtime, part: Dataset, group_column: str | None) -> FeatureTable:
    spec = ExtractSpec(columns=("embedding",), batch_size=16, group_column=group_column)
    with progress_bar(f"{name}: {len(part)} images") as progress:
        return extract(runtime, part, spec, progress)


def cosines(before: FeatureTable, after: FeatureTable) -> np.ndarray:
    """Cosine of each image's two embeddings [n]; 0 where one of them is all zero."""
    a, b = before.features.astype(np.float64), after.features.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, 1e-30))


def check_drift(drift: Drift, tolerance: Tolerance) -> None:
    """Raise CheckFailed, with both figures, where the drift is more than allowed."""
    if not drift.cosine_mean >= tolerance.min_cosine:
        raise CheckFailed(
            f"embeddings have a mean cosine of {drift.cosine_mean:.5f} to the checkpoint's on {drift.images} images, "
            f"wanted at least {tolerance.min_cosine}; nothing was written"
        )
    loss = drift.knn_loss
    if loss is not None and loss > tolerance.max_knn_loss + 1e-9:
        raise CheckFailed(
            f"k-NN accuracy falls by {100 * loss:.2f} points, from {100 * (drift.knn_before or 0):.2f} to "
            f"{100 * (drift.knn_after or 0):.2f}; allowed {100 * tolerance.max_knn_loss:.2f}; nothing was written"
        )
