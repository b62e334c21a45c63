"""Weighted k-NN: the official numbers, the slow oracle, ties, and the border cases that break published code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.errors import CheckFailed, InputError
from evaluators.accuracy import rank_classes
from evaluators.extract import FeatureTable
from evaluators.knn import KnnSpec, Voters, classify, evaluate, few_shot_voters, vote_weights, votes
from evaluators.neighbours import nearest, unit_rows
from tests.oracles.knn import knn_votes


@pytest.fixture(scope="module")
def golden(reference: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    results = json.loads((reference / "knn" / "results.json").read_text())
    return load_file(reference / "knn" / "io.safetensors"), results


def table(features: np.ndarray, labels: list[str], groups: list[str] | None = None) -> FeatureTable:
    names = tuple(f"image{i}" for i in range(len(features)))
    return FeatureTable(
        names, tuple(labels), tuple(groups or names), {"embedding": np.asarray(features, dtype=np.float32)}
    )


def test_votes_equal_the_official_ones_of_both_versions(golden) -> None:
    io, results = golden
    ks = tuple(results["ks"])
    ((similarity, rows),) = nearest(io["train_features"], io["test_features"], max(ks))
    labels = io["train_labels"][rows]
    softmax = vote_weights(similarity, results["temperature"], "softmax")
    for k, got in zip(ks, votes(softmax, labels, ks, 12), strict=True):
        torch.testing.assert_close(got.float(), io[f"v2_votes_k{k}"], atol=2e-5, rtol=1e-4)
    (got,) = votes(vote_weights(similarity, results["temperature"], "exp"), labels, (20,), 12)
    torch.testing.assert_close(got.float(), io["v1_votes_k20"], atol=2e-5, rtol=1e-4)


def test_accuracies_equal_the_official_ones(golden) -> None:
    io, results = golden
    ks = tuple(results["ks"])
    labels = io["test_labels"].numpy()
    train = (io["train_features"], io["train_labels"])
    (guesses,) = classify(*train, io["test_features"], labels, 12, [Voters(ks)], 0.07)
    for k in ks:
        official = results["results"][str(k)]
        top1, top5 = 100 * np.mean(guesses[k].rank_N == 0), 100 * np.mean(guesses[k].rank_N < 5)
        assert top1 == pytest.approx(official["v1_top1"], abs=1e-4)
        low, high = official["top5_bounds_under_ties"]
        assert low - 1e-4 <= top5 <= high + 1e-4
        if k >= 20:
            assert top5 == pytest.approx(official["v1_top5"], abs=1e-4)


@pytest.mark.parametrize("n_train", [3, 40, 300])
def test_brute_force_agrees_on_small_and_awkward_sets(n_train: int) -> None:
    rng = np.random.default_rng(n_train)
    train = rng.normal(size=(n_train, 5)).astype(np.float32)
    train[1] = train[0]  # an exact tie
    labels = rng.integers(0, 4, n_train)
    queries = rng.normal(size=(23, 5)).astype(np.float32)
    truth = rng.integers(0, 4, 23)
    ks = tuple(sorted({1, 2, min(10, n_train), n_train}))
    (got,) = classify(unit_rows(train), torch.from_numpy(labels), queries, truth, 4, [Voters(ks)], 0.07)
    for k in ks:
        tally = np.array([knn_votes(train.tolist(), labels.tolist(), q, k, 0.07, 4) for q in queries.tolist()])
        wanted = rank_classes(tally, truth, guessable_NC=tally > 0)
        np.testing.assert_array_equal(got[k].predicted_N, wanted.predicted_N)
        np.testing.assert_array_equal(got[k].rank_N, wanted.rank_N)


def test_equal_neighbours_are_taken_in_row_order_also_at_the_kth_place() -> None:
    similarity_rows = torch.eye(3)[[0, 1, 0, 0, 2, 0]]
    query = torch.eye(3)[:1]
    for k in (1, 2, 3, 4):
        ((values, rows),) = nearest(similarity_rows, query, k)
        assert rows.tolist() == [[0, 2, 3, 5][:k]]
        assert values.tolist() == [[1.0] * k]


def test_chunking_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(-1, 2, (50, 4), generator=generator).float()
    queries = torch.randint(-1, 2, (33, 4), generator=generator).float()
    ((whole_values, whole_rows),) = nearest(train, queries, 7)
    monkeypatch.setattr("evaluators.neighbours.CHUNK_BYTES", 4 * 50 * 5)
    chunks = list(nearest(train, queries, 7))
    assert len(chunks) == 7
    torch.testing.assert_close(torch.cat([values for values, _ in chunks]), whole_values)
    assert torch.equal(torch.cat([rows for _, rows in chunks]), whole_rows)


def test_neighbours_of_the_query_group_are_passed_over() -> None:
    train = torch.eye(3)
    ((values, rows),) = nearest(train, train, 3, torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
    assert rows[:, 0].tolist() == [2, 2, 0]
    assert values[2].tolist() == [0.0, 0.0, -torch.inf]


def test_labels_may_be_any_names_and_unseen_test_classes_are_errors() -> None:
    train = table(np.eye(4), ["zebra", "zebra", "7", "7"])
    test = table(np.eye(4)[[0, 2, 3]], ["zebra", "7", "only in test"])
    result = evaluate(train, test, KnnSpec(k=(1,)))
    assert result.metrics["top1"].value == pytest.approx(2 / 3)
    assert result.predictions["classes"].tolist() == ["7", "only in test", "zebra"]


def test_protocol_k_is_cut_to_the_training_images_with_a_note_but_an_own_k_is_refused() -> None:
    rng = np.random.default_rng(0)
    train = table(rng.normal(size=(15, 3)), ["a", "b", "c"] * 5)
    result = evaluate(train, train, KnnSpec())
    assert [entry["k"] for entry in result.grid] == [10, 15]
    assert any("15 training images" in note for note in result.notes)
    with pytest.raises(InputError, match=r"--k 16: there are only 15 training images"):
        evaluate(train, train, KnnSpec(k=(1, 16)))


def test_k_is_chosen_on_training_images_and_the_published_choice_is_named_as_such() -> None:
    rng = np.random.default_rng(3)
    labels = [str(i % 3) for i in range(60)]
    features = np.eye(3)[[int(label) for label in labels]] + rng.normal(scale=0.8, size=(60, 3))
    train, test = table(features[:40], labels[:40]), table(features[40:], labels[40:])
    clean = evaluate(train, test, KnnSpec(k=(1, 5, 20)))
    assert clean.selected_on == "train, leave-one-out"
    by_train = {entry["k"]: entry["train_left_out_top1"] for entry in clean.grid}
    assert by_train[clean.chosen["k"]] == max(by_train.values())
    published = evaluate(train, test, KnnSpec(k=(1, 5, 20), select_on="val"))
    best = max(entry["top1"] for entry in published.grid)
    assert published.metrics["top1"].value == best == clean.metrics["top1_best_on_val"].value
    assert "published" in published.selected_on


def test_leave_one_out_never_asks_another_view_of_the_same_thing() -> None:
    rng = np.random.default_rng(0)
    things = rng.normal(size=(10, 8)).repeat(4, axis=0)  # 4 identical views of 10 things with random labels
    labels = [str(label) for label in rng.integers(0, 2, 10).repeat(4)]
    views = [str(i) for i in np.arange(10).repeat(4)]
    alone = evaluate(table(things, labels), table(things, labels), KnnSpec(k=(1,)))
    tied = evaluate(table(things, labels, views), table(things, labels, views), KnnSpec(k=(1,)))
    assert alone.grid[0]["train_left_out_top1"] == 1.0
    assert tied.grid[0]["train_left_out_top1"] < 0.9


@pytest.mark.parametrize(
    ("k", "temperature", "message"),
    [((), 0.07, "--k"), ((0,), 0.07, "--k"), ((1,), 0.0, "--temp"), ((1,), math.nan, "--temp")],
)
def test_impossible_settings_are_refused(k: tuple[int, ...], temperature: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KnnSpec(k=k, temperature=temperature)


def test_each_try_of_a_small_training_set_is_the_search_among_its_images_alone() -> None:
    rng = np.random.default_rng(5)
    features, labels = rng.normal(size=(90, 6)).astype(np.float32), np.arange(90) % 3
    queries, truth = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    tries = few_shot_voters(labels, 7, 3, (1, 5, 10))
    assert [some.ks for some in tries] == [(1, 5, 7)] * 3
    assert len({tuple(some.rows.tolist()) for some in tries}) == 3
    together = classify(unit_rows(features), torch.from_numpy(labels), queries, truth, 3, tries, 0.07)
    for some, found in zip(tries, together, strict=True):
        rows = some.rows.numpy()
        assert np.bincount(labels[rows]).tolist() == [7, 7, 7]
        bank = unit_rows(features[rows])
        (alone,) = classify(bank, torch.from_numpy(labels[rows]), queries, truth, 3, [Voters(some.ks)], 0.07)
        for k in some.ks:
            np.testing.assert_array_equal(found[k].predicted_N, alone[k].predicted_N)
            np.testing.assert_array_equal(found[k].rank_N, alone[k].rank_N)


def test_few_shot_figures_are_means_over_tries_and_stand_beside_the_full_set() -> None:
    rng = np.random.default_rng(3)
    labels = [str(i % 3) for i in range(90)]
    features = np.eye(3)[[int(label) for label in labels]] + rng.normal(scale=0.8, size=(90, 3))
    train, test = table(features[:60], labels[:60]), table(features[60:], labels[60:])
    found = evaluate(train, test, KnnSpec(k=(1, 5, 20), n_per_class=(2, 20), tries=4))
    few = [entry for entry in found.grid if entry.get("n_per_class") == 2]
    assert [entry["k"] for entry in few] == [1, 2]
    assert found.metrics["top1_2_per_class"].value == pytest.approx(few[-1]["top1"])
    assert few[-1]["top1_std"] > 0
    whole = next(entry for entry in found.grid if entry["k"] == 20 and "n_per_class" not in entry)
    capped = next(entry for entry in found.grid if entry["k"] == 20 and entry.get("n_per_class") == 20)
    assert capped["top1"] == pytest.approx(whole["top1"])  # every class has 20: every try is the whole set
    assert found.metrics["top1"] == evaluate(train, test, KnnSpec(k=(1, 5, 20))).metrics["top1"]
    with pytest.raises(InputError, match="--n-per-class 30: the largest class has 20 training images"):
        evaluate(train, test, KnnSpec(k=(1, 5, 20), n_per_class=(30,)))


def test_both_presets_elect_the_same_classes() -> None:
    rng = np.random.default_rng(1)
    train = table(rng.normal(size=(80, 8)), [str(i % 5) for i in range(80)])
    test = table(rng.normal(size=(60, 8)), [str(i % 5) for i in range(60)])
    v1, v2 = (evaluate(train, test, KnnSpec(preset=preset, k=(5, 20))) for preset in ("dino", "dinov2"))
    np.testing.assert_array_equal(v1.predictions["predicted"], v2.predictions["predicted"])
    assert ("exp" in v1.protocol, "softmax" in v2.protocol) == (True, True)


def test_features_that_are_not_finite_or_of_two_widths_are_refused() -> None:
    good = table(np.eye(4), ["a", "b", "a", "b"])
    spoilt = np.eye(4)
    spoilt[2, 1] = np.nan
    with pytest.raises(CheckFailed, match="embedding of 1 images is not finite, first of 'image2'"):
        evaluate(good, table(spoilt, ["a", "b", "a", "b"]), KnnSpec(k=(1,)))
    with pytest.raises(InputError, match=r"features of \[3, 4\] numbers"):
        evaluate(good, table(np.eye(3), ["a", "b", "a"]), KnnSpec(k=(1,)))
