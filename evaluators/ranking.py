"""Rankings in, average precisions out: the two definitions in use, and precision among the first k.

Rank is 0-based. Legend: q queries, n ranked items, P positives of one query.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REVISITED_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Positives, and images taken out of the ranking, of each setting of Revisited Oxford and Paris (Radenovic et al. 2018)."""


def average_precisions(relevant_qn: np.ndarray) -> np.ndarray:
    """Mean of the precision at each relevant place of each row [q]; NaN for a row without one.

    `relevant_qn` says whether the item at each rank is relevant, best first.
    """
    found_qn = np.cumsum(relevant_qn, axis=1)
    precision_qn = found_qn / np.arange(1, relevant_qn.shape[1] + 1)
    n_positive_q = relevant_qn.sum(axis=1)
    total_q = (precision_qn * relevant_qn).sum(axis=1)
    return np.divide(total_q, n_positive_q, out=np.full(len(total_q), np.nan), where=n_positive_q > 0)


def trapezoid_precision(ranks_P: np.ndarray, n_positive: int) -> float:
    """Average precision as the area under the precision-recall curve by trapezoids (Philbin et al. 2007).

    `ranks_P` are the ascending ranks at which positives were found, of `n_positive` that there are.
    """
    found = np.arange(len(ranks_P))
    ranks = np.asarray(ranks_P, dtype=np.float64)
    before = np.where(ranks > 0, found / np.maximum(ranks, 1), 1.0)
    after = (found + 1) / (ranks + 1)
    return float(((before + after) / 2).sum() / n_positive)


def precision_at(ranks_P: np.ndarray, k: int) -> float:
    """Share of positives among the first k, or among as many as it takes to reach the last positive."""
    reach = min(k, int(ranks_P.max()) + 1)
    return float((ranks_P < reach).sum() / reach)


def revisited_ranks(ranking_n: np.ndarray, truth: Mapping[str, Sequence[int]], setting: str) -> np.ndarray:
    """Ranks of a query's positives after the images that do not count are taken out of its ranking."""
    positive_kinds, ignored_kinds = REVISITED_SETTINGS[setting]
    positives = np.array([row for kind in positive_kinds for row in truth[kind]], dtype=np.int64)
    ignored = np.array([row for kind in ignored_kinds for row in truth[kind]], dtype=np.int64)
    kept = ranking_n[~np.isin(ranking_n, ignored)]
    return np.flatnonzero(np.isin(kept, positives))


def revisited_figures(ranking_n: np.ndarray, truth: Mapping[str, Any], setting: str) -> dict[str, float] | None:
    """`map`, `mp1`, `mp5` and `mp10` of one query; None where it has no positives in this setting."""
    n_positive = sum(len(truth[kind]) for kind in REVISITED_SETTINGS[setting][0])
    if not n_positive:
        return None
    ranks_P = revisited_ranks(ranking_n, truth, setting)
    if not len(ranks_P):  # all of them are images that could not be read
        return dict.fromkeys(("map", "mp1", "mp5", "mp10"), 0.0)
    return {"map": trapezoid_precision(ranks_P, n_positive)} | {f"mp{k}": precision_at(ranks_P, k) for k in (1, 5, 10)}
