"""A set with too much of some things in, one in which every kind has its share out: hierarchical k-means and balanced sampling.

After Vo et al. 2024 ("Automatic data curation for self-supervised learning: a clustering-based approach"). Read in this order:
BalanceSpec, shares, balanced_sample, balance. Legend: n images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import tyro

from curation.command import CurationOptions, close, opened
from curation.decisions import Decision
from curation.filters import FilterSpec
from curation.images import look_over
from curation.kmeans import Clusters, closeness, hierarchical_kmeans
from curation.report import Example, Histogram, Picture
from data.datasets import Dataset, open_dataset
from data.errors import InputError, run_cli

EXAMPLES, PICTURES = 24, 12


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """How images are grouped and drawn."""

    keep: int
    """Images to keep."""
    levels: tuple[int, ...] | None = None
    """Clusters of each level, from the images up (Vo et al.: 10 million, 500,000, 50,000, 10,000). Left out: one for 20 images, then one
    for 10 clusters, while there are more than 20."""
    resamplings: int = 10
    """How often each level places its centroids anew on the points nearest to them."""
    per_cluster: int = 5
    """Points of each cluster that they are placed on."""
    draw: Literal["random", "nearest"] = "random"
    """Which images of a lowest cluster are kept: drawn at random, or those nearest to its centre."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.resamplings < 0 or self.per_cluster < 1:
            raise InputError(
                f"--keep {self.keep} --resamplings {self.resamplings} --per-cluster {self.per_cluster}: wanted at least 1, 0 and 1"
            )
        if self.levels is not None and (
            min(self.levels, default=0) < 1 or list(self.levels) != sorted(self.levels, reverse=True)
        ):
            raise InputError(f"--levels {' '.join(map(str, self.levels))}: wanted falling numbers of at least 1")

    def levels_for(self, n: int) -> list[int]:
        """Clusters of each level for n images."""
        if self.levels is not None:
            return [min(level, n) for level in self.levels]
        levels = [max(1, n // 20)]
        while levels[-1] > 20:
            levels.append(levels[-1] // 10)
        return levels


def shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """Divide `total` among groups as evenly as their sizes allow, int64, the sum being the smaller of `total` and all there is.

    Every group gets the same number, or all it has where that is less; what cannot be divided goes to the first that have more.
    """
    total = min(total, int(sizes.sum()))
    given = np.zeros(len(sizes), np.int64)
    while (left := total - int(given.sum())) > 0:
        open_groups = np.flatnonzero(given < sizes)
        each = left // len(open_groups)
        if each == 0:
            given[open_groups[:left]] += 1
            break
        given[open_groups] = np.minimum(given[open_groups] + each, sizes[open_groups])
    return given


def balanced_sample(levels: Sequence[Clusters], closeness_n: np.ndarray, spec: BalanceSpec) -> np.ndarray:
    """Rows to keep, ascending: `keep` is divided evenly among the top clusters, in each among its own, down to the images."""
    sizes = [level.sizes_K for level in levels[:1]]
    for level in levels[1:]:
        sizes.append(np.bincount(level.of_n, weights=sizes[-1], minlength=len(level.centroids_KD)).astype(np.int64))
    budgets = shares(sizes[-1], spec.keep)
    for number in range(len(levels) - 1, 0, -1):
        below = np.zeros(len(sizes[number - 1]), np.int64)
        for cluster in np.flatnonzero(budgets):
            children = np.flatnonzero(levels[number].of_n == cluster)
            below[children] = shares(sizes[number - 1][children], int(budgets[cluster]))
        budgets = below
    rng = np.random.default_rng(spec.seed)
    of_n = levels[0].of_n
    preference_n = rng.random(len(of_n)) if spec.draw == "random" else -closeness_n
    order = np.lexsort((preference_n, of_n))
    starts = np.concatenate([[0], np.cumsum(sizes[0])[:-1]])
    rank = np.arange(len(order)) - starts[of_n[order]]
    return np.sort(order[rank < budgets[of_n[order]]])


def balance(dataset: Dataset, options: CurationOptions, spec: BalanceSpec, filters: FilterSpec) -> list[Decision]:
    """Keep `spec.keep` images of `dataset`; returns what became of each. Raises InputError, CheckFailed."""
    folder, workers, embedding = opened(options)
    looks = look_over(dataset, filters, folder, workers)
    rows = np.flatnonzero(looks.kept_n)
    if spec.keep > len(rows):
        raise InputError(f"--keep {spec.keep}: only {len(rows)} images pass the filters")
    features = embedding(dataset, rows.tolist())
    stage = folder.stage("balance", features=features.key, spec=asdict(spec))
    if not stage.done:
        features_nD = np.load(features.path / "features.npy", mmap_mode="r")
        levels = hierarchical_kmeans(
            features_nD, spec.levels_for(len(rows)), spec.seed, spec.resamplings, spec.per_cluster
        )
        near_n = closeness(features_nD, levels[0])
        stage.save(
            "found",
            kept=balanced_sample(levels, near_n, spec),
            cluster=levels[0].of_n,
            near=near_n,
            top=top_clusters(levels),
        )
        stage.finish({"levels": [len(level.centroids_KD) for level in levels]})
    found = stage.load("found")
    decisions = [
        Decision("dropped", "filter" if reason else "balance", reason or "its cluster has enough")
        for reason in looks.reasons
    ]
    for place in found["kept"]:
        decisions[rows[place]] = Decision(
            "kept", "balance", f"cluster {found['cluster'][place]}", "", float(found["near"][place])
        )
    settings = (
        asdict(spec)
        | asdict(filters)
        | {"levels": spec.levels_for(len(rows)), "ckpt": options.ckpt, "data": options.data}
    )
    histograms = _size_histograms(found["top"], found["kept"])
    close(
        options,
        dataset,
        decisions,
        "Balanced",
        settings,
        histograms,
        examples_of(dataset, rows, found["cluster"], set(found["kept"].tolist())),
    )
    return decisions


def top_clusters(levels: Sequence[Clusters]) -> np.ndarray:
    """The cluster of the highest level that each image belongs to, int64 [n]."""
    top_n = levels[0].of_n
    for level in levels[1:]:
        top_n = level.of_n[top_n]
    return top_n


def _size_histograms(top_n: np.ndarray, kept: np.ndarray) -> list[Histogram]:
    """Images of the highest clusters before and after, the largest first."""
    before = np.bincount(top_n)
    after = np.bincount(top_n[kept], minlength=len(before))
    order = np.argsort(-before, kind="stable")
    edges = [float(i) for i in range(len(order) + 1)]
    return [
        Histogram(f"Images of each highest cluster, {when}", edges, counts[order].tolist())
        for when, counts in (("before", before), ("after, in the same order", after))
    ]


def examples_of(dataset: Dataset, rows: np.ndarray, cluster_n: np.ndarray, kept: set[int]) -> dict[str, list[Example]]:
    """Lowest clusters, the largest first, with the images that stay in green."""
    sizes = np.bincount(cluster_n)
    examples = []
    for cluster in np.argsort(-sizes, kind="stable")[:EXAMPLES]:
        places = sorted(np.flatnonzero(cluster_n == cluster), key=lambda place: place not in kept)
        shown = [
            Picture(dataset, rows[place], dataset.items[rows[place]].name, int(place) in kept)
            for place in places[:PICTURES]
        ]
        examples.append(Example(f"{sum(int(place) in kept for place in places)} of {len(places)} kept", shown))
    return {"Clusters (green stays)": examples}


def main(
    options: Annotated[CurationOptions, tyro.conf.arg(name="")],
    spec: Annotated[BalanceSpec, tyro.conf.arg(name="")],
    filters: Annotated[FilterSpec, tyro.conf.arg(name="")],
) -> None:
    """Keep a given number of images so that every kind has its share.

    Run the same command again to go on after an interruption.

    Args:
        options: What is curated.
        spec: How it is balanced.
        filters: What is dropped first.
    """
    balance(open_dataset(options.data, options.split), options, spec, filters)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m curation.balance"))
