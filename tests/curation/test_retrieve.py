"""A few curated images and a heap in, more of the same kind out."""

from pathlib import Path

import numpy as np
import pytest

import curation.images
from curation.command import CurationOptions
from curation.filters import FilterSpec
from curation.neighbours import SearchSpec, build_index, exact_neighbours, search_block, unit_rows
from curation.retrieve import RetrieveSpec, by_cluster, by_sample, retrieve
from data.datasets import open_dataset
from data.errors import InputError
from tests.curation.images import PixelRuntime, make_heap, picture, save


def blobs(n_each: int, centres: int, seed: int = 0, spread: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(0)
    middle = unit_rows(rng.normal(size=(centres, 16)))
    noise = np.random.default_rng(seed).normal(size=(centres, n_each, 16))
    return unit_rows((middle[:, None] + spread * noise).reshape(-1, 16))


def test_the_k_nearest_of_each_query_are_taken_once_for_the_nearest_query(tmp_path: Path) -> None:
    heap, queries = blobs(40, 5), blobs(2, 5, seed=1)
    block = search_block(build_index(heap, SearchSpec()), queries, 0, 4, -1.0, tmp_path / "a.npz")
    found = by_sample([block], len(heap), RetrieveSpec(k=4))
    cosines, rows = exact_neighbours(queries, heap, 4)
    assert found.rows.tolist() == sorted(set(rows.flatten().tolist()))
    for row, query, cosine in zip(found.rows, found.queries, found.cosines, strict=True):
        claims = {q: c for q in range(len(queries)) for r, c in zip(rows[q], cosines[q], strict=True) if r == row}
        assert cosine == pytest.approx(max(claims.values()))
        assert claims[query] == pytest.approx(max(claims.values()))


def test_a_cap_keeps_the_nearest(tmp_path: Path) -> None:
    heap, queries = blobs(40, 5), blobs(2, 5, seed=1)
    block = search_block(build_index(heap, SearchSpec()), queries, 0, 9, -1.0, tmp_path / "a.npz")
    every = by_sample([block], len(heap), RetrieveSpec(k=9))
    capped = by_sample([block], len(heap), RetrieveSpec(k=9, cap=7))
    assert set(capped.rows) == set(every.rows[np.argsort(-every.cosines)[:7]])


def test_only_clusters_with_more_than_three_queries_give_images_and_no_more_than_allowed() -> None:
    heap = blobs(100, 6)
    queries = np.concatenate(
        [blobs(5, 6, seed=1)[:5], blobs(3, 6, seed=2)[3:6]]
    )  # five near centre 0, three near centre 1
    found = by_cluster(heap, queries, RetrieveSpec(by="cluster", clusters=6, per_cluster=1000))
    assert found.rows.tolist() == list(range(100))
    assert set(found.queries) == {0}
    some = by_cluster(heap, queries, RetrieveSpec(by="cluster", clusters=6, per_cluster=30))
    assert len(some.rows) == 30
    assert set(some.rows) <= set(range(100))
    assert len(by_cluster(heap, queries, RetrieveSpec(by="cluster", clusters=6, cap=12)).rows) == 12
    assert len(by_cluster(heap, queries, RetrieveSpec(by="cluster", clusters=6, min_queries=2)).rows) == 200


@pytest.mark.parametrize("by", ["sample", "cluster"])
def test_end_to_end_it_finds_the_altered_copies_of_the_queries(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.images, "open_runtime", lambda *_, **__: PixelRuntime())
    heap = make_heap(tmp_path / "heap")
    for seed in range(1, 4):
        save(tmp_path / "queries" / f"q{seed}.png", picture(seed))
    options = CurationOptions(ckpt="pixels", data=str(heap), out=tmp_path / "out")
    spec = RetrieveSpec(by=by, k=2, clusters=24, min_queries=0)  # type: ignore[arg-type]
    filters, searching = FilterSpec(), SearchSpec()
    found = retrieve(open_dataset(heap), open_dataset(tmp_path / "queries"), options, spec, filters, searching)
    by_name = {item.name: one for item, one in zip(open_dataset(heap).items, found, strict=True)}
    for seed, kind in ((1, "resize"), (2, "recompress"), (3, "flip")):
        assert by == "cluster" or by_name[f"copy_{kind}.png"].decision == "kept"
        assert by_name[f"o{seed:03d}.png"].of == f"q{seed}.png"
    assert by_name["o012.png"].decision == "dropped"
    assert by_name["x_flat.png"].stage == "filter"
    assert len(open_dataset(tmp_path / "out" / "kept.csv")) == sum(one.decision == "kept" for one in found)


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="wanted at least 1 of each"):
        RetrieveSpec(k=0)
