"""Votes or logits in, accuracies with intervals out: what every classification evaluator reports.

Legend: N test items, C classes.
"""

from dataclasses import dataclass

import numpy as np

from evaluators.bootstrap import drawn_interval95, mean_interval95
from evaluators.results import Metric

NOT_GUESSED = np.iinfo(np.int64).max
"""Rank of the true class where it got no vote at all, or is no class of the training split."""


@dataclass(frozen=True)
class Guesses:
    """What a classifier said about each test item, in integers."""

    predicted_N: np.ndarray
    """Index of the first class."""
    rank_N: np.ndarray
    """0-based place of the true class, `NOT_GUESSED` where the classifier cannot have meant it."""

    @property
    def correct_N(self) -> np.ndarray:
        """Whether the first class is the true one."""
        return self.rank_N == 0


def rank_classes(scores_NC: np.ndarray, labels_N: np.ndarray, guessable_NC: np.ndarray | None = None) -> Guesses:
    """Rank the true class among the scores; equal scores are ordered by class index, so ties are deterministic.

    `guessable_NC` marks the classes the classifier named (those with a vote). The true class earns a rank only there:
    without this rule, a k-NN whose neighbours name two classes would be credited with three lucky guesses in top-5.
    """
    rows = np.arange(len(labels_N))
    own_N1 = scores_NC[rows, labels_N][:, None]
    guessed_N = np.ones(len(rows), bool) if guessable_NC is None else guessable_NC[rows, labels_N]
    rank_N = _counts(scores_NC > own_N1)
    tied = np.flatnonzero((_counts(scores_NC == own_N1) > 1) & guessed_N)
    before = np.arange(scores_NC.shape[1])[None, :] < labels_N[tied, None]
    rank_N[tied] += _counts((scores_NC[tied] == own_N1[tied]) & before)
    rank_N[~guessed_N] = NOT_GUESSED
    return Guesses(scores_NC.argmax(axis=1).astype(np.int64), rank_N)


def _counts(flags_NC: np.ndarray) -> np.ndarray:
    """int64 [N]: flags that are set in each row; eight at a time, as adding them up by one takes longer than comparing did."""
    counts: np.ndarray = np.bitwise_count(np.packbits(flags_NC, axis=1)).sum(axis=1, dtype=np.int64)
    return counts


def mean_per_class(correct_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean over the classes present of the accuracy within the class (macro top-1)."""
    sizes_C = np.bincount(labels_N)
    hits_C = np.bincount(labels_N, weights=correct_N)
    present = sizes_C > 0
    return float(np.mean(hits_C[present] / sizes_C[present]))


def accuracies(guesses: Guesses, labels_N: np.ndarray, n_classes: int) -> dict[str, float]:
    """Top-1, macro top-1 and, with more than 5 classes, top-5: plain figures for a grid."""
    figures = {
        "top1": float(guesses.correct_N.mean()),
        "mean_per_class": mean_per_class(guesses.correct_N, labels_N),
    }
    if n_classes > 5:
        figures["top5"] = float((guesses.rank_N < 5).mean())
    return figures


def accuracy_metrics(
    guesses: Guesses, labels_N: np.ndarray, n_classes: int, groups_N: np.ndarray | None = None
) -> dict[str, Metric]:
    """The same figures with 95 % bootstrap intervals over test items (or groups of them)."""
    n = len(labels_N)
    metrics: dict[str, Metric] = {}
    for name, value in accuracies(guesses, labels_N, n_classes).items():
        if name == "mean_per_class":
            ci95 = _macro_interval95(guesses.correct_N, labels_N, groups_N)
        else:
            ci95 = mean_interval95(guesses.rank_N < (5 if name == "top5" else 1), groups_N)
        metrics[name] = Metric(value, ci95, n)
    return metrics


def mean_metric(scores_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metric:
    """The mean over items as a metric, with its interval over items (or groups of them)."""
    return Metric(float(np.mean(scores_N)), mean_interval95(scores_N, groups_N), len(scores_N))


def _macro_interval95(correct_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray | None) -> tuple[float, float]:
    """Interval of the macro accuracy; a resample that misses a class averages over the classes it has."""
    order_N = np.argsort(labels_N, kind="stable")  # items of one class side by side
    _, first_C = np.unique(labels_N[order_N], return_index=True)
    correct_in_order_N = correct_N[order_N]

    def macro(drawn_RN: np.ndarray) -> np.ndarray:
        by_class_RN = drawn_RN[:, order_N]
        sizes = np.add.reduceat(by_class_RN, first_C, axis=1)
        hits = np.add.reduceat(by_class_RN * correct_in_order_N, first_C, axis=1)
        shares = np.divide(hits, sizes, out=np.zeros_like(hits), where=sizes > 0)
        values: np.ndarray = shares.sum(axis=1) / (sizes > 0).sum(axis=1)
        return values

    return drawn_interval95(len(labels_N), macro, groups_N)
