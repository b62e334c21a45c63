"""A data set in, batches of views out, the same ones whatever number of workers makes them.

Which images a batch holds follows from (seed, epoch, batch), and how they are altered from (seed, epoch, image), so a
run that is resumed at any batch, with more workers or fewer, sees what it would have seen. A file that cannot be read
is replaced by the next good one in the epoch's order and remembered in `skipped`; batches keep their size.

Workers either make the views (`workers`: OpenCV, uint8), or only decode, and the views are made where the network is (`device`).
"""

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data.crops import CropSpec, view_rng
from data.datasets import Dataset
from data.device_views import device_views
from data.draws import IndexedDraws, Share
from data.errors import InputError
from data.members import read_bytes
from data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from data.streams import Stream, StreamDraws
from data.views import carry_out, decode_and_plan, to_batch

STOPPING = (signal.SIGINT, signal.SIGTERM)
Maker = Literal["workers", "device"]
"""Who makes the views."""


# Axes: V views of one size, B images, h w pixels.
class Views(list[torch.Tensor]):
    """The views of a batch, float32 [B,3,h,w] each, and the names of its images."""

    def __init__(self, views: Iterable[torch.Tensor], names: Sequence[str]) -> None:
        super().__init__(views)
        self.names = tuple(names)


class _Made(NamedTuple):
    """What comes from a worker; nothing but `bad` where an image could not be replaced."""

    views: list[torch.Tensor]
    """uint8 [V,B,h,w,3], one tensor a size; or, for the device, one tensor of all decoded images one behind the other."""
    names: list[str]
    """Of the images shown."""
    bad: dict[str, str]
    """Names of unreadable images and why."""
    shapes: list[tuple[int, ...]]
    """Of the decoded images."""
    plans: np.ndarray | None
    """Of their views, PLAN [B,V]."""


class ViewLoader:
    """Batches of multi-crop views. `skipped` grows while batches are taken: name of an unreadable image to reason."""

    def __init__(
        self,
        dataset: Dataset | Stream,
        spec: CropSpec,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        *,
        views: Maker = "workers",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        places: Path | None = None,
    ) -> None:
        """`batch_size` images a batch on each of `world_size` ranks; `workers` processes, 0 to work in this one.

        `places` is a file for the marks by which a stream resumes without walking its shards again.
        """
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
        self.views, self.mean, self.std, self.device = views, tuple(mean), tuple(std), torch.device(device)
        self.share, self.places = Share(batch_size, rank, world_size), places
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches an epoch; what is left over below a full batch waits for the next epoch's order."""
        return len(self.dataset) // self.share.whole

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Views]:
        """Batches `start_batch` and on of one epoch: each a list of float32 [B,3,h,w], one a view, global ones first.

        Raises InputError when too many files in a row are unreadable or too few are left for a batch of different images, RuntimeError
        when a worker process dies.
        """
        if not 0 <= start_batch <= len(self):
            raise InputError(f"batch {start_batch} of an epoch of {len(self)} batches; was the data set changed?")
        unreadable: dict[str, str] = {}
        for made in self._made(epoch, start_batch):
            self.skipped.update(made.bad)
            if not made.views:
                name, reason = next(iter(made.bad.items()))
                raise InputError(
                    f"{self.dataset.name}: {len(made.bad)} images in a row cannot be read, first {name} ({reason})"
                )
            unreadable |= made.bad
            left = len(self.dataset) - len(unreadable)
            if left < self.share.whole:
                name, reason = next(iter(unreadable.items()))
                raise InputError(
                    f"{self.dataset.name}: {len(unreadable)} of {len(self.dataset)} images cannot be read, first {name} ({reason}); "
                    f"the {left} that are left are fewer than one batch of {self.share.whole}"
                )
            views = self._views_on_device(made) if made.plans is not None else self._normalised(made.views)
            yield Views(views, made.names)

    def _made(self, epoch: int, start_batch: int) -> Iterator[_Made]:
        draws: IndexedDraws | StreamDraws
        if isinstance(self.dataset, Stream):
            draws = StreamDraws(self.dataset, self.share, self.seed, epoch, self.skipped, self.places)
        else:
            draws = IndexedDraws(self.dataset, self.share, self.seed, epoch)
        maker = _BatchMaker(draws, self.spec, self.batch_size, self.seed, epoch, self.views)
        if self.workers == 0:
            return (maker[task] for task in draws.tasks(start_batch))
        batches = DataLoader(
            maker,
            batch_size=None,  # the maker makes whole batches
            sampler=draws.tasks(start_batch),
            collate_fn=_as_it_is,
            num_workers=min(self.workers, max(1, len(self) - start_batch)),
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
        )
        _kill_left_workers_at_exit()
        with _signals_held():
            return iter(batches)

    def _normalised(self, sizes: list[torch.Tensor]) -> list[torch.Tensor]:
        views: list[torch.Tensor] = []
        for views_VBHWC in sizes:
            n_views, n_images, height, width, _ = views_VBHWC.shape
            pixels = to_batch(views_VBHWC.flatten(0, 1), self.mean, self.std, self.device)
            views += pixels.view(n_views, n_images, 3, height, width).unbind(0)
        return views

    def _views_on_device(self, made: _Made) -> list[torch.Tensor]:
        (pixels,) = made.views
        parts = pixels.to(self.device, non_blocking=True).split([int(np.prod(shape)) for shape in made.shapes])
        images = [part.view(shape) for part, shape in zip(parts, made.shapes, strict=True)]
        assert made.plans is not None
        return device_views(images, made.plans, self.spec, self.mean, self.std)


class _BatchMaker(TorchDataset):
    """Task to batch; lives in the worker processes."""

    def __init__(
        self, draws: IndexedDraws | StreamDraws, spec: CropSpec, batch_size: int, seed: int, epoch: int, views: Maker
    ) -> None:
        self.draws, self.spec, self.batch_size, self.views = draws, spec, batch_size, views
        self.seed, self.epoch = seed, epoch
        self.bad: dict[str, str] = {}

    def __getitem__(self, task: Any) -> _Made:
        spec, bad = self.spec, {}
        sizes = [(2, spec.global_px), (spec.n_local, spec.local_px)]
        out = [np.empty((n, self.batch_size, px, px, 3), np.uint8) for n, px in sizes if n and self.views == "workers"]
        names, images, plans = [], [], []
        for slot in range(self.batch_size):
            found, unreadable = self._next_good(task, slot)
            bad.update(unreadable)
            if found is None:
                return _Made([], [], unreadable, [], None)
            name, image, plan = found
            names.append(name)
            if self.views == "device":
                images.append(torch.from_numpy(image))
                plans.append(plan)
                continue
            for k, view in enumerate(carry_out(image, plan, spec)):
                out[min(k // 2, 1)][k if k < 2 else k - 2, slot] = view
        if self.views == "device":
            pixels = torch.cat([image.flatten() for image in images])
            return _Made([pixels], names, bad, [tuple(image.shape) for image in images], np.stack(plans))
        return _Made([torch.from_numpy(views) for views in out], names, bad, [], None)

    def _next_good(self, task: Any, slot: int) -> tuple[tuple[str, np.ndarray, np.ndarray] | None, dict[str, str]]:
        """The first readable image for a slot with its name and the plan of its views, and what was passed over.

        The views are drawn for the slot, whichever image stands in, so that a repaired file changes no other image's views.
        """
        bad: dict[str, str] = {}
        key = None
        for sample in self.draws.candidates(task, slot):
            key = sample.key if key is None else key
            if sample.name not in self.bad:
                try:
                    rng = view_rng(self.seed, self.epoch, key)
                    image, plan = decode_and_plan(read_bytes(sample.member), self.spec, rng)
                    return (sample.name, image, plan), bad
                except InputError as error:
                    self.bad[sample.name] = str(error)
            bad[sample.name] = self.bad[sample.name]
        return None, bad


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within it signals that stop a run wait, and for good in the workers that are started: they would end one that is not yet set up
    to pass over them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _kill_left_workers_at_exit() -> None:
    """Python ends such processes by SIGTERM when it exits, and then waits for them: ours pass over it, and one whose queue broke when
    another worker was killed would be waited for without end."""
    atexit.register(_kill_left_workers)


def _kill_left_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _as_it_is(made: Any) -> Any:
    return made


def _start_worker(_: int) -> None:
    # A terminal, `timeout`, systemd or SLURM signal the whole group: the trainer saves first, and needs its workers for that.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # 0, not 1: in a forked process OpenCV would wait for the threads that its parent had (test_loader.py)
    cv2.setNumThreads(0)
