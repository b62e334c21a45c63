"""Unit-length features in, clusters out: spherical k-means, and a hierarchy of it for balanced sampling.

Legend: n images, K clusters, D feature size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from data.errors import InputError

_ASSIGN_ROWS = 65_536
_TRAIN_PER_CLUSTER = 256
_FEW, _TRIES = 1000, 5
"""So few clusters are placed several times from other starts, and the best placing is taken; it costs little and matters there."""


@dataclass(frozen=True)
class Clusters:
    """Centroids, unit rows float32 [K, D], and the cluster of each image, int64 [n]."""

    centroids_KD: np.ndarray
    of_n: np.ndarray

    @property
    def sizes_K(self) -> np.ndarray:
        """Images of each cluster."""
        return np.bincount(self.of_n, minlength=len(self.centroids_KD))


def spherical_kmeans(features_nD: np.ndarray, n_clusters: int, seed: int, iterations: int = 20) -> Clusters:
    """k-means by cosine on unit rows; at most 256 images a cluster, evenly drawn, place the centroids. Raises InputError."""
    n, width = features_nD.shape
    if not 1 <= n_clusters <= n:
        raise InputError(f"{n_clusters} clusters of {n} images: wanted at least 1 and no more than images")
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(n, min(n, _TRAIN_PER_CLUSTER * n_clusters), replace=False))
    trainer: Any = faiss.Kmeans(
        width,
        n_clusters,
        niter=iterations,
        nredo=_TRIES if n_clusters <= _FEW else 1,
        seed=seed % 2**31 + 1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAIN_PER_CLUSTER,
    )
    trainer.train(np.ascontiguousarray(features_nD[sample]))
    return Clusters(trainer.centroids, nearest_centroids(features_nD, trainer.centroids))


def nearest_centroids(features_nD: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """The cluster of each image, int64 [n]; memory is that of a block of images."""
    index = faiss.IndexFlatIP(centroids_KD.shape[1])
    index.add(centroids_KD)
    of_n = np.empty(len(features_nD), np.int64)
    for start in range(0, len(features_nD), _ASSIGN_ROWS):
        block = np.ascontiguousarray(features_nD[start : start + _ASSIGN_ROWS])
        of_n[start : start + len(block)] = index.search(block, 1)[1][:, 0]
    return of_n


def hierarchical_kmeans(
    features_nD: np.ndarray, levels: Sequence[int], seed: int, resamplings: int, per_cluster: int
) -> list[Clusters]:
    """Clusters, clusters of their centroids, and so on (Vo et al. 2024, "Automatic data curation for self-supervised learning").

    `levels` are the numbers of clusters from the images up. Plain k-means spends its clusters where images are dense; each level therefore
    places its centroids anew `resamplings` times on the `per_cluster` points nearest to each, which spreads them over the space that the
    images cover. Element l has `of_n` over the points of level l: images, or the centroids of the level below.
    """
    found: list[Clusters] = []
    points_nD = features_nD
    for number, n_clusters in enumerate(levels):
        clusters = spherical_kmeans(points_nD, n_clusters, seed + 1000 * number)
        for turn in range(resamplings):
            rows = nearest_members(points_nD, clusters, per_cluster)
            if len(rows) < n_clusters:
                break
            placed = spherical_kmeans(
                np.ascontiguousarray(points_nD[rows]), n_clusters, seed + 1000 * number + turn + 1
            )
            clusters = Clusters(placed.centroids_KD, nearest_centroids(points_nD, placed.centroids_KD))
        found.append(clusters)
        points_nD = clusters.centroids_KD
    return found


def nearest_members(points_nD: np.ndarray, clusters: Clusters, per_cluster: int) -> np.ndarray:
    """Rows of the `per_cluster` points nearest to each centroid within its cluster, ascending."""
    closeness_n = closeness(points_nD, clusters)
    order = np.lexsort((np.arange(len(points_nD)), -closeness_n, clusters.of_n))
    starts = np.concatenate([[0], np.cumsum(clusters.sizes_K)[:-1]])
    rank = np.arange(len(order)) - starts[clusters.of_n[order]]
    return np.sort(order[rank < per_cluster])


def closeness(points_nD: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Cosine of each point to its centroid, float32 [n], a block at a time."""
    found = np.empty(len(points_nD), np.float32)
    for start in range(0, len(points_nD), _ASSIGN_ROWS):
        stop = start + _ASSIGN_ROWS
        block = points_nD[start:stop]
        found[start:stop] = np.einsum("nd,nd->n", block, clusters.centroids_KD[clusters.of_n[start:stop]])
    return found
