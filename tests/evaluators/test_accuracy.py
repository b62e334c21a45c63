"""Accuracies from votes: ties, classes never named, classes that training did not have."""

import tracemalloc

import numpy as np
import pytest

from evaluators.accuracy import NOT_GUESSED, Guesses, accuracies, accuracy_metrics, mean_per_class, rank_classes
from evaluators.bootstrap import interval95


def test_equal_scores_are_ordered_by_class_index() -> None:
    scores = np.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.2, 0.9, 0.9]])
    guesses = rank_classes(scores, np.array([0, 1, 2]))
    assert guesses.predicted_N.tolist() == [0, 0, 1]
    assert guesses.rank_N.tolist() == [0, 1, 1]


def test_a_class_without_a_vote_is_not_guessed_whatever_its_place() -> None:
    scores = np.array([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    guesses = rank_classes(scores, np.array([0, 1]), guessable_NC=scores > 0)
    assert guesses.rank_N.tolist() == [0, NOT_GUESSED]


def test_top5_is_reported_only_where_five_classes_are_not_all_of_them() -> None:
    labels = np.array([0, 1, 2, 3])
    scores = np.eye(4)
    assert "top5" not in accuracies(rank_classes(scores, labels), labels, 4)
    wide = np.concatenate([scores, np.zeros((4, 4))], axis=1)
    assert accuracies(rank_classes(wide, labels), labels, 8)["top5"] == 1.0


def test_macro_accuracy_weighs_classes_equally_and_has_an_interval_around_it() -> None:
    labels = np.repeat([0, 1], [90, 10])
    correct = labels == 0
    assert mean_per_class(correct, labels) == pytest.approx(0.5)
    scores = np.where(np.arange(2)[None] == 0, 1.0, 0.0) * np.ones((100, 1))
    metrics = accuracy_metrics(rank_classes(scores, labels), labels, 2)
    assert metrics["top1"].value == pytest.approx(0.9)
    assert metrics["mean_per_class"].value == pytest.approx(0.5)
    assert metrics["mean_per_class"].ci95 == pytest.approx((0.5, 0.5), abs=0.02)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_of_macro_accuracy_is_that_of_sums_a_class(grouped: bool) -> None:
    """Oracle: hits and sizes of each class as so many columns of scores."""
    rng = np.random.default_rng(0)
    labels, correct = rng.choice([0, 3, 4, 9], 60), rng.random(60) < 0.6
    groups = np.arange(60) // 3 if grouped else None
    guesses = Guesses(labels, np.where(correct, 0, 5))
    present = np.unique(labels)
    members = (labels[:, None] == present).astype(float)

    def macro(sums: np.ndarray) -> np.ndarray:
        hits, sizes = np.split(sums, 2, axis=1)
        return np.nanmean(np.divide(hits, sizes, out=np.full_like(hits, np.nan), where=sizes > 0), axis=1)

    wanted = interval95(np.concatenate([members * correct[:, None], members], axis=1), macro, groups)
    assert accuracy_metrics(guesses, labels, 10, groups)["mean_per_class"].ci95 == pytest.approx(wanted)


def test_many_classes_take_no_column_each() -> None:
    """iNaturalist 2021 has 10,000 classes and 100,000 test images: a number for each pair would be 8 GB."""
    labels = np.arange(5000) % 2500
    tracemalloc.start()
    accuracy_metrics(Guesses(labels, np.zeros(5000, np.int64)), labels, 2500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "below half of 5,000 x 2,500 numbers"
