"""Per-item scores in, 95 % intervals out: the bootstrap, as one product of resampling counts and sums.

A resample draws as many groups as there are, with replacement. A group is one test item, or several that cannot be
called independent (five views of one model): resampling such items one by one would make intervals too narrow. Of very
few groups, though, resamples are nearly all alike: see `drawn_groups`.
Legend: N items, G groups, M columns of scores, R resamples.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

RESAMPLES = 1000
FEWEST_DRAWN = 5
"""Groups below which items are drawn: of one group all resamples are alike, and of two or three nearly so."""
RESAMPLES_AT_ONCE = 100
"""Rows of the count matrix held at a time; bounds memory to 100 x G doubles (`drawn_interval95`: a few times 100 x N)."""


def drawn_groups(tied_N: Sequence[str] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What is drawn as a whole, a number [N] per item (int64), and the note that a result needs about it, if any.

    Items of one value in `tied_N` are drawn together; where there are fewer than `FEWEST_DRAWN` values, each item by itself.
    """
    values, groups_N = np.unique(np.asarray(tied_N), return_inverse=True)
    if len(values) >= min(FEWEST_DRAWN, len(groups_N)):
        return groups_N.astype(np.int64), []
    groups = f"{len(values)} group{'s' if len(values) > 1 else ''}"
    note = f"the test part is of {groups} only: intervals are over its single items, and too narrow"
    return np.arange(len(groups_N)), [note]


def interval95(
    scores_NM: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    groups_N: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of `statistic` over resamples (percentile bootstrap, Efron 1979).

    `statistic` maps the summed scores of resamples [R, M] to values [R]; NaN values (a resample in which it is
    undefined) are left out.
    """
    sums_GM = group_sums(scores_NM, groups_N)
    values_R = np.concatenate([statistic(counts @ sums_GM) for counts in _counts(len(sums_GM), resamples, seed)])
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def mean_interval95(scores_N: np.ndarray, groups_N: np.ndarray | None = None, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean over items; for a paired difference give the differences item by item."""
    columns_N2 = np.stack([scores_N, np.ones(len(scores_N))], axis=1)
    return interval95(columns_N2, lambda sums: sums[:, 0] / sums[:, 1], groups_N, seed=seed)


def drawn_interval95(
    n_items: int,
    statistic: Callable[[np.ndarray], np.ndarray],
    groups_N: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """As `interval95`, of a statistic that is told how often each item was drawn, [R, N], in the same resamples.

    For what has too many sums of scores to hold them for each item, a class each for example.
    """
    group_of_N = None if groups_N is None else np.unique(np.asarray(groups_N), return_inverse=True)[1]
    n_groups = n_items if group_of_N is None else int(group_of_N.max()) + 1
    drawn = _counts(n_groups, resamples, seed)
    values_R = np.concatenate([statistic(one if group_of_N is None else one[:, group_of_N]) for one in drawn])
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def group_sums(scores_NM: np.ndarray, groups_N: np.ndarray | None) -> np.ndarray:
    """Sums of scores per group [G, M] as float64; without groups every item is its own."""
    scores_NM = np.asarray(scores_NM, dtype=np.float64)
    if groups_N is None:
        return scores_NM
    _, group_of_N = np.unique(np.asarray(groups_N), return_inverse=True)
    sums_GM = np.zeros((int(group_of_N.max()) + 1, scores_NM.shape[1]))
    np.add.at(sums_GM, group_of_N, scores_NM)
    return sums_GM


def _counts(n_groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, [up to RESAMPLES_AT_ONCE, G] at a time; every row sums to G."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        rows = min(RESAMPLES_AT_ONCE, resamples - start)
        drawn_RG = rng.integers(0, n_groups, size=(rows, n_groups)) + np.arange(rows)[:, None] * n_groups
        yield np.bincount(drawn_RG.ravel(), minlength=rows * n_groups).reshape(rows, n_groups).astype(np.float64)
