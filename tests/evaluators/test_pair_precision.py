"""Average precision of pairs: that of all pairs sorted, and the interval of resamples that are listed pair by pair."""

import numpy as np
import pytest

from evaluators import pair_precision
from evaluators.pair_precision import RankedPairs
from tests.oracles.pairs import pair_average_precision, pair_interval


def similarities(group_n: np.ndarray) -> np.ndarray:
    """Images of a group are somewhat alike; the cosines are rounded, so that many are equal."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(group_n.max() + 1, 6))[group_n] + rng.normal(size=(len(group_n), 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rounded: np.ndarray = (features @ features.T).round(2).astype(np.float32)
    return rounded


@pytest.mark.parametrize("at_once", [1, 70, 10**6])
@pytest.mark.parametrize("sizes", [[3, 1, 2, 4, 1, 5, 2], [2, *[1] * 8], [4, 6, 5]])
def test_figures_are_those_of_all_pairs_sorted(sizes: list[int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs and resamples are taken at a time; of fewer than five groups, images are drawn."""
    monkeypatch.setattr(pair_precision, "PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr(pair_precision, "SUMS_AT_ONCE", at_once)
    group_n = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    similarity = similarities(group_n)
    pairs = RankedPairs.of(similarity, group_n)
    first, second = np.triu_indices(len(group_n), 1)
    wanted = pair_average_precision(similarity[first, second], group_n[first] == group_n[second])
    assert pairs.precision() == pytest.approx(wanted, rel=1e-12)
    units = [np.flatnonzero(group_n == group) for group in range(len(sizes))]
    if len(sizes) < 5:
        units = [np.array([row]) for row in range(len(group_n))]
    wanted_interval = pair_interval(similarity, units, group_n, pair_precision.RESAMPLES)
    assert pairs.interval95() == pytest.approx(wanted_interval, rel=1e-12)


def test_equal_pairs_are_one_step() -> None:
    """Cosines 0.9 (alike), then three of 0.5 of which one is alike, then 0.1 (alike)."""
    similarity = np.full((4, 4), 0.1, np.float32)
    group_n = np.array([0, 0, 0, 1])
    for (a, b), score in {(0, 1): 0.9, (0, 2): 0.5, (0, 3): 0.5, (1, 3): 0.5, (2, 3): 0.05, (1, 2): 0.1}.items():
        similarity[a, b] = similarity[b, a] = score
    assert RankedPairs.of(similarity, group_n).precision() == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
