"""Which images an epoch visits, in which order, and how they are shared out, for a set whose images are all known.

`data/streams.py` does the same for tar shards that are read as they come. Both tell apart what the main process knows (`tasks`) and what a
worker makes of it (`candidates`), so that any number of workers, and of processes, sees the same images in the same places.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.datasets import Dataset
from data.members import Member

MAX_BAD_IN_A_ROW = 1000
"""So many unreadable files one after another mean that the data set is not what it was taken for."""


class Sample(NamedTuple):
    """One image: its name, the number by which its views are drawn, and where its bytes lie."""

    name: str
    key: int
    member: Member


@dataclass(frozen=True)
class Share:
    """Part of each batch that falls to one process."""

    batch_size: int
    """Images of a batch on each process."""
    rank: int
    world_size: int

    @property
    def whole(self) -> int:
        """Images of a batch on all processes together."""
        return self.batch_size * self.world_size


class IndexedDraws:
    """One epoch of a `Dataset`: a permutation, cut into batches. A task is the number of a batch."""

    def __init__(self, dataset: Dataset, share: Share, seed: int, epoch: int) -> None:
        self.dataset, self.share = dataset, share
        self.order = epoch_order(len(dataset), seed, epoch)

    def tasks(self, first_batch: int) -> Iterable[int]:
        """The batches from `first_batch` on."""
        return range(first_batch, len(self.order) // self.share.whole)

    def candidates(self, batch: int, slot: int) -> Iterator[Sample]:
        """The sample for a slot of this process's part of a batch, and behind it those that stand in for it, in the order of the epoch."""
        share = self.share
        position = (batch * share.world_size + share.rank) * share.batch_size + slot
        for step in range(min(len(self.order), MAX_BAD_IN_A_ROW)):
            index = int(self.order[(position + step) % len(self.order)])
            yield Sample(self.dataset.items[index].name, index, self.dataset.member(index))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n images, int64 [n]: a permutation of its own for each seed and epoch."""
    # the last word keeps this stream apart from those of the views, which are seeded by three words
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, 0, 1)))).permutation(n)
