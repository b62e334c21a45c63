"""Pairs of near-duplicates in, groups out: connected components, and which image of each stays.

Legend: n images, E edges.
"""

from collections.abc import Iterable

import numpy as np


class DisjointSets:
    """Union-find over 0 .. n - 1 on whole arrays; the root of a set is its smallest member, whatever the order of unions."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n, dtype=np.int64)

    def _roots(self, members: np.ndarray) -> np.ndarray:
        roots = members
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[members] = roots  # the way is short next time
        return roots

    def join(self, edges_E2: np.ndarray) -> None:
        """Put both ends of every edge into one set; edges int [E, 2]."""
        while len(edges_E2):
            a, b = self._roots(edges_E2[:, 0]), self._roots(edges_E2[:, 1])
            apart = a != b
            # Only roots are hung up, and only below smaller ones, so no circle can arise.
            np.minimum.at(self._parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
            edges_E2 = edges_E2[apart]

    def labels(self) -> np.ndarray:
        """The smallest member of each image's set, int64 [n]."""
        return self._roots(np.arange(len(self._parent)))


def connected_components(n: int, edges: Iterable[np.ndarray]) -> np.ndarray:
    """Component of each of n images, named by its smallest member, int64 [n]; `edges` are int arrays [E, 2], one after another.

    Memory is 8 bytes an image, however many edges there are.
    """
    sets = DisjointSets(n)
    for edges_E2 in edges:
        sets.join(edges_E2)
    return sets.labels()


def representatives(components_n: np.ndarray, quality_n: np.ndarray) -> np.ndarray:
    """The image of each image's component with the highest quality, the first among equals, int64 [n]."""
    order = np.lexsort((np.arange(len(quality_n)), -quality_n.astype(np.float64), components_n))
    first = np.ones(len(order), dtype=bool)
    first[1:] = components_n[order][1:] != components_n[order][:-1]
    best = np.empty(len(order), dtype=np.int64)
    group = np.cumsum(first) - 1
    best[order] = order[first][group]
    return best
