"""Intervals cover what they should, and widen when images are tied together."""

import numpy as np
import pytest

from evaluators.bootstrap import interval95, mean_interval95


def test_interval_of_a_share_has_the_width_of_the_binomial() -> None:
    correct = np.repeat([1.0, 0.0], [300, 100])
    low, high = mean_interval95(correct)
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.006)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.006)


def test_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = mean_interval95(rng.random(120) < 0.6, seed=trial)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_tied_items_are_resampled_together_so_copies_do_not_narrow_the_interval() -> None:
    once = np.tile([1.0, 0.0, 1.0], 20)
    copied = np.repeat(once, 5)
    groups = np.repeat(np.arange(60), 5)
    grouped = mean_interval95(copied, groups)
    assert grouped == pytest.approx(mean_interval95(once), abs=0.03)
    naive = mean_interval95(copied)
    assert grouped[1] - grouped[0] > 1.8 * (naive[1] - naive[0])


def test_constant_scores_have_no_width_and_the_same_seed_gives_the_same_interval() -> None:
    assert mean_interval95(np.ones(50)) == (1.0, 1.0)
    scores = np.random.default_rng(0).random(50)
    assert mean_interval95(scores, seed=3) == mean_interval95(scores, seed=3)
    assert mean_interval95(scores, seed=3) != mean_interval95(scores, seed=4)


def test_a_ratio_of_sums_is_resampled_as_a_ratio() -> None:
    columns = np.stack([np.arange(1.0, 101.0), np.full(100, 2.0)], axis=1)
    low, high = interval95(columns, lambda sums: sums[:, 0] / sums[:, 1])
    assert low < 50.5 / 2 < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(np.arange(1.0, 101.0)) / 10 / 2, rel=0.1)
