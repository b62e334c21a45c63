"""A collection in memory: unit vectors with ids and labels, searched exactly, or through a graph where there are very many.

`Rows` only grows; a `Snapshot` is the first n of its rows without those that were removed. So a write costs what it adds, a snapshot in
use never changes, and search and writes run side by side. Read in this order: Rows, Snapshot, build_graph.

Axes: N queries, n rows, D feature size, k neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import faiss
import numpy as np

from data.errors import InputError
from server.cores import usable_cores

_faiss: Any = faiss
"""Its type stubs do not know what its Python layer adds."""
DEFAULT_K = 5
EXACT_ROWS = 200_000
"""Up to here every cosine is computed: it is exact, and next to the network it costs little."""
GRAPH_LINKS, GRAPH_SEARCH, GRAPH_BUILD = 16, 128, 80
"""Links of a node of the graph, and candidates kept while it is searched and built (HNSW; Malkov & Yashunin 2018)."""
FEW = 20_000
"""Among so few rows with a label all cosines are computed, graph or not."""
_BLOCK_SCORES = 32 << 20
_NO_ROWS = 64
_GARBAGE = 0.25
"""Share of removed rows from which on a collection is copied without them."""


@dataclass(frozen=True)
class Found:
    """Nearest items, best first: ids and labels (None where there is none), lists of N rows of k, and cosines [N, k]."""

    ids: list[list[str]]
    labels: list[list[str | None]]
    scores: np.ndarray


class Rows:
    """Unit vectors with ids and labels, appended to by one writer at a time; what is there never changes."""

    def __init__(self, width: int) -> None:
        self.unit = np.zeros((_NO_ROWS, width), np.float32)
        self.codes = np.zeros(_NO_ROWS, np.int32)
        self.ids: list[str] = []
        self.names: list[str | None] = []
        """Labels by code."""
        self._code_of: dict[str | None, int] = {}
        self.place: dict[str, int] = {}
        """Last row of each id."""

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Add items (`id`, `label`, `vector` as float32 bytes)."""
        vectors = np.frombuffer(b"".join(item["vector"] for item in items), "<f4").reshape(len(items), -1)
        first, end = len(self.ids), len(self.ids) + len(items)
        if end > len(self.unit):
            self._grow(end)
        self.unit[first:end] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        for number, item in enumerate(items, start=first):
            code = self._code_of.setdefault(item["label"], len(self.names))
            if code == len(self.names):
                self.names.append(item["label"])
            self.codes[number] = code
            self.place[item["id"]] = number
        self.ids.extend(item["id"] for item in items)

    def _grow(self, wanted: int) -> None:
        """Room for more: new arrays, so that snapshots keep theirs."""
        room = max(wanted + wanted // 8, 2 * len(self.unit))
        unit, codes = np.zeros((room, self.unit.shape[1]), np.float32), np.zeros(room, np.int32)
        unit[: len(self.ids)], codes[: len(self.ids)] = self.unit[: len(self.ids)], self.codes[: len(self.ids)]
        self.unit, self.codes = unit, codes

    def code(self, label: str) -> int:
        """The code of a label; -1 for one that no row has."""
        return self._code_of.get(label, -1)


@dataclass(frozen=True)
class Graph:
    """A graph over the first rows of some `Rows`."""

    index: Any
    rows: Rows
    n: int


@dataclass(frozen=True)
class Snapshot:
    """A collection at one moment. Never changed; safe to search from any number of threads."""

    name: str
    rows: Rows
    n: int
    """Rows that belong to it, the removed ones counted."""
    alive_n: np.ndarray
    """Which of them are still there, bool [n]."""
    incarnation: str = ""
    version: int = 0
    """What of the store it reflects; see `server.schema`."""
    graph: Graph | None = None
    unit_nD: np.ndarray = field(init=False, repr=False, compare=False)
    codes_n: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Views of this moment's arrays: `Rows` may move on to larger ones.
        object.__setattr__(self, "unit_nD", self.rows.unit[: self.n])
        object.__setattr__(self, "codes_n", self.rows.codes[: self.n])

    @staticmethod
    def empty(name: str, width: int) -> "Snapshot":
        """A collection without items."""
        return Snapshot(name, Rows(width), 0, np.ones(0, bool))

    def __len__(self) -> int:
        return int(self.alive_n.sum())

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in the order of adding."""
        return tuple(self.rows.ids[row] for row in np.flatnonzero(self.alive_n))

    def check_k(self, k: int | None, label: str | None = None) -> int:
        """How many neighbours a request gets. Raises InputError when the collection has too few (of that label)."""
        n = len(self) if label is None else int(self._of_label(label).sum())
        of = "" if label is None else f" labelled {label!r:.80}"
        if n == 0:
            raise InputError(
                f"collection {self.name!r} is empty; add items to it first"
                if label is None
                else f"collection {self.name!r} holds no items{of}"
            )
        if k is not None and not 1 <= k <= n:
            raise InputError(f"parameter 'k' is {k}, and collection {self.name!r} holds {n} items{of}; wanted 1 to {n}")
        return min(DEFAULT_K, n) if k is None else k

    def _of_label(self, label: str) -> np.ndarray:
        return self.alive_n & (self.codes_n == self.rows.code(label))

    def search(self, queries_ND: np.ndarray, k: int, label: str | None = None) -> Found:
        """The k nearest by cosine, equal ones in the order of adding; of that label only, where one is named.

        Exact, except that a graph of the first rows may miss some of theirs. Raises InputError for a zero query.
        """
        length = np.linalg.norm(queries_ND, axis=1, keepdims=True)
        without = ~np.isfinite(length[:, 0]) | (length[:, 0] == 0)
        if without.any():
            bad = int(np.argmax(without))
            raise InputError(f"embedding {bad} is zero or not finite, so it has no direction to compare")
        unit_ND = (queries_ND / length).astype(np.float32)
        wanted_n = self.alive_n if label is None else self._of_label(label)
        use_graph = self.graph is not None and self.graph.rows is self.rows and int(wanted_n.sum()) > FEW
        rows_Nk, scores_Nk = self._by_graph(unit_ND, k, wanted_n) if use_graph else self._exact(unit_ND, k, wanted_n, 0)
        labels = [[self.rows.names[self.codes_n[row]] for row in rows] for rows in rows_Nk]
        ids = [[self.rows.ids[row] for row in rows] for rows in rows_Nk]
        return Found(ids, labels, np.clip(scores_Nk, -1, 1))  # a cosine, whatever float32 rounds

    def _exact(self, unit_ND: np.ndarray, k: int, wanted_n: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N, k] and cosines [N, k] of the nearest wanted rows from `first` on; fewer than k where there are fewer."""
        places = first + np.flatnonzero(wanted_n[first:])
        k = min(k, len(places))
        everyone = len(places) == self.n - first
        stored_nD = self.unit_nD[first:] if everyone else self.unit_nD[places]
        rows, scores = [], []
        step = max(1, _BLOCK_SCORES // max(1, len(places)))
        for start in range(0, len(unit_ND), step):
            scores_Nn = unit_ND[start : start + step] @ stored_nD.T
            best = np.stack([_largest(one, k) for one in scores_Nn]) if k else np.zeros((len(scores_Nn), 0), int)
            rows.append(places[best])
            scores.append(np.take_along_axis(scores_Nn, best, 1))
        return np.concatenate(rows), np.concatenate(scores)

    def _by_graph(self, unit_ND: np.ndarray, k: int, wanted_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The graph's answer for its own rows, the exact one for those added since."""
        assert self.graph is not None
        selector = _faiss.IDSelectorBitmap(np.packbits(wanted_n[: self.graph.n], bitorder="little"))
        how = _faiss.SearchParametersHNSW(sel=selector, efSearch=max(GRAPH_SEARCH, 2 * k))
        scores, rows = self.graph.index.search(np.ascontiguousarray(unit_ND), k, params=how)
        since_rows, since_scores = self._exact(unit_ND, k, wanted_n, self.graph.n)
        scores = np.concatenate([np.where(rows < 0, -np.inf, scores), since_scores], axis=1)
        rows = np.concatenate([rows, since_rows], axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        if (rows < 0).any():  # a graph split by what was removed: rare, and every cosine is at hand
            return self._exact(unit_ND, k, wanted_n, 0)
        return rows, scores

    def changed(
        self, removed: Sequence[str], added: Sequence[Mapping[str, Any]], incarnation: str, version: int
    ) -> "Snapshot":
        """A new snapshot without some ids and with items after the others (`id`, `label`, `vector` as float32 bytes)."""
        alive_n = self.alive_n.copy()
        for item_id in removed:
            place = self.rows.place.get(item_id, self.n)
            if place < self.n:
                alive_n[place] = False
        rows = self.rows
        if (added and len(rows) != self.n) or alive_n.sum() < (1 - _GARBAGE) * self.n:
            rows, alive_n = self._copied(alive_n)
        if added:
            rows.append(added)
        alive_n = np.concatenate([alive_n, np.ones(len(added), bool)])
        graph = self.graph if rows is self.rows else None
        return Snapshot(self.name, rows, len(alive_n), alive_n, incarnation, version, graph)

    def _copied(self, alive_n: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Rows of its own, without the removed ones."""
        rows, places = Rows(self.unit_nD.shape[1]), np.flatnonzero(alive_n)
        for start in range(0, len(places), 10_000):
            rows.append(
                [
                    {
                        "id": self.rows.ids[i],
                        "label": self.rows.names[self.codes_n[i]],
                        "vector": self.unit_nD[i].tobytes(),
                    }
                    for i in places[start : start + 10_000]
                ]
            )
        return rows, np.ones(len(places), bool)

    @property
    def wants_graph(self) -> bool:
        """Whether a graph, or one of more rows, would pay."""
        covered = self.graph.n if self.graph is not None and self.graph.rows is self.rows else 0
        return self.n > EXACT_ROWS and self.n - covered > max(EXACT_ROWS // 10, covered // 10)

    def with_graph(self, graph: Graph) -> "Snapshot":
        """The same items, searched through a graph of its first rows; as it is where the graph is of other rows."""
        return replace(self, graph=graph) if graph.rows is self.rows and graph.n <= self.n else self


def build_graph(snapshot: Snapshot) -> Graph:
    """A graph over all rows of a snapshot: a copy of its present one with the rows since, or a new one. Takes a minute or more.

    On a quarter of the cores, as the network and its clients want them meanwhile. OpenMP keeps that for the calling thread alone.
    """
    _faiss.omp_set_num_threads(max(1, usable_cores() // 4))
    old = snapshot.graph
    if old is not None and old.rows is snapshot.rows:
        index, first = faiss.clone_index(old.index), old.n
    else:
        index, first = faiss.IndexHNSWFlat(snapshot.unit_nD.shape[1], GRAPH_LINKS, faiss.METRIC_INNER_PRODUCT), 0
        index.hnsw.efConstruction = GRAPH_BUILD
    for start in range(first, snapshot.n, 10_000):
        index.add(np.ascontiguousarray(snapshot.unit_nD[start : min(start + 10_000, snapshot.n)]))
    return Graph(index, snapshot.rows, snapshot.n)


def _largest(scores_n: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest, largest first, lowest position first among equals, also at the k-th place."""
    threshold = np.partition(scores_n, -k)[-k]
    candidates = np.flatnonzero(scores_n >= threshold)
    return candidates[np.argsort(-scores_n[candidates], kind="stable")[:k]]
