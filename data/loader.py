"""A data set in, batches of views out, the same ones whatever number of workers makes them.

Which images a batch holds follows from (seed, epoch, batch), and how they are altered from (seed, epoch, image), so a
run that is resumed at any batch, with more workers or fewer, sees what it would have seen. A file that cannot be read
is replaced by the next good one in the epoch's order and remembered in `skipped`; batches keep their size.
"""

from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.crops import CropSpec, make_views, to_batch, view_rng
from data.datasets import Dataset
from data.errors import InputError
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD

MAX_BAD_IN_A_ROW = 1000
"""So many unreadable files one after another mean that the data set is not what it was taken for."""

# Axes: V views of one size, B images, h w pixels.
MadeBatch = tuple[list[torch.Tensor], list[int], dict[str, str]]
"""uint8 views [V,B,h,w,3], one tensor a size; which images they show; names of unreadable images and why."""


class Views(list[torch.Tensor]):
    """The views of a batch, float32 [B,3,h,w] each, and the names of its images."""

    def __init__(self, views: Iterable[torch.Tensor], names: Sequence[str]) -> None:
        super().__init__(views)
        self.names = tuple(names)


class ViewLoader:
    """Batches of multi-crop views. `skipped` grows while batches are taken: name of an unreadable image to reason."""

    def __init__(
        self,
        dataset: Dataset,
        spec: CropSpec,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` images a batch on each of `world_size` ranks; `workers` processes, 0 to work in this one."""
        if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
            raise InputError(
                f"batch size {batch_size}, {workers} workers, rank {rank} of {world_size}: wanted at least one image "
                "a batch, no fewer than 0 workers, and a rank below the number of ranks"
            )
        if seed < 0:
            raise InputError(f"seed {seed}: wanted 0 or more")
        if len(dataset) < batch_size * world_size:
            raise InputError(
                f"{dataset.name}: {len(dataset)} images are fewer than one batch of {batch_size * world_size}; "
                "add images or make the batch smaller"
            )
        self.dataset, self.spec, self.batch_size, self.seed, self.workers = dataset, spec, batch_size, seed, workers
        self.mean, self.std, self.device = tuple(mean), tuple(std), torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches an epoch; what is left over below a full batch waits for the next epoch's order."""
        return len(self.dataset) // (self.batch_size * self.world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Views]:
        """Batches `start_batch` and on of one epoch: each a list of float32 [B,3,h,w], one a view, global ones first.

        Raises InputError when too many files in a row are unreadable or too few are left for a batch of different images, RuntimeError
        when a worker process dies.
        """
        if not 0 <= start_batch <= len(self):
            raise InputError(f"batch {start_batch} of an epoch of {len(self)} batches; was the data set changed?")
        for sizes, images, bad in self._made(_BatchMaker(self, epoch), start_batch):
            self.skipped.update(bad)
            if not sizes:
                name, reason = next(iter(bad.items()))
                raise InputError(
                    f"{self.dataset.name}: {len(bad)} images in a row cannot be read, first {name} ({reason})"
                )
            left = len(self.dataset) - len(self.skipped)
            if left < self.batch_size * self.world_size:
                name, reason = next(iter(self.skipped.items()))
                raise InputError(
                    f"{self.dataset.name}: {len(self.skipped)} of {len(self.dataset)} images cannot be read, first {name} ({reason}); "
                    f"the {left} that are left are fewer than one batch of {self.batch_size * self.world_size}"
                )
            names = [self.dataset.items[i].name for i in images]
            yield Views([view for views in sizes for view in self._normalised(views)], names)

    def _made(self, maker: "_BatchMaker", start_batch: int) -> Iterator[MadeBatch]:
        batches = range(start_batch, len(self))
        if self.workers == 0:
            return (maker[batch] for batch in batches)
        return iter(
            DataLoader(
                maker,
                batch_size=None,  # the maker makes whole batches
                sampler=batches,
                num_workers=min(self.workers, max(1, len(batches))),
                worker_init_fn=_start_worker,
                pin_memory=self.device.type == "cuda",
            )
        )

    def _normalised(self, views_VBHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n_views, n_images, height, width, _ = views_VBHWC.shape
        pixels = to_batch(views_VBHWC.flatten(0, 1), self.mean, self.std, self.device)
        return pixels.view(n_views, n_images, 3, height, width).unbind(0)


class _BatchMaker(TorchDataset):
    """Batch number to uint8 views; lives in the worker processes."""

    def __init__(self, loader: ViewLoader, epoch: int) -> None:
        self.dataset, self.spec, self.batch_size = loader.dataset, loader.spec, loader.batch_size
        self.seed, self.epoch = loader.seed, epoch
        self.rank, self.world_size = loader.rank, loader.world_size
        self.order = epoch_order(len(loader.dataset), loader.seed, epoch)
        self.bad: dict[int, str] = {}

    def __getitem__(self, batch: int) -> MadeBatch:
        first = (batch * self.world_size + self.rank) * self.batch_size
        spec, images, bad = self.spec, [], {}
        sizes = [(2, spec.global_px), (spec.n_local, spec.local_px)]
        out = [np.empty((n, self.batch_size, px, px, 3), np.uint8) for n, px in sizes if n]
        for slot in range(self.batch_size):
            index, image, unreadable = self._next_good(first + slot)
            bad.update(unreadable)
            if image is None:
                return [], [], unreadable
            images.append(index)
            views = make_views(image, spec, view_rng(self.seed, self.epoch, int(self.order[first + slot])))
            for k, view in enumerate(views):
                out[min(k // 2, 1)][k if k < 2 else k - 2, slot] = view
        return [torch.from_numpy(views) for views in out], images, bad

    def _next_good(self, position: int) -> tuple[int, np.ndarray | None, dict[str, str]]:
        """The first readable image at or after `position` of the order with its index, and what was passed over."""
        bad: dict[str, str] = {}
        for step in range(min(len(self.order), MAX_BAD_IN_A_ROW)):
            index = int(self.order[(position + step) % len(self.order)])
            if index not in self.bad:
                try:
                    return index, self.dataset.image(index), bad
                except InputError as error:
                    self.bad[index] = str(error)
            bad[self.dataset.items[index].name] = self.bad[index]
        return -1, None, bad


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n images, int64 [n]: a permutation of its own for each seed and epoch."""
    # the last word keeps this stream apart from those of the views, which are seeded by three words
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, 0, 1)))).permutation(n)


def _start_worker(_: int) -> None:
    # 0, not 1: in a forked process OpenCV would wait for the threads that its parent had (test_loader.py)
    cv2.setNumThreads(0)
