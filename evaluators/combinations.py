"""Feature tables in, the combinations of features that linear classifiers are trained on out.

    cls                     CLS of the last block
    cls+patch_mean          followed by the mean patch of the last block
    cls_last4               CLS of the last 4 blocks, oldest first
    cls_last4+patch_mean    followed by the mean patch of the last block
    cls*patch_mean          CLS and mean patch in turn, feature by feature, as DINO's released classifiers want them

The first four (DINOv2) are ranges of columns of one wide matrix, so that a batch is put together once for all.
Legend: n images, B of a batch, D feature size, W width of the wide matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluators.extract import FeatureTable

ROWS_LOOKED_AT = 64
"""Images by which a network without CLS is told."""
DINO_CONCATENATES_BELOW = 768
"""DINO reads the last 4 blocks of ViTs narrower than this, and CLS with mean patch of others."""


def interleaved(cls_nD: np.ndarray, patch_mean_nD: np.ndarray) -> np.ndarray:
    """[n, 2 D]: c0, a0, c1, a1, ..."""
    return np.stack([cls_nD, patch_mean_nD], axis=2).reshape(len(cls_nD), -1)


def combinations(table: FeatureTable) -> dict[str, np.ndarray]:
    """Every combination [n, ...] by name; what the network does not give is not there."""
    columns = table.columns
    combined = {"cls": table.features}
    if "patch_mean" in columns:
        combined["cls+patch_mean"] = np.concatenate([table.features, columns["patch_mean"]], axis=1)
        combined["cls*patch_mean"] = interleaved(table.features, columns["patch_mean"])
    if "cls_last4" in columns:
        combined["cls_last4"] = columns["cls_last4"]
        if "patch_mean" in columns:
            combined["cls_last4+patch_mean"] = np.concatenate([columns["cls_last4"], columns["patch_mean"]], axis=1)
    return combined


def has_cls(table: FeatureTable) -> bool:
    """Whether the embedding says more than the mean patch. That of a ResNet is the mean patch, and twice the same are no more features."""
    if "patch_mean" not in table.columns:
        return True
    embedding, mean = (table.columns[name][:ROWS_LOOKED_AT] for name in ("embedding", "patch_mean"))
    return embedding.shape != mean.shape or not np.allclose(embedding, mean, rtol=1e-3, atol=1e-4)


def names_for(preset: str | None, table: FeatureTable) -> tuple[str, ...]:
    """Combinations of a protocol, among those that the table has; without a preset, those of the last block, which
    every engine gives. Of a network without CLS it is the embedding alone."""
    if not has_cls(table):
        return ("cls",)
    last, blocks = "patch_mean" in table.columns, "cls_last4" in table.columns
    if preset == "dino":
        if last and table.features.shape[1] >= DINO_CONCATENATES_BELOW:
            return ("cls*patch_mean",)
        return ("cls_last4",) if blocks else ("cls",)
    names = ["cls", *(["cls+patch_mean"] if last else [])]
    if preset == "dinov2" and blocks:
        names += ["cls_last4", *(["cls_last4+patch_mean"] if last else [])]
    return tuple(names)


@dataclass(frozen=True)
class Wide:
    """One matrix of which every combination is a range of columns, for one or several views of the same images."""

    views: tuple[tuple[np.ndarray, ...], ...]
    """For each view, the arrays [n, ...] that stand side by side."""
    slices: Mapping[str, slice]
    alternating: bool = False
    """Whether the two arrays of a view alternate column by column."""

    def take(self, rows_B: Tensor | np.ndarray, view: int = 0) -> Tensor:
        """Features [B, W] of these images in a view; views come round again."""
        width = sum(array.shape[1] for array in self.views[0])
        out_BW = torch.empty(len(rows_B), width)
        self.take_into(rows_B, view, slice(0, width), out_BW)
        return out_BW

    def take_into(self, rows_B: Tensor | np.ndarray, view: int, columns: slice, out: Tensor) -> None:
        """Write these columns of `take`'s features to `out`."""
        rows, out_BC, begin = np.asarray(rows_B), out.numpy(), 0
        arrays = self.views[view % len(self.views)]
        if self.alternating:
            out_BC[:] = interleaved(*(array[rows] for array in arrays))[:, columns]
            return
        for array in arrays:
            end = begin + array.shape[1]
            first, last = max(begin, columns.start), min(end, columns.stop)
            if first < last:
                out_BC[:, first - columns.start : last - columns.start] = array[rows, first - begin : last - begin]
            begin = end


def wide(tables: Sequence[FeatureTable], names: Sequence[str]) -> Wide:
    """The wide matrix of these combinations, of one or several views of the same images."""
    columns, width = tables[0].columns, tables[0].features.shape[1]
    if "cls*patch_mean" in names:
        pairs = tuple((table.features, table.columns["patch_mean"]) for table in tables)
        return Wide(pairs, {"cls*patch_mean": slice(0, 2 * width)}, alternating=True)
    front = "cls_last4" if any(name.startswith("cls_last4") for name in names) else "embedding"
    kept = [front, *(["patch_mean"] if any(name.endswith("+patch_mean") for name in names) else [])]
    end = columns[front].shape[1]
    starts = {"cls": end - width, "cls_last4": 0}
    slices = {}
    for name in names:
        base, _, mean = name.partition("+")
        slices[name] = slice(starts[base], end + (width if mean else 0))
    return Wide(tuple(tuple(table.columns[name] for name in kept) for table in tables), slices)
