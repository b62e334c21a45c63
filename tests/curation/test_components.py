"""Pairs to groups, and who stays of each."""

import numpy as np
import pytest

from curation.components import DisjointSets, connected_components, representatives
from tests.oracles.curation import components_of


@pytest.mark.parametrize(("n", "n_edges"), [(1, 0), (10, 0), (10, 4), (200, 90), (200, 300), (2000, 1500)])
def test_components_are_those_of_a_walk_over_the_graph(n: int, n_edges: int) -> None:
    rng = np.random.default_rng(n + n_edges)
    edges = rng.integers(0, n, (n_edges, 2))
    blocks = np.array_split(edges, 7)
    assert connected_components(n, blocks).tolist() == components_of(n, [tuple(edge) for edge in edges.tolist()])


def test_a_long_chain_given_backwards_is_one_component() -> None:
    n = 5000
    chain = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)[::-1]
    assert connected_components(n, [chain]).max() == 0


def test_the_order_of_unions_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    edges = rng.integers(0, 500, (400, 2))
    first, second = DisjointSets(500), DisjointSets(500)
    first.join(edges)
    for edge in rng.permutation(edges):
        second.join(edge[None])
    assert np.array_equal(first.labels(), second.labels())


def test_the_best_image_of_a_component_stays_and_the_first_among_equals() -> None:
    components = np.array([0, 0, 2, 0, 2, 5])
    quality = np.array([10, 30, 7, 30, 7, 1])
    assert representatives(components, quality).tolist() == [1, 1, 2, 1, 2, 5]
