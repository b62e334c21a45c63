"""Similarities of images in, the average precision of their pairs out, with its bootstrap interval.

A pair's precision asks how many pairs score as high or higher. Of all the other pairs only a histogram is needed for that, over the
scores of the pairs that belong together; a resample weighs the same pairs otherwise, so its histogram is a sum over the same places,
and nothing is sorted again.
Legend: n images, P pairs of one group, T different scores of theirs, R resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evaluators.bootstrap import FEWEST_DRAWN

RESAMPLES = 200
PAIRS_AT_ONCE = 2**19
"""Pairs whose weights are held at a time."""
SUMS_AT_ONCE = 2**24
"""Numbers in the histograms of the resamples that are made at a time, 128 MiB."""


@dataclass(frozen=True)
class RankedPairs:
    """Where every pair stands among the scores of the pairs of one group."""

    group_n: np.ndarray
    first_P: np.ndarray
    second_P: np.ndarray
    place_P: np.ndarray
    """Place of each pair of one group among their T scores, from the lowest."""
    n_places: int
    below: tuple[tuple[int, np.ndarray], ...]
    """For a stretch of rows, the first of them and int32 [rows, n - first]: of each pair of two groups with a later image, how many of
    the T scores it reaches; 0 for what is no such pair."""

    @staticmethod
    def of(similarity_nn: np.ndarray, group_n: np.ndarray) -> "RankedPairs":
        """From float32 cosines and the number of each image's group."""
        first_P, second_P = pairs_within(group_n)
        scores_T, place_P = np.unique(similarity_nn[first_P, second_P], return_inverse=True)
        below = tuple(_reached(similarity_nn, group_n, scores_T))
        return RankedPairs(group_n, first_P, second_P, place_P, len(scores_T), below)

    def precision(self) -> float:
        """Average precision of all pairs; those of equal score are one step."""
        return float(self._precisions(np.ones((1, len(self.group_n))), np.ones((1, len(self.place_P))))[0])

    def interval95(self, seed: int = 0) -> tuple[float, float]:
        """Of resamples that draw groups, or images where there are fewer than `FEWEST_DRAWN` groups.

        What is drawn twice stands for two of its kind, which make no pairs of one group with each other, so no pair of an image with
        itself gets in. Resamples without a pair of one group are left out.
        """
        rng = np.random.default_rng(seed)
        n_groups = int(self.group_n.max()) + 1
        by_group = n_groups >= FEWEST_DRAWN
        n_drawn = n_groups if by_group else len(self.group_n)
        values: list[float] = []
        at_once = max(1, SUMS_AT_ONCE // (self.n_places + 1))
        for start in range(0, RESAMPLES, at_once):
            draws = range(min(at_once, RESAMPLES - start))
            times = np.stack([np.bincount(rng.integers(0, n_drawn, n_drawn), minlength=n_drawn) for _ in draws])
            times_Rn = (times[:, self.group_n] if by_group else times).astype(np.float64)
            times_RP = times_Rn[:, self.first_P]
            if not by_group:
                times_RP *= times_Rn[:, self.second_P]
            values += self._precisions(times_Rn, times_RP).tolist()
        low, high = np.nanpercentile(values, [2.5, 97.5])
        return float(low), float(high)

    def _precisions(self, times_Rn: np.ndarray, times_RP: np.ndarray) -> np.ndarray:
        """[R], where each image and each pair of one group occurs so many times; NaN without such a pair."""
        size = self.n_places + 1
        others_RT = np.zeros((len(times_Rn), size))
        for start, reached in self.below:
            places = reached.ravel().astype(np.intp)
            for times_n, others_T in zip(times_Rn, others_RT, strict=True):
                weights = np.outer(times_n[start : start + len(reached)], times_n[start:])
                others_T += np.bincount(places, weights.ravel(), size)
        others_RT = others_RT[:, :0:-1].cumsum(axis=1)  # from the highest score down; the first place is below all
        gained_RT = np.stack([np.bincount(self.place_P, times_P, self.n_places) for times_P in times_RP])[:, ::-1]
        found_RT = gained_RT.cumsum(axis=1)
        precision_RT = np.divide(found_RT, found_RT + others_RT, out=np.zeros_like(found_RT), where=found_RT > 0)
        total_R = found_RT[:, -1]
        sums_R = (precision_RT * gained_RT).sum(axis=1)
        return np.divide(sums_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


def pairs_within(group_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both rows [P] of every pair of images of one group, the lower one first."""
    order = np.argsort(group_n, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group_n[order])) + 1)
    pairs = [own[np.stack(np.triu_indices(len(own), 1))] for own in members]
    first_P, second_P = np.concatenate(pairs, axis=1)
    return first_P, second_P


def _reached(similarity_nn: np.ndarray, group_n: np.ndarray, scores_T: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The stretches of `RankedPairs.below`."""
    n, start = len(group_n), 0
    while start < n:
        stop = min(n, start + max(1, PAIRS_AT_ONCE // (n - start)))
        reached = np.searchsorted(scores_T, similarity_nn[start:stop, start:], side="right").astype(np.int32)
        later = np.arange(start, n) > np.arange(start, stop)[:, None]
        reached[~later | (group_n[start:stop, None] == group_n[start:])] = 0
        yield start, reached
        start = stop
