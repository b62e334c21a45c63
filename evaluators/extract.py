"""Images and a runtime in, a table of features out: the one place where evaluators run a network.

Every evaluator takes its features from here, so all see the same images through the same preprocessing (the one in
the manifest of whatever runs), and a second evaluator finds the first one's features in the cache.
Legend: n rows kept, D feature size, N patches.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.datasets import Dataset
from data.decode import DecodeError
from data.errors import CheckFailed, InputError
from data.preprocess import Preprocess, center_view, whole_view
from evaluators.feature_cache import FeatureStore, cache_key, open_store
from evaluators.splits import group_of
from runtimes.runtime import Runtime

View = Literal["center", "whole"]
"""`center`: resize and centre crop, as embeddings are served. `whole`: the whole image, as maps and depth are."""
Column = Literal["embedding", "patch_mean", "patches"]
"""`embedding` [n, D] (CLS after the last norm), `patch_mean` [n, D] (mean of the patch tokens), `patches` [n, N, D]."""

MAX_CORRUPT_SHARE = 0.05
"""More unreadable images than this share, and the figures would be about another data set."""
SAVE_EVERY_BATCHES = 20


@dataclass(frozen=True)
class Sanity:
    """What the features look like; a network that says the same about everything shows here."""

    zero_rows: int
    duplicate_rows: int
    norm_min: float
    norm_median: float
    norm_max: float

    def notes(self, what: str) -> list[str]:
        """Lines worth showing to a user."""
        notes = []
        if self.zero_rows:
            notes.append(f"{self.zero_rows} {what} images have an all-zero embedding")
        if self.duplicate_rows:
            notes.append(f"{self.duplicate_rows} {what} images have the very embedding of an earlier one")
        return notes


@dataclass(frozen=True)
class FeatureTable:
    """Features of the readable images of a data set, in its order."""

    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    groups: tuple[str, ...]
    """What ties images together (see `splits`); its own name where an image stands for itself."""
    columns: Mapping[str, np.ndarray]
    """float32 arrays with one row per image."""
    rows: tuple[int, ...] = ()
    """Row of the data set behind each row of the table."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of each image that could not be decoded."""
    sanity: Sanity | None = None
    cached: bool = False
    """Whether nothing had to be computed."""

    @property
    def features(self) -> np.ndarray:
        """The embedding, float32 [n, D]."""
        return self.columns["embedding"]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class ExtractSpec:
    """How a network is run over a data set."""

    columns: tuple[Column, ...] = ("embedding", "patch_mean")
    """A column the runtime has no output for is an error, except `patch_mean`, which is then left out."""
    view: View = "center"
    batch_size: int = 64
    max_corrupt_share: float = MAX_CORRUPT_SHARE
    cache_dir: Path | None = None
    """Root of the feature cache; None: features stay in memory."""
    group_column: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: wanted at least 1")


def extract(
    runtime: Runtime,
    dataset: Dataset,
    spec: ExtractSpec = ExtractSpec(),
    progress: Callable[[int, int], None] | None = None,
) -> FeatureTable:
    """Run the network over every image, or read what an earlier run left.

    `progress(done, total)` is called after each batch. Raises CheckFailed for features that are not finite and
    InputError when more than `max_corrupt_share` of the images cannot be decoded.
    """
    columns = available_columns(runtime, spec.columns)
    n = len(dataset.items)
    with open_store(spec.cache_dir, extraction_key(runtime, dataset, columns, spec.view), n) as store:
        cached = store.complete
        if not cached:
            _fill(store, runtime, dataset, columns, spec, progress)
            _check_share(store, dataset, spec.max_corrupt_share)
            store.finish()
        elif progress:
            progress(n, n)
        return _table(store, dataset, spec.group_column, cached)


def available_columns(runtime: Runtime, wanted: Sequence[Column]) -> tuple[Column, ...]:
    """The columns this runtime can give. Raises InputError when one that cannot be left out is missing."""
    columns = tuple(name for name in wanted if name != "patch_mean" or "patches" in runtime.outputs)
    for name in columns:
        if _output_of(name) not in runtime.outputs:
            raise InputError(
                f"the network has no output {_output_of(name)!r}, which this evaluator reads; "
                f"it has {', '.join(runtime.outputs)}"
            )
    return columns


def extraction_key(runtime: Runtime, dataset: Dataset, columns: Sequence[Column], view: View) -> str:
    """Key of the cache: weights, architecture, preprocessing, view, images, engine and device, and nothing else."""
    manifest = runtime.manifest
    return cache_key(
        {
            "weights": manifest.weights_sha256,
            "architecture": manifest.architecture,
            "preprocess": manifest.preprocess.to_json(),
            "view": view,
            "data": dataset.fingerprint(),
            "runtime": runtime.name,
            "device": runtime.device,
            "columns": list(columns),
        }
    )


def _output_of(column: Column) -> str:
    return "patches" if column == "patch_mean" else column


def _fill(
    store: FeatureStore,
    runtime: Runtime,
    dataset: Dataset,
    columns: Sequence[Column],
    spec: ExtractSpec,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Extract what the store does not hold yet."""
    outputs = tuple(dict.fromkeys(_output_of(name) for name in columns))
    n = len(dataset.items)
    batches = _decoded_batches(dataset, runtime.manifest.preprocess, spec.view, spec.batch_size, store.next_item)
    for number, (start, stop, pixels, skipped) in enumerate(batches, start=1):
        features: dict[str, np.ndarray] = {}
        if len(pixels):
            got = runtime.run(pixels, outputs)
            features = {name: _column(name, got) for name in columns}
            kept = [row for row in range(start, stop) if row not in skipped]
            _check_finite(store, features, [dataset.items[row].name for row in kept])
        store.append(features, stop - start, skipped)
        if number % SAVE_EVERY_BATCHES == 0:
            store.save_progress()
        if progress:
            progress(stop, n)


def _column(name: Column, got: Mapping[str, np.ndarray]) -> np.ndarray:
    if name == "patch_mean":
        return got["patches"].mean(axis=1, dtype=np.float32)
    return got[name]


def _check_finite(store: FeatureStore, features: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    for column, values in features.items():
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            store.discard()
            raise CheckFailed(
                f"{column} of {int(bad.sum())} of {len(names)} images of a batch is not finite, first of "
                f"{names[int(bad.argmax())]!r}: the weights are damaged or overflow; nothing was evaluated"
            )


def _check_share(store: FeatureStore, dataset: Dataset, max_share: float) -> None:
    if len(store.skipped) <= max_share * store.n_items and store.n_rows:
        return
    row, reason = next(iter(store.skipped.items()))
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(store.skipped.values()).most_common(3))
    store.discard()
    raise InputError(
        f"{len(store.skipped)} of {store.n_items} images cannot be decoded ({kinds}; first "
        f"{dataset.items[row].name!r}: {reason}), more than the {max_share:.0%} allowed; remove or repair them"
    )


def _decoded_batches(
    dataset: Dataset, preprocess: Preprocess, view: View, batch_size: int, first: int
) -> Iterator[tuple[int, int, np.ndarray, dict[int, str]]]:
    """Yield (start, stop, pixels [b, 3, H, W], skipped row -> reason); one thread decodes a batch ahead."""
    starts = list(range(first, len(dataset.items), batch_size))
    with ThreadPoolExecutor(max_workers=1) as decoder:

        def decode(start: int) -> tuple[int, int, np.ndarray, dict[int, str]]:
            return _decode_batch(dataset, preprocess, view, start, min(start + batch_size, len(dataset.items)))

        ahead = decoder.submit(decode, starts[0]) if starts else None
        for start in [*starts[1:], None]:
            if ahead is None:
                return
            ready = ahead.result()
            ahead = decoder.submit(decode, start) if start is not None else None
            yield ready


def _decode_batch(
    dataset: Dataset, preprocess: Preprocess, view: View, start: int, stop: int
) -> tuple[int, int, np.ndarray, dict[int, str]]:
    make_view = center_view if view == "center" else whole_view
    views: list[np.ndarray] = []
    skipped: dict[int, str] = {}
    for row in range(start, stop):
        try:
            views.append(make_view(dataset.image(row), preprocess))
        except DecodeError as error:
            skipped[row] = error.reason
    pixels = np.stack(views) if views else np.empty((0, 3, 0, 0), dtype=np.float32)
    return start, stop, pixels, skipped


def _table(store: FeatureStore, dataset: Dataset, group_column: str | None, cached: bool) -> FeatureTable:
    rows = tuple(row for row in range(store.n_items) if row not in store.skipped)
    items = [dataset.items[row] for row in rows]
    columns = store.columns()
    return FeatureTable(
        names=tuple(item.name for item in items),
        labels=tuple(item.label for item in items),
        groups=tuple(group_of(item, group_column) for item in items),
        columns=columns,
        rows=rows,
        skipped=tuple((dataset.items[row].name, reason) for row, reason in sorted(store.skipped.items())),
        sanity=inspect(columns["embedding"]) if "embedding" in columns else None,
        cached=cached,
    )


def inspect(features_ND: np.ndarray) -> Sanity:
    """Count all-zero rows and rows that repeat an earlier one bit by bit, and measure the norms."""
    norms_N = np.linalg.norm(features_ND, axis=1)
    distinct = len({row.tobytes() for row in features_ND})
    if not len(norms_N):
        return Sanity(0, 0, math.nan, math.nan, math.nan)
    return Sanity(
        zero_rows=int((norms_N == 0).sum()),
        duplicate_rows=len(features_ND) - distinct,
        norm_min=float(norms_N.min()),
        norm_median=float(np.median(norms_N)),
        norm_max=float(norms_N.max()),
    )
