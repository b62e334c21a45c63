"""Unit features in, the exact nearest rows out: the one search behind k-NN, retrieval and copy detection.

Similarities are one matrix product a chunk of queries, in a buffer that is used again, so memory holds the database and
two chunks. Selecting k of n must not cost as much as the product: the k-th largest of the maxima of n / GROUP groups is
a lower bound of the k-th largest similarity, and only the few entries that reach it are sorted. Groups are strided, so
that images of one class, which lie side by side in most sets, fall into different ones.
Read in this order: unit_rows, similarity_chunks, top_rows, in_parts, nearest.
Legend: n database rows, q queries, c queries of a chunk, k neighbours, D feature size.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Part = TypeVar("Part")

CHUNK_QUERIES = 1024
CHUNK_BYTES = 256 * 2**20
"""Largest block of similarities held at a time, unless half the database is more: products with few queries are slow."""
GROUP = 32
"""Columns that share a maximum."""
BLOCK_BYTES = 2**22
"""Similarities that are searched at a time: small enough for a cache to hold what was read to bound them when they are compared,
large enough for threads not to wait for the interpreter between steps."""
PART_ROWS = 128
"""Queries whose nearest are sorted at a time, in a core's cache."""
KEY_BYTES = 2**24
"""Keys of whole rows that a thread sorts at a time."""
MIN_GROUPS = 4
"""Groups wanted for each neighbour; with fewer, whole rows are sorted."""
MAX_HITS = 8
"""A row with more entries above its bound than this times k (ties) is sorted as a whole."""


def unit_rows(features_nD: np.ndarray | Tensor) -> Tensor:
    """A float32 copy with rows of length 1; an all-zero row stays zero and is equally far from everything."""
    rows_nD = (
        torch.tensor(features_nD, dtype=torch.float32) if isinstance(features_nD, np.ndarray) else features_nD.clone()
    )
    rows_nD /= torch.linalg.vector_norm(rows_nD, dim=1, keepdim=True).clamp_min(1e-12)
    return rows_nD


def similarity_chunks(
    bank_nD: Tensor, queries_qD: np.ndarray | Tensor, cosine: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first query's row and the similarities [c, n] of each chunk; the tensor is overwritten by the next.

    `bank_nD` has unit rows. Queries are brought to length 1 a chunk at a time, unless `cosine` is off.
    """
    n = len(bank_nD)
    most = max(CHUNK_BYTES, bank_nD.nbytes // 2) // (4 * max(1, n))
    chunk = max(1, min(CHUNK_QUERIES, most, len(queries_qD)))
    buffer_cn = torch.empty(chunk, n)
    for start in range(0, len(queries_qD), chunk):
        queries = queries_qD[start : start + chunk]
        queries_cD = unit_rows(queries) if cosine else torch.as_tensor(queries)
        similarity_cn = buffer_cn[: len(queries_cD)]
        torch.mm(queries_cD, bank_nD.T, out=similarity_cn)
        yield start, similarity_cn


def top_rows(similarity_cn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, [c, k] each, largest first, lowest column first among equals.

    Exact, also where equals lie on both sides of the k-th place. The values are finite or -inf.
    """
    values_cn, k = similarity_cn.numpy(), min(k, similarity_cn.shape[1])
    parts = in_parts(lambda part: _top_rows(values_cn[part], k), len(values_cn), PART_ROWS)
    values, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(values), torch.from_numpy(rows)


def in_parts(work: Callable[[slice], Part], rows: int, step: int) -> list[Part]:
    """What `work` returns for each `step` of the rows, in order (one empty part where there are none).

    As many at once as torch may use threads: what is done here is NumPy's, which lets go of the interpreter but keeps to one core.
    """
    parts = [slice(start, start + step) for start in range(0, max(1, rows), step)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads, thread_name_prefix="neighbours") as pool:
        return list(pool.map(work, parts))


def _top_rows(values_cn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    c, n = values_cn.shape
    if n // GROUP < MIN_GROUPS * k:
        return _sorted_rows(values_cn, k)
    hits, found = _hits(values_cn, k)
    ends_c = np.searchsorted(hits, np.arange(1, c + 1) * n)
    counts_c = np.diff(ends_c, prepend=0)
    few_c = counts_c <= MAX_HITS * k
    if not few_c.all():
        many = np.flatnonzero(~few_c)
        kept = few_c[hits // n]
        hits, found = hits[kept], found[kept]
        counts_c = np.where(few_c, counts_c, 0)
    row_of_hit = np.repeat(np.arange(c), counts_c)
    columns = hits - row_of_hit * n
    slots = np.arange(len(hits)) - np.repeat(np.cumsum(counts_c) - counts_c, counts_c)
    keys_cL = np.full((c, max(k, int(counts_c.max(initial=0)))), np.iinfo(np.int64).min)
    keys_cL[row_of_hit, slots] = _keys(found, columns)
    values, rows = _take(keys_cL, k)
    if not few_c.all():
        values[many], rows[many] = _sorted_rows(values_cn[many], k)
    return values, rows


def _hits(values_cn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Places, counted through all rows, and values of the entries that reach their row's bound; places rise."""
    c, n = values_cn.shape
    rows = min(c, max(1, BLOCK_BYTES // (4 * n)))
    reached = np.zeros(-(-rows * n // 512) * 512, bool)
    places, values = [], []
    for start in range(0, c, rows):
        block_rn = values_cn[start : start + rows]
        bound_r = _lower_bound(block_rn, k)
        reached[block_rn.size :] = False
        np.greater_equal(block_rn, bound_r[:, None], out=reached[: block_rn.size].reshape(block_rn.shape))
        own = _few_places(reached)
        places.append(own + start * n)
        values.append(block_rn.reshape(-1)[own])
    return np.concatenate(places), np.concatenate(values)


def _few_places(flags: np.ndarray) -> np.ndarray:
    """Where flags are set: eight at a time are passed over, and eight of these; their number is a multiple of 64."""
    words = flags.view(np.uint64)
    some = _few_places(words != 0) if len(words) % 64 == 0 else np.flatnonzero(words != 0)
    within = np.flatnonzero(words[some].view(bool))
    places: np.ndarray = some[within >> 3] * 8 + (within & 7)
    return places


def _lower_bound(values_cn: np.ndarray, k: int) -> np.ndarray:
    """For each row, the k-th largest of the maxima of its groups: at least k entries reach it."""
    n = values_cn.shape[1]
    per_group = n // GROUP
    maxima_cm = values_cn[:, : GROUP * per_group].reshape(-1, GROUP, per_group).max(axis=1)
    bound_c: np.ndarray = np.partition(maxima_cm, per_group - k, axis=1)[:, per_group - k]
    return bound_c


def _sorted_rows(values_cn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of rows that are sorted as a whole: so few at a time that their keys stay small, whatever the number of threads that do so."""
    c, n = values_cn.shape
    rows, columns = max(1, KEY_BYTES // (8 * n)), np.arange(n)
    taken = [_take(_keys(values_cn[start : start + rows], columns), k) for start in range(0, max(1, c), rows)]
    values, found = (np.concatenate(part) for part in zip(*taken, strict=True))
    return values, found


def _keys(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Value and column in one int64 that sorts by value, then by falling column: sorting numbers needs no index."""
    bits = (values + np.float32(0)).view(np.int32)  # + 0 makes -0 the same as 0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys: np.ndarray = (ordered.astype(np.int64) << 32) | (0xFFFFFFFF - columns)
    return keys


def _take(keys_cL: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest keys of each row, largest first, as values and columns."""
    length = keys_cL.shape[1]
    if length > 4 * k:
        keys_cL = np.partition(keys_cL, length - k, axis=1)[:, length - k :]
    best_ck = np.sort(keys_cL, axis=1)[:, : -k - 1 : -1]
    columns = 0xFFFFFFFF - (best_ck & 0xFFFFFFFF)
    ordered = (best_ck >> 32).astype(np.int32)
    values: np.ndarray = (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    return values, columns


def nearest(
    bank_nD: Tensor,
    queries_qD: np.ndarray | Tensor,
    k: int,
    bank_groups_n: Tensor | None = None,
    query_groups_q: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, chunk by chunk of queries, the similarities [c, k] and rows [c, k] of the k nearest, nearest first.

    `bank_nD` has unit rows. Equal similarities are ordered by row, also at the k-th place, so results do not depend on
    how the search is cut. Database rows of the query's own group are passed over (similarity -inf).
    """
    for start, similarity_cn in similarity_chunks(bank_nD, queries_qD):
        if bank_groups_n is not None and query_groups_q is not None:
            own = query_groups_q[start : start + len(similarity_cn), None] == bank_groups_n[None, :]
            similarity_cn.masked_fill_(own, -torch.inf)
        yield top_rows(similarity_cn, k)
