"""Accuracies from votes: ties, classes never named, classes that training did not have."""

import numpy as np
import pytest

from evaluators.accuracy import NOT_GUESSED, accuracies, accuracy_metrics, mean_per_class, rank_classes


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
