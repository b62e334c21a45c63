"""Slow, obvious versions of what curation computes."""

import itertools

import numpy as np


def components_of(n: int, edges: list[tuple[int, int]]) -> list[int]:
    """The smallest member of each node's component, by walking from every node."""
    beside: list[set[int]] = [set() for _ in range(n)]
    for a, b in edges:
        beside[a].add(b)
        beside[b].add(a)
    smallest = [-1] * n
    for start in range(n):
        if smallest[start] >= 0:
            continue
        to_visit = [start]
        while to_visit:
            node = to_visit.pop()
            if smallest[node] < 0:
                smallest[node] = start
                to_visit.extend(beside[node])
    return smallest


def edges_above(features_nD: np.ndarray, k: int, threshold: float) -> list[tuple[int, int]]:
    """Every image with each of its k nearest others whose cosine is above the threshold, from all cosines."""
    cosines = features_nD @ features_nD.T
    np.fill_diagonal(cosines, -np.inf)
    edges = []
    for i, row in enumerate(cosines):
        for j in np.argsort(-row, kind="stable")[:k]:
            if row[j] > threshold:
                edges.append((i, int(j)))
    return edges


def hash_pairs(hashes: list[int], most: int) -> set[tuple[int, int]]:
    """All pairs of hashes at most `most` bits apart."""
    return {
        (i, j) for i, j in itertools.combinations(range(len(hashes)), 2) if (hashes[i] ^ hashes[j]).bit_count() <= most
    }


def shares_of(sizes: list[int], total: int) -> list[int]:
    """One item at a time to the group that has received least and still has some, the first among equals."""
    given = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        open_groups = [i for i, size in enumerate(sizes) if given[i] < size]
        given[min(open_groups, key=lambda i: given[i])] += 1
    return given
