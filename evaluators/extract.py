"""Images and a runtime in, a table of features out: the one place where evaluators run a network.

Every evaluator takes its features from here, so all see the same images through the same preprocessing (the one in
the manifest of whatever runs), and a second evaluator finds the first one's features in the cache.
Read in this order: ExtractSpec, extract, features_of, FeatureTable.
Legend: n rows kept, D feature size, N patches.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from data.datasets import Dataset
from data.errors import CheckFailed, InputError
from evaluators.feature_cache import FeatureStore, cache_key, open_store
from evaluators.splits import group_of
from evaluators.view_batches import Batch, ViewSpec, decoded_batches
from runtimes.runtime import Runtime, step_px
from runtimes.torch_runtime import TorchRuntime

Column = Literal["embedding", "patch_mean", "patch_gem", "patches", "cls_last4"]
"""`embedding` [n, D] (CLS after the last norm); of the patch tokens, `patch_mean` [n, D], `patch_gem` [n, D]
(generalised mean of power 4) or all `patches` [n, N, D]; `cls_last4` [n, 4 D], CLS of the last 4 blocks, oldest first."""
LEFT_OUT_IF_MISSING: tuple[Column, ...] = ("patch_mean", "cls_last4")
"""Columns that some runtimes cannot give, and that evaluators do without."""

MAX_CORRUPT_SHARE = 0.05
"""More unreadable images than this share, and the figures would be about another data set."""
SAVE_EVERY_S = 5.0
"""What a killed extraction loses at most, and one batch."""
ROWS_AT_ONCE = 8192
"""Features that are looked at together, so that no copy of a large set is made."""
GEM_POWER, GEM_FLOOR = 4.0, 1e-6
"""Of DINO's copy detection."""


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
    augmented: tuple["FeatureTable", ...] = ()
    """Other views of the same images in the same order, to train on."""

    @property
    def features(self) -> np.ndarray:
        """The embedding, float32 [n, D]."""
        return self.columns["embedding"]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class ExtractSpec:
    """How a network is run over a data set."""

    columns: tuple[Column, ...] = ("embedding", "patch_mean", "cls_last4")
    """A column the runtime cannot give is an error, except those that are `LEFT_OUT_IF_MISSING`."""
    view: ViewSpec = field(default_factory=ViewSpec)
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which each view is shown; with several, embeddings are averaged and brought to length 1."""
    batch_size: int = 64
    workers: int = 1
    """Threads that decode images."""
    max_corrupt_share: float = MAX_CORRUPT_SHARE
    cache_dir: Path | None = None
    """Root of the feature cache; None: features stay in memory."""
    group_column: str | None = None
    augmented: tuple[ViewSpec, ...] = ()
    """Further views of training images; `extract` leaves them to its callers."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise InputError(f"--batch-size {self.batch_size}, --workers {self.workers}: wanted at least 1 of each")
        if not self.scales or not all(0.01 <= scale <= 4 for scale in self.scales):
            raise InputError(f"--scales {' '.join(map(str, self.scales)) or '(empty)'}: wanted sizes from 0.01 to 4")
        if self.scales != (1.0,) and self.columns != ("embedding",):
            raise InputError("several scales are for embeddings alone")


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
    with open_store(spec.cache_dir, extraction_key(runtime, dataset, columns, spec), n) as store:
        cached = store.complete
        if not cached:
            try:
                _fill(store, runtime, dataset, columns, spec, progress)
            except InputError as error:
                if runtime.device != "remote":
                    raise
                raise InputError(f"{error}; {_left_behind(store, n)}") from error
            check_share(store, dataset, spec.max_corrupt_share)
            store.finish()
        elif progress:
            progress(n, n)
        return _table(store, dataset, spec.group_column, cached)


def _left_behind(store: FeatureStore, n: int) -> str:
    """What becomes of the features that a server gave before it failed."""
    if store.folder is None:
        return "nothing is kept without --cache-dir; once the server is back, run the same command again"
    return f"{store.next_item} of {n} images are saved: once the server is back, the same command goes on from there"


def available_columns(runtime: Runtime, wanted: Sequence[Column]) -> tuple[Column, ...]:
    """The columns this runtime can give. Raises InputError when one that cannot be left out is missing."""
    columns = tuple(name for name in wanted if _gives(runtime, name) or name not in LEFT_OUT_IF_MISSING)
    for name in columns:
        if not _gives(runtime, name):
            raise InputError(
                f"the network has no output {_output_of(name)!r}, which this evaluator reads; "
                f"it has {', '.join(runtime.outputs)}"
            )
    return columns


def _gives(runtime: Runtime, name: Column) -> bool:
    if name == "cls_last4":
        architecture = runtime.manifest.architecture
        is_resnet = architecture.get("family") == "resnet"  # its depth counts layers, which have no CLS token
        return isinstance(runtime, TorchRuntime) and not is_resnet and int(architecture.get("depth", 0)) >= 4
    return _output_of(name) in runtime.outputs


def _output_of(column: Column) -> str:
    return "patches" if column in ("patch_mean", "patch_gem") else column


def extraction_key(runtime: Runtime, dataset: Dataset, columns: Sequence[Column], spec: ExtractSpec) -> str:
    """Key of the cache: weights, architecture, preprocessing, view, images, engine and device, and nothing else."""
    manifest = runtime.manifest
    parts = {
        "weights": manifest.weights_sha256,
        "architecture": manifest.architecture,
        "preprocess": manifest.preprocess.to_json(),
        "data": dataset.fingerprint(),
        "runtime": runtime.name,
        "precision": runtime.precision,
        "device": runtime.device,
        "columns": list(columns),
        **spec.view.to_json(),
    }
    return cache_key(parts if spec.scales == (1.0,) else parts | {"scales": list(spec.scales)})


def _fill(
    store: FeatureStore,
    runtime: Runtime,
    dataset: Dataset,
    columns: Sequence[Column],
    spec: ExtractSpec,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Extract what the store does not hold yet."""
    n = len(dataset.items)
    preprocess, first = runtime.manifest.preprocess, store.next_item
    batches = decoded_batches(dataset, preprocess, spec.view, spec.batch_size, first, spec.workers)
    saved = time.monotonic()
    for batch in batches:
        features = _batch_features(runtime, batch, columns, spec.scales)
        _check_finite(store, features, [dataset.items[row].name for row in batch.rows])
        store.append(features, batch.stop - batch.start, batch.skipped)
        if time.monotonic() - saved >= SAVE_EVERY_S:
            store.save_progress()
            saved = time.monotonic()
        if progress:
            progress(batch.stop, n)


def _batch_features(
    runtime: Runtime, batch: Batch, columns: Sequence[Column], scales: Sequence[float]
) -> dict[str, np.ndarray]:
    """Features of a batch in the order of its views; views of one shape go through the network together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, view in enumerate(batch.views):
        by_shape.setdefault(view.shape, []).append(place)
    features: dict[str, np.ndarray] = {}
    for places in by_shape.values():
        pixels_BCHW = np.stack([batch.views[place] for place in places])
        for name, values in features_of(runtime, pixels_BCHW, columns, scales).items():
            if name not in features:
                features[name] = np.empty((len(batch.views), *values.shape[1:]), np.float32)
            if values.shape[1:] != features[name].shape[1:]:
                raise InputError(f"{name} is of another shape for images of another size; wanted square views for it")
            features[name][places] = values
    return features


def features_of(
    runtime: Runtime, pixels_BCHW: np.ndarray, columns: Sequence[Column], scales: Sequence[float] = (1.0,)
) -> dict[str, np.ndarray]:
    """The columns of normalised pixels of any size; what does not fill a patch at the right and lower border is cut off."""
    if tuple(scales) == (1.0,):
        return _columns_of(runtime, _whole_patches(pixels_BCHW, step_px(runtime.manifest)), columns)
    total: np.ndarray | float = 0.0
    for scale in scales:
        scaled = torch.from_numpy(pixels_BCHW)
        if scale != 1:
            scaled = F.interpolate(scaled, scale_factor=scale, mode="bilinear", align_corners=False)
        shown = _whole_patches(scaled.numpy(), step_px(runtime.manifest))
        total = total + _columns_of(runtime, shown, ("embedding",))["embedding"]
    mean_BD = np.asarray(total) / len(scales)
    return {"embedding": mean_BD / np.maximum(np.linalg.norm(mean_BD, axis=1, keepdims=True), 1e-12)}


def _whole_patches(pixels_BCHW: np.ndarray, step: int) -> np.ndarray:
    """What fills whole patches; a side shorter than one patch is stretched to it first."""
    height, width = pixels_BCHW.shape[2:]
    if min(height, width) < step:
        size = (max(height, step), max(width, step))
        stretched = F.interpolate(torch.from_numpy(pixels_BCHW), size=size, mode="bilinear", align_corners=False)
        pixels_BCHW, (height, width) = stretched.numpy(), size
    return np.ascontiguousarray(pixels_BCHW[:, :, : height // step * step, : width // step * step])


def _columns_of(runtime: Runtime, pixels_BCHW: np.ndarray, columns: Sequence[Column]) -> dict[str, np.ndarray]:
    if "cls_last4" in columns and isinstance(runtime, TorchRuntime):
        cls_B4D, patches_BND = runtime.run_blocks(pixels_BCHW, 4)
        got = {"embedding": cls_B4D[:, -1], "patches": patches_BND, "cls_last4": cls_B4D.reshape(len(cls_B4D), -1)}
    else:
        got = runtime.run(pixels_BCHW, tuple(dict.fromkeys(_output_of(name) for name in columns)))
    if "patch_mean" in columns:
        got["patch_mean"] = got["patches"].mean(axis=1, dtype=np.float32)
    if "patch_gem" in columns:
        got["patch_gem"] = generalised_mean(got["patches"])
    return {name: got[name] for name in columns}


def generalised_mean(patches_BND: np.ndarray) -> np.ndarray:
    """GeM pooling [B, D] (Radenovic et al. 2018): the fourth root of the mean fourth power of what is above 0."""
    powers = np.maximum(patches_BND, GEM_FLOOR) ** GEM_POWER
    pooled: np.ndarray = powers.mean(axis=1, dtype=np.float32) ** (1 / GEM_POWER)
    return pooled


def _check_finite(store: FeatureStore, features: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    for column, values in features.items():
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            store.discard()
            raise CheckFailed(
                f"{column} of {int(bad.sum())} of {len(names)} images of a batch is not finite, first of "
                f"{names[int(bad.argmax())]!r}: the weights are damaged or overflow; nothing was evaluated"
            )


def check_share(store: FeatureStore, dataset: Dataset, max_share: float) -> None:
    """Raise InputError, and forget the entry, where more images than this share could not be decoded."""
    if len(store.skipped) <= max_share * store.n_items and store.n_rows:
        return
    row, reason = next(iter(store.skipped.items()))
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(store.skipped.values()).most_common(3))
    store.discard()
    raise InputError(
        f"{len(store.skipped)} of {store.n_items} images cannot be decoded ({kinds}; first "
        f"{dataset.items[row].name!r}: {reason}), more than the {max_share:.0%} allowed; remove or repair them"
    )


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
    """Count all-zero rows and rows that repeat an earlier one, bit by bit (by a hash of 64 bits), and measure the norms."""
    features = np.asarray(features_ND)  # rows of a memory map would each be one
    n, width = features.shape
    if not n:
        return Sanity(0, 0, math.nan, math.nan, math.nan)
    norms_N, hash_N = np.empty(n, np.float32), np.empty(n, np.uint64)
    odd_D = np.random.default_rng(0).integers(0, 2**64, width, dtype=np.uint64) | np.uint64(1)
    for start in range(0, n, ROWS_AT_ONCE):
        rows = np.ascontiguousarray(features[start : start + ROWS_AT_ONCE])
        norms_N[start : start + len(rows)] = np.linalg.norm(rows, axis=1)
        hash_N[start : start + len(rows)] = rows.view(np.uint32).astype(np.uint64) @ odd_D
    return Sanity(
        zero_rows=int((norms_N == 0).sum()),
        duplicate_rows=n - len(np.unique(hash_N)),
        norm_min=float(norms_N.min()),
        norm_median=float(np.median(norms_N)),
        norm_max=float(norms_N.max()),
    )
