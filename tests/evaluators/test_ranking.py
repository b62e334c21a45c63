"""Average precision in both definitions: the official results on the benchmark's semantics, and cases worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from evaluators.ranking import (
    average_precisions,
    precision_at,
    revisited_figures,
    trapezoid_precision,
)


def test_easy_medium_and_hard_equal_the_official_figures(reference: Path) -> None:
    io = load_file(reference / "retrieval" / "io.safetensors")
    truth = json.loads((reference / "retrieval" / "ground_truth.json").read_text())
    results = json.loads((reference / "retrieval" / "results.json").read_text())
    for setting, wanted in results["results"].items():
        for q, marks in enumerate(truth):
            found = revisited_figures(io["ranks"][:, q].numpy(), marks, setting)
            if wanted["aps"][q] is None:
                assert found is None
                continue
            assert found is not None
            assert found["map"] == pytest.approx(wanted["aps"][q], abs=1e-12)
            assert [found[f"mp{k}"] for k in results["kappas"]] == pytest.approx(wanted["P_at_k"][q])


def test_junk_is_taken_out_of_the_ranking_before_ranks_are_counted() -> None:
    truth = {"easy": [2], "hard": [3], "junk": [0, 1]}
    ranking = np.array([0, 1, 2, 3, 4])
    assert revisited_figures(ranking, truth, "medium")["map"] == 1.0  # type: ignore[index]
    assert revisited_figures(ranking, truth, "hard")["map"] == 1.0  # type: ignore[index]
    assert revisited_figures(ranking, {"easy": [], "hard": [], "junk": [0]}, "medium") is None


def test_a_positive_that_is_not_ranked_counts_as_missed() -> None:
    figures = revisited_figures(np.array([5, 6]), {"easy": [5, -1], "hard": [], "junk": []}, "easy")
    assert figures is not None
    assert figures["map"] == pytest.approx(0.5)


def test_trapezoids_by_hand() -> None:
    assert trapezoid_precision(np.array([0]), 1) == 1.0
    assert trapezoid_precision(np.array([1]), 1) == pytest.approx((0 / 1 + 1 / 2) / 2)
    assert trapezoid_precision(np.array([0, 2]), 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert precision_at(np.array([0, 2]), 10) == pytest.approx(2 / 3)
    assert precision_at(np.array([0, 2]), 1) == 1.0


def test_plain_average_precision_by_hand() -> None:
    relevant = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    found = average_precisions(relevant)
    assert found[:2] == pytest.approx([(1 + 2 / 3) / 2, 1 / 4])
    assert math.isnan(found[2])
