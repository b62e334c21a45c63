"""The search for near neighbours: exact where it says so, measured where it does not."""

from pathlib import Path

import numpy as np
import pytest

from curation.components import connected_components
from curation.neighbours import (
    SearchSpec,
    block_starts,
    build_index,
    exact_neighbours,
    lists_to_read,
    pairs_above,
    recall,
    search_block,
    unit_rows,
)
from data.errors import InputError
from tests.oracles.curation import components_of, edges_above


def heap(n: int, width: int = 32, copies: int = 0, seed: int = 0) -> np.ndarray:
    """Unit rows around some centres, `copies` of them near-duplicates of others."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(4, n // 50), width))
    rows = centres[rng.integers(0, len(centres), n)] + rng.normal(size=(n, width))
    for target, source in zip(rng.choice(n, copies, replace=False), rng.integers(0, n, copies), strict=True):
        rows[target] = rows[source] + 0.15 * rng.normal(size=width)
    return unit_rows(rows)


def files_of(
    features: np.ndarray, queries: np.ndarray, k: int, threshold: float, spec: SearchSpec, folder: Path
) -> list[Path]:
    index = build_index(features, spec)
    return [
        search_block(index, queries, start, k, threshold, folder / f"{start}.npz")
        for start in block_starts(len(queries))
    ]


def test_components_of_5000_images_are_those_of_brute_force(tmp_path: Path) -> None:
    features = heap(5000, copies=900)
    files = files_of(features, features, 65, 0.9, SearchSpec(), tmp_path)
    found = connected_components(len(features), (pairs for pairs, _ in pairs_above(files, 0.9, of_one_set=True)))
    assert len(set(found.tolist())) < 4900
    assert found.tolist() == components_of(len(features), edges_above(features, 64, 0.9))


def test_retrieval_on_the_flat_index_is_exact_search() -> None:
    features, queries = heap(3000), heap(100, seed=5)
    cosines, rows = build_index(features, SearchSpec()).search(queries, 10)
    exact_cosines, exact_rows = exact_neighbours(queries, features, 10)
    assert np.array_equal(rows, exact_rows)
    assert np.allclose(cosines, exact_cosines, atol=1e-6)


def test_exact_search_over_blocks_is_exact_search_over_all() -> None:
    features, queries = heap(70_000, width=8), heap(20, width=8, seed=1)
    whole = np.argsort(-(queries @ features.T), axis=1, kind="stable")[:, :5]
    assert np.array_equal(exact_neighbours(queries, features, 5)[1], whole)


def test_lists_are_read_until_the_wanted_recall_is_reached() -> None:
    features, queries = heap(8_000), heap(200, seed=5)
    for wanted in (0.8, 0.97, 1.0):
        spec = SearchSpec(flat_below=1000, min_recall=wanted)
        index = build_index(features, spec)
        index.nprobe = lists_to_read(index, features, queries[:100], spec, 10)
        assert index.nlist > index.nprobe or wanted == 1.0
        found = recall(index.search(queries, 10)[1], exact_neighbours(queries, features, 10)[1])
        assert found > wanted - 0.08


def test_a_block_that_is_there_is_not_searched_again(tmp_path: Path) -> None:
    features = heap(300)
    index = build_index(features, SearchSpec())
    first = search_block(index, features, 0, 5, 0.5, tmp_path / "a.npz")
    written = first.stat().st_mtime_ns
    search_block(None, features, 0, 5, 0.5, tmp_path / "a.npz")
    assert first.stat().st_mtime_ns == written


def test_only_pairs_above_the_threshold_are_kept_and_none_of_an_image_with_itself(tmp_path: Path) -> None:
    features = heap(400, copies=80)
    files = files_of(features, features, 9, 0.5, SearchSpec(), tmp_path)
    pairs, cosines = (np.concatenate(part) for part in zip(*pairs_above(files, 0.8, of_one_set=True), strict=True))
    assert len(pairs) > 20
    assert cosines.min() > 0.8
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert np.allclose((features[pairs[:, 0]] * features[pairs[:, 1]]).sum(axis=1), cosines, atol=1e-5)
    every = np.concatenate([pairs for pairs, _ in pairs_above(files, 0.5, of_one_set=False)])
    assert (every[:, 0] == every[:, 1]).sum() == len(features)


def test_a_row_of_zeros_is_near_nothing() -> None:
    rows = unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert rows.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]


@pytest.mark.parametrize("values", [{"min_recall": 0.0}, {"min_recall": 1.5}, {"flat_below": 0}])
def test_settings_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        SearchSpec(**values)  # type: ignore[arg-type]
