"""Unit-length features in, pairs of near neighbours out, in bounded memory: exact for small sets, inverted lists above.

A search is a list of blocks of queries. Each block is a file of its own, written atomically, so that a search goes on where it was
interrupted, and blocks can be searched anywhere (see `workers`). Read in this order: SearchSpec, build_index, search_block, pairs_above.

Legend: n stored features, q queries of a block, k neighbours, D feature size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from curation.folder import replacing
from data.errors import CheckFailed, InputError

BLOCK = 16_384
"""Queries of a block: their features, and k neighbours each, are what a search holds beside the index."""
_ADD_ROWS = 65_536
_TRAIN_PER_LIST = 40
_CALIBRATION_QUERIES = 256
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How neighbours are searched."""

    flat_below: int = 50_000
    """Up to so many stored features every pair is compared; above, features are sorted into lists and a few lists are read."""
    min_recall: float = 0.97
    """Share of the true k nearest neighbours that the lists must find; the number of lists read is measured and raised until they do."""

    def __post_init__(self) -> None:
        if not 0 < self.min_recall <= 1:
            raise InputError(f"--min-recall {self.min_recall}: wanted a share above 0, at most 1")
        if self.flat_below < 1:
            raise InputError(f"--flat-below {self.flat_below}: wanted at least 1")


def unit_rows(features_nD: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; an all-zero row stays zero and is near nothing."""
    rows = np.array(features_nD, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=rows, where=norms > 0)


def build_index(features_nD: np.ndarray, spec: SearchSpec) -> Any:
    """An index of unit rows for searches by cosine: all pairs up to `flat_below` rows, else inverted lists."""
    n, width = features_nD.shape
    if n <= spec.flat_below:
        index: Any = faiss.IndexFlatIP(width)
        _add_all(index, features_nD)
        return index
    n_lists = 2 ** round(math.log2(2 * math.sqrt(n)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, n_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical, index.cp.niter = _SEED + 1, True, 8
    rng = np.random.default_rng(_SEED)
    sample = np.sort(rng.choice(n, min(n, _TRAIN_PER_LIST * n_lists), replace=False))
    index.train(np.ascontiguousarray(features_nD[sample]))
    _add_all(index, features_nD)
    return index


def _add_all(index: faiss.Index, features_nD: np.ndarray) -> None:
    for start in range(0, len(features_nD), _ADD_ROWS):
        index.add(np.ascontiguousarray(features_nD[start : start + _ADD_ROWS]))


def lists_to_read(index: Any, features_nD: np.ndarray, queries_qD: np.ndarray, spec: SearchSpec, k: int) -> int:
    """How many lists a query must read: the smallest power of two with which a sample of the queries finds `min_recall` of its true k
    nearest; 0 for an index without lists. Raises CheckFailed where all lists are not enough.
    """
    if not hasattr(index, "nlist"):
        return 0
    rng = np.random.default_rng(_SEED)
    rows = np.sort(rng.choice(len(queries_qD), min(len(queries_qD), _CALIBRATION_QUERIES), replace=False))
    sample_sD = np.ascontiguousarray(queries_qD[rows])
    exact_sk = exact_neighbours(sample_sD, features_nD, k)[1]
    n_lists = 1
    while True:
        index.nprobe = n_lists
        found = recall(index.search(sample_sD, exact_sk.shape[1])[1], exact_sk)
        if found >= spec.min_recall:
            return n_lists
        if n_lists == index.nlist:
            raise CheckFailed(f"reading every list finds {found:.3f} of the true neighbours, wanted {spec.min_recall}")
        n_lists = min(2 * n_lists, index.nlist)


def exact_neighbours(queries_qD: np.ndarray, features_nD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [q, k] and rows [q, k] of the true nearest neighbours, block by block: the measure of every index."""
    best = np.full((len(queries_qD), 0), -np.inf, np.float32)
    rows = np.full((len(queries_qD), 0), -1, np.int64)
    for start in range(0, len(features_nD), _ADD_ROWS):
        block = queries_qD @ features_nD[start : start + _ADD_ROWS].T
        best = np.concatenate([best, block], axis=1)
        ids = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        rows = np.concatenate([rows, ids], axis=1)
        keep = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, keep, 1), np.take_along_axis(rows, keep, 1)
    return best, rows


def recall(found_qk: np.ndarray, exact_qk: np.ndarray) -> float:
    """Share of the exact rows that are among those found."""
    hits = sum(len(np.intersect1d(found, exact)) for found, exact in zip(found_qk, exact_qk, strict=True))
    return hits / exact_qk.size


def block_starts(n_queries: int) -> list[int]:
    """First query of every block."""
    return list(range(0, n_queries, BLOCK))


def search_block(index: Any, queries_qD: np.ndarray, start: int, k: int, threshold: float, out: Path) -> Path:
    """Search the queries of a block and keep the pairs above `threshold`: (query, stored row) int64 [E, 2], cosine float32 [E].

    `queries_qD` are all queries; `out` appears whole or not at all.
    """
    if out.is_file():
        return out
    block = np.ascontiguousarray(queries_qD[start : start + BLOCK])
    cosines_qk, rows_qk = index.search(block, min(k, index.ntotal))
    kept = (cosines_qk > threshold) & (rows_qk >= 0)
    query, place = np.nonzero(kept)
    pairs_E2 = np.stack([query + start, rows_qk[query, place]], axis=1).astype(np.int64)
    with replacing(out) as path, path.open("wb") as file:
        np.savez(file, pairs=pairs_E2, cosines=cosines_qk[query, place])
    return out


def pairs_above(
    files: Sequence[Path], threshold: float, *, of_one_set: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs [E, 2] and cosines [E] above a threshold, file by file; `of_one_set` leaves out an image beside itself."""
    for path in files:
        with np.load(path, allow_pickle=False) as block:
            pairs_E2, cosines_E = block["pairs"], block["cosines"]
        kept = cosines_E > threshold
        if of_one_set:
            kept &= pairs_E2[:, 0] != pairs_E2[:, 1]
        yield pairs_E2[kept], cosines_E[kept]
