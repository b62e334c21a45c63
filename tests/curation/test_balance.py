"""Hierarchical k-means and the even division among its clusters."""

from pathlib import Path

import numpy as np
import pytest

import curation.images
from curation.balance import BalanceSpec, balance, balanced_sample, shares, top_clusters
from curation.command import CurationOptions
from curation.filters import FilterSpec
from curation.kmeans import closeness, hierarchical_kmeans, nearest_centroids, spherical_kmeans
from curation.neighbours import unit_rows
from data.datasets import open_dataset
from data.errors import InputError
from tests.curation.images import PixelRuntime, make_heap
from tests.oracles.curation import shares_of


def lopsided(sizes: tuple[int, ...] = (600, 60, 20), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around as many centres as there are sizes, and the centre of each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), 12))
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    return unit_rows(centres[kinds] + 0.1 * rng.normal(size=(len(kinds), 12))), kinds


@pytest.mark.parametrize("total", [0, 1, 5, 17, 40, 1000])
def test_a_total_is_divided_as_if_items_went_to_the_poorest_group_one_by_one(total: int) -> None:
    for sizes in ([3, 10, 0, 7, 1], [5, 5, 5], [100], [1, 1, 1, 90]):
        assert shares(np.array(sizes), total).tolist() == shares_of(sizes, total)


def test_k_means_finds_separate_groups_and_assigns_by_cosine() -> None:
    features, kinds = lopsided((50, 50, 50))
    clusters = spherical_kmeans(features, 3, seed=0)
    assert len({(kind, cluster) for kind, cluster in zip(kinds, clusters.of_n, strict=True)}) == 3
    assert np.array_equal(clusters.of_n, (features @ clusters.centroids_KD.T).argmax(axis=1))
    assert np.array_equal(nearest_centroids(features, clusters.centroids_KD), clusters.of_n)
    assert np.allclose(closeness(features, clusters), (features @ clusters.centroids_KD.T).max(axis=1), atol=1e-5)


def test_resampling_spends_fewer_clusters_on_the_crowd() -> None:
    features, kinds = lopsided((2000, 60, 60))
    plain = hierarchical_kmeans(features, [30], seed=0, resamplings=0, per_cluster=5)[0]
    spread = hierarchical_kmeans(features, [30], seed=0, resamplings=10, per_cluster=5)[0]
    crowded = [len(set(level.of_n[kinds == 0])) for level in (plain, spread)]
    assert crowded[1] <= crowded[0]


def test_every_kind_gets_its_share_as_far_as_it_has_images() -> None:
    features, kinds = lopsided((600, 60, 20))
    levels = hierarchical_kmeans(features, [30, 3], seed=0, resamplings=2, per_cluster=5)
    kept = balanced_sample(levels, closeness(features, levels[0]), BalanceSpec(keep=120))
    assert np.bincount(kinds[kept]).tolist() == [50, 50, 20]
    assert len(set(kept.tolist())) == 120
    assert [len(set(kinds[top_clusters(levels) == cluster])) for cluster in range(3)] == [1, 1, 1]


def test_the_nearest_of_a_cluster_can_be_kept_instead_of_random_ones() -> None:
    features, _ = lopsided((100,))
    levels = hierarchical_kmeans(features, [1], seed=0, resamplings=0, per_cluster=5)
    near = closeness(features, levels[0])
    kept = balanced_sample(levels, near, BalanceSpec(keep=10, draw="nearest"))
    assert set(kept) == set(np.argsort(-near)[:10])


def test_end_to_end_it_keeps_the_number_asked_for_and_records_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.images, "open_runtime", lambda *_, **__: PixelRuntime())
    heap = open_dataset(make_heap(tmp_path / "heap"))
    options = CurationOptions(ckpt="pixels", data=str(tmp_path / "heap"), out=tmp_path / "out")
    first = balance(heap, options, BalanceSpec(keep=12, levels=(8, 2)), FilterSpec())
    assert sum(one.decision == "kept" for one in first) == 12
    assert {one.stage for one in first} == {"filter", "balance"}
    assert balance(heap, options, BalanceSpec(keep=12, levels=(8, 2)), FilterSpec()) == first
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(InputError, match="only 30 images pass"):
        balance(heap, options, BalanceSpec(keep=31), FilterSpec())


@pytest.mark.parametrize("values", [{"keep": 0}, {"keep": 5, "levels": (2, 8)}, {"keep": 5, "per_cluster": 0}])
def test_settings_that_make_no_sense_are_refused(values: dict) -> None:
    with pytest.raises(InputError):
        BalanceSpec(**values)
