"""Average precision of pairs, resample by resample, every pair listed and sorted; slow and obvious."""

import numpy as np


def pair_average_precision(scores_m: np.ndarray, positive_m: np.ndarray) -> float:
    """Average precision of m scored pairs, best first; equal scores are one step, so their order has no say."""
    order = np.argsort(-scores_m, kind="stable")
    scores, positive = scores_m[order], positive_m[order]
    found = np.cumsum(positive)
    last_of_step = np.append(scores[1:] != scores[:-1], True)
    precision = found[last_of_step] / (np.flatnonzero(last_of_step) + 1)
    gained = np.diff(found[last_of_step], prepend=0)
    return float((precision * gained).sum() / max(positive.sum(), 1))


def pair_interval(
    similarity_nn: np.ndarray, units: list[np.ndarray], group_n: np.ndarray, resamples: int
) -> list[float]:
    """2.5th and 97.5th percentile, where whole units (rows of `group_n`) are drawn.

    A unit drawn twice stands for two, whose images make no pairs with each other where they are of one group.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(units), len(units))
        rows = np.concatenate([units[unit] for unit in drawn])
        copy = np.repeat(np.arange(len(drawn)), [len(units[unit]) for unit in drawn])
        whole_groups = len(units) == group_n.max() + 1
        first, second = np.triu_indices(len(rows), 1)
        alike = group_n[rows[first]] == group_n[rows[second]]
        kept = ~alike | (copy[first] == copy[second]) if whole_groups else rows[first] != rows[second]
        first, second, alike = first[kept], second[kept], alike[kept]
        if alike.any():
            values.append(pair_average_precision(similarity_nn[rows[first], rows[second]], alike))
    return np.percentile(values, [2.5, 97.5]).tolist()
