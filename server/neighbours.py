"""A collection in memory: unit vectors with ids and labels, searched exactly.

Axes: N queries, n items, D feature size, k neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import InputError

DEFAULT_K = 5


@dataclass(frozen=True)
class Found:
    """Nearest items: positions in the snapshot [N,k] and cosines [N,k], best first."""

    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """A collection at one moment. Never changed; safe to search from any number of threads."""

    name: str
    ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    unit_nD: np.ndarray

    def check_k(self, k: int | None) -> int:
        """How many neighbours a request gets. Raises InputError when the collection has too few."""
        n = len(self.ids)
        if n == 0:
            raise InputError(f"collection {self.name!r} is empty; add items to it first")
        if k is not None and not 1 <= k <= n:
            raise InputError(f"parameter 'k' is {k}, and collection {self.name!r} holds {n} items; wanted 1 to {n}")
        return min(DEFAULT_K, n) if k is None else k

    def search(self, queries_ND: np.ndarray, k: int) -> Found:
        """The exact k nearest by cosine, equal ones in the order of adding. Raises InputError for a zero query."""
        length = np.linalg.norm(queries_ND, axis=1, keepdims=True)
        without = ~np.isfinite(length[:, 0]) | (length[:, 0] == 0)
        if without.any():
            bad = int(np.argmax(without))
            raise InputError(f"embedding {bad} is zero or not finite, so it has no direction to compare")
        scores_Nn = (queries_ND / length).astype(np.float32) @ self.unit_nD.T
        rows = np.stack([_largest(scores_n, k) for scores_n in scores_Nn])
        return Found(rows, np.clip(np.take_along_axis(scores_Nn, rows, 1), -1, 1))  # a cosine, whatever float32 rounds

    def extended(self, rows: Sequence[Mapping[str, Any]]) -> "Snapshot":
        """A new snapshot with these items (`id`, `label`, `vector` as float32 bytes) after the others."""
        if not rows:
            return self
        vectors = np.frombuffer(b"".join(row["vector"] for row in rows), "<f4").reshape(len(rows), -1)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        ids, labels = tuple(row["id"] for row in rows), tuple(row["label"] for row in rows)
        return Snapshot(self.name, self.ids + ids, self.labels + labels, np.concatenate([self.unit_nD, unit]))

    def without(self, item_id: str) -> "Snapshot":
        """A new snapshot that lacks one item."""
        at = self.ids.index(item_id)
        ids, labels = self.ids[:at] + self.ids[at + 1 :], self.labels[:at] + self.labels[at + 1 :]
        return Snapshot(self.name, ids, labels, np.delete(self.unit_nD, at, axis=0))


def _largest(scores_n: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest, largest first, lowest position first among equals, also at the k-th place."""
    threshold = np.partition(scores_n, -k)[-k]
    candidates = np.flatnonzero(scores_n >= threshold)
    return candidates[np.argsort(-scores_n[candidates], kind="stable")[:k]]
