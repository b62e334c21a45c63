"""A few curated images and a heap in, more of the same kind from the heap out (Oquab et al. 2023, section 3 and appendix A).

`sample`: the k nearest images of each query (LVD-142M: 4 for query sets of over a million images, 32 for ImageNet-1k). `cluster`: k-means
of the heap; from every cluster that more than 3 queries fall into, up to 10,000 images; for query sets too small to sample from.

Legend: n images of the heap that can be decoded, q queries.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from curation.command import CurationOptions, close, opened
from curation.decisions import Decision
from curation.filters import FilterSpec
from curation.folder import Folder, Stage
from curation.images import look_over
from curation.kmeans import nearest_centroids, spherical_kmeans
from curation.near import search
from curation.neighbours import SearchSpec, pairs_above
from curation.report import Example, Picture, histogram_of
from curation.workers import Workers
from data.datasets import Dataset, open_dataset
from data.errors import InputError, run_cli

EXAMPLES, PICTURES = 24, 12
_NO_QUERY = np.iinfo(np.int64).max
_NOT_RETRIEVED = Decision("dropped", "retrieval", "like no query")


@dataclass(frozen=True, kw_only=True)
class RetrieveSpec:
    """What is taken from the heap."""

    by: Literal["sample", "cluster"] = "sample"
    """Nearest neighbours of each query, or clusters that hold queries."""
    k: int = 4
    """Images a query, for `sample` (LVD-142M: 4, and 32 for ImageNet-1k)."""
    clusters: int | None = None
    """Clusters of the heap, for `cluster` (LVD-142M: 100,000 of 744 million images). Left out: one for 100 images, at most 100,000."""
    min_queries: int = 3
    """A cluster counts with more queries than this."""
    per_cluster: int = 10_000
    """Most images from one cluster, drawn at random."""
    cap: int = 1_000_000
    """Most images in all; the nearest stay (`sample`), or a random part (`cluster`)."""
    min_cosine: float = -1.0
    """Images further from their query are not taken, for `sample`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.k, self.per_cluster, self.cap, 1 if self.clusters is None else self.clusters) < 1
            or self.min_queries < 0
        ):
            raise InputError(
                f"k {self.k}, clusters {self.clusters}, per cluster {self.per_cluster}, cap {self.cap}, min queries {self.min_queries}: "
                "wanted at least 1 of each, and no fewer than 0 queries"
            )


@dataclass(frozen=True)
class Retrieved:
    """What was taken: rows of the heap, ascending; the query that speaks for each, and its cosine."""

    rows: np.ndarray
    queries: np.ndarray
    cosines: np.ndarray
    reason: str


def by_sample(files: Sequence[Path], n: int, spec: RetrieveSpec) -> Retrieved:
    """The nearest neighbours of each query; an image near several is taken once, for the nearest."""
    best_n, query_n = np.full(n, -np.inf, np.float32), np.full(n, _NO_QUERY)
    for pairs_E2, cosines_E in pairs_above(files, -np.inf, of_one_set=False):
        np.maximum.at(best_n, pairs_E2[:, 1], cosines_E)
    for pairs_E2, cosines_E in pairs_above(files, -np.inf, of_one_set=False):
        nearest = cosines_E == best_n[pairs_E2[:, 1]]
        np.minimum.at(query_n, pairs_E2[nearest, 1], pairs_E2[nearest, 0])
    rows = np.flatnonzero(query_n < _NO_QUERY)
    if len(rows) > spec.cap:
        rows = np.sort(rows[np.lexsort((rows, -best_n[rows]))[: spec.cap]])
    return Retrieved(rows, query_n[rows], best_n[rows], f"among the {spec.k} nearest of a query")


def by_cluster(heap_nD: np.ndarray, queries_qD: np.ndarray, spec: RetrieveSpec) -> Retrieved:
    """Images of the clusters that hold more than `min_queries` queries; each is named with the first query of its cluster."""
    n = len(heap_nD)
    n_clusters = min(spec.clusters or max(1, min(n // 100, 100_000)), n)
    clusters = spherical_kmeans(heap_nD, n_clusters, spec.seed)
    of_q = nearest_centroids(queries_qD, clusters.centroids_KD)
    held_K = np.bincount(of_q, minlength=n_clusters)
    rng = np.random.default_rng(spec.seed)
    order = np.argsort(clusters.of_n, kind="stable")
    starts = np.concatenate([[0], np.cumsum(clusters.sizes_K)])
    taken = [np.empty(0, np.int64)]
    for cluster in np.flatnonzero(held_K > spec.min_queries):
        members = order[starts[cluster] : starts[cluster + 1]]
        taken.append(rng.choice(members, min(len(members), spec.per_cluster), replace=False))
    rows = np.concatenate(taken)
    rows = np.sort(rows if len(rows) <= spec.cap else rng.choice(rows, spec.cap, replace=False))
    first_K = np.full(n_clusters, -1)
    first_K[of_q[::-1]] = np.arange(len(of_q))[::-1]
    queries = first_K[clusters.of_n[rows]]
    cosines = np.einsum("rd,rd->r", heap_nD[rows], queries_qD[queries])
    return Retrieved(rows, queries, cosines, f"in a cluster with more than {spec.min_queries} queries")


def retrieve(
    dataset: Dataset,
    queries: Dataset,
    options: CurationOptions,
    spec: RetrieveSpec,
    filters: FilterSpec,
    searching: SearchSpec,
) -> list[Decision]:
    """Take from `dataset` what is like `queries`; returns what became of each image. Raises InputError, CheckFailed."""
    folder, workers, embedding = opened(options)
    looks = look_over(dataset, filters, folder, workers)
    asked = look_over(queries, FilterSpec(min_side_px=1, max_aspect=float("inf"), min_deviation=0.0), folder, workers)
    rows, asked_rows = np.flatnonzero(looks.kept_n), np.flatnonzero(asked.kept_n)
    heap, wanted = embedding(dataset, rows.tolist()), embedding(queries, asked_rows.tolist())
    found = _found(heap, wanted, spec, searching, folder, workers)
    decisions = [Decision("dropped", "filter", reason) if reason else _NOT_RETRIEVED for reason in looks.reasons]
    query_names = [queries.items[row].name for row in asked_rows]
    for place, query, cosine in zip(found.rows, found.queries, found.cosines, strict=True):
        decisions[rows[place]] = Decision("kept", "retrieval", found.reason, query_names[query], float(cosine))
    settings = asdict(spec) | asdict(filters) | {"ckpt": options.ckpt, "data": options.data, "queries": queries.name}
    histogram = histogram_of(
        "Cosine of what was taken to its query", found.cosines, found.cosines.min(initial=0.9), 1.0
    )
    close(
        options,
        dataset,
        decisions,
        "Retrieved from the heap",
        settings,
        [histogram],
        examples_of(dataset, queries, decisions),
    )
    return decisions


def _found(
    heap: Stage, wanted: Stage, spec: RetrieveSpec, searching: SearchSpec, folder: Folder, workers: Workers
) -> Retrieved:
    heap_file = heap.path / "features.npy"
    heap_nD = np.load(heap_file, mmap_mode="r")
    if spec.by == "sample":
        files = search("neighbours of queries", wanted, heap, spec.k, spec.min_cosine, searching, folder, workers)
        return by_sample(files, len(heap_nD), spec)
    stage = folder.stage("clusters", heap=heap.key, queries=wanted.key, spec=asdict(spec))
    if not stage.done:
        found = by_cluster(heap_nD, np.load(wanted.path / "features.npy", mmap_mode="r"), spec)
        stage.save(
            "found", rows=found.rows, queries=found.queries, cosines=found.cosines, reason=np.array(found.reason)
        )
        stage.finish()
    saved = stage.load("found")
    return Retrieved(saved["rows"], saved["queries"], saved["cosines"], str(saved["reason"]))


def examples_of(dataset: Dataset, queries: Dataset, decisions: Sequence[Decision]) -> dict[str, list[Example]]:
    """Queries, evenly spaced, with what was taken for them, nearest first."""
    rows_of: dict[str, list[int]] = {}
    for row, one in enumerate(decisions):
        if one.decision == "kept":
            rows_of.setdefault(one.of, []).append(row)
    query_row = {item.name: row for row, item in enumerate(queries.items)}
    names = sorted(rows_of, key=lambda name: query_row[name])
    examples = []
    for name in names[:: max(1, len(names) // EXAMPLES)][:EXAMPLES]:
        rows = sorted(rows_of[name], key=lambda row: -(decisions[row].score or 0.0))
        shown = [Picture(queries, query_row[name], f"query: {name}", kept=True)]
        shown += [
            Picture(dataset, row, f"{decisions[row].score:.3f}: {dataset.items[row].name}") for row in rows[:PICTURES]
        ]
        examples.append(Example(f"{len(rows)} taken for {name}", shown))
    return {"Queries (green) and what was taken for them": examples}


def main(
    options: Annotated[CurationOptions, tyro.conf.arg(name="")],
    spec: Annotated[RetrieveSpec, tyro.conf.arg(name="")],
    filters: Annotated[FilterSpec, tyro.conf.arg(name="")],
    searching: Annotated[SearchSpec, tyro.conf.arg(name="")],
    queries: str,
    query_split: str | None = None,
) -> None:
    """Retrieve from a heap of images those that are like a small curated set.

    Run the same command again to go on after an interruption.

    Args:
        options: What is curated.
        spec: What is taken.
        filters: What is dropped first.
        searching: How neighbours are searched.
        queries: The curated images: any data set, or several joined by commas.
        query_split: Use only their rows of this split, such as train.
    """
    retrieve(
        open_dataset(options.data, options.split), open_dataset(queries, query_split), options, spec, filters, searching
    )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m curation.retrieve"))
