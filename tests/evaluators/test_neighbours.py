"""The search behind k-NN, retrieval and copies: exact whatever the prefilter skips, ordered by row among equals."""

import numpy as np
import pytest
import torch

from evaluators import neighbours
from evaluators.neighbours import nearest, similarity_chunks, top_rows, unit_rows


def by_sorting(similarity_cn: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The slow, obvious answer: every row sorted, lowest column first among equals."""
    rows = np.argsort(-similarity_cn, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity_cn, rows, axis=1), rows


def case(name: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, n)).astype(np.float32)
    if name == "ties":
        values = rng.integers(-2, 3, (7, n)).astype(np.float32)
    elif name == "one class side by side":
        values[:, 1000:1100] += 5
    elif name == "all equal":
        values[:] = 0.25
    elif name == "masked":
        values[:, rng.random(n) < 0.995] = -np.inf
    elif name == "zeros of both signs":
        values[:, ::2], values[:, 1::2] = 0.0, -0.0
    return values


@pytest.mark.parametrize("n", [1, 50, 4096, 9001])
@pytest.mark.parametrize("k", [1, 20, 60])
@pytest.mark.parametrize(
    "name", ["plain", "ties", "one class side by side", "all equal", "masked", "zeros of both signs"]
)
def test_the_prefilter_gives_what_sorting_gives(name: str, n: int, k: int) -> None:
    values = case(name, n)
    found, rows = top_rows(torch.from_numpy(values.copy()), k)
    wanted, wanted_rows = by_sorting(values, k)
    np.testing.assert_array_equal(rows.numpy(), wanted_rows)
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("name", ["plain", "all equal"])
def test_rows_that_are_sorted_as_a_whole_are_taken_some_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "KEY_BYTES", 2 * 8 * 9001)
    sizes: list[int] = []
    keys = neighbours._keys
    monkeypatch.setattr(neighbours, "_keys", lambda values, columns: sizes.append(values.size) or keys(values, columns))
    values, k = case(name, 9001), 9001 if name == "plain" else 20
    found, rows = top_rows(torch.from_numpy(values), k)
    np.testing.assert_array_equal(rows.numpy(), by_sorting(values, k)[1])
    np.testing.assert_array_equal(found.numpy(), by_sorting(values, k)[0])
    assert max(sizes) <= 2 * 9001


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_are_searched_in_parts_keep_their_order_whatever_the_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    values = np.random.default_rng(1).normal(size=(5 * neighbours.PART_ROWS + 3, 3000)).astype(np.float32)
    found, rows = top_rows(torch.from_numpy(values), 20)
    np.testing.assert_array_equal(rows.numpy(), by_sorting(values, 20)[1])
    np.testing.assert_array_equal(found.numpy(), by_sorting(values, 20)[0])


def test_what_fails_in_a_part_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        neighbours.in_parts(lambda part: 1 // part.start, 4, 2)


def test_only_few_entries_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_lengths: list[int] = []
    take = neighbours._take
    monkeypatch.setattr(neighbours, "_take", lambda keys, k: sorted_lengths.append(keys.shape[1]) or take(keys, k))
    top_rows(torch.from_numpy(case("one class side by side", 50_000)), 200)
    assert max(sorted_lengths) < 600


def test_memory_holds_the_database_and_one_chunk_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK_BYTES", 4 * 100 * 8)
    seen = list(similarity_chunks(unit_rows(np.eye(100, 5, dtype=np.float32)), np.ones((20, 5), np.float32)))
    assert [start for start, _ in seen] == [0, 8, 16]
    assert len({chunk.data_ptr() for _, chunk in seen}) == 1


def test_queries_of_any_length_have_cosine_similarities_and_a_zero_row_is_far_from_all() -> None:
    bank = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], np.float32))
    ((values, rows),) = nearest(bank, np.array([[6.0, 8.0]], np.float32), 3)
    assert rows.tolist() == [[0, 2, 1]]
    assert values[0].tolist() == pytest.approx([1.0, 0.6, 0.0])
