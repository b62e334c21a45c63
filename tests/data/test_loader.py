"""Batches of views: the same for any number of workers, from any batch on, whatever lies in the folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data.draws
from data import loader
from data.crops import CropSpec, view_rng
from data.datasets import open_dataset
from data.draws import epoch_order
from data.errors import InputError
from data.loader import ViewLoader, Views
from data.views import make_views, to_batch
from tests.data.pictures import encode, noise

SPEC = CropSpec(global_px=16, local_px=8, n_local=2)
N_IMAGES = 11


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(N_IMAGES):
        (tmp_path / f"{k:02d}.png").write_bytes(encode(noise(20 + k, 30 - k, k), "PNG"))
    return tmp_path


def batches(loader: ViewLoader, epoch: int = 0, start: int = 0) -> list[Views]:
    return list(loader.epoch(epoch, start))


def assert_same(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(wanted)
    for views, others in zip(found, wanted, strict=True):
        assert all(torch.equal(view, other) for view, other in zip(views, others, strict=True))


def test_a_batch_holds_the_views_of_the_images_in_the_epochs_order(folder: Path) -> None:
    dataset = open_dataset(folder)
    order = epoch_order(N_IMAGES, 5, 2)
    found = batches(ViewLoader(dataset, SPEC, 3, seed=5), epoch=2)
    assert len(found) == N_IMAGES // 3
    for number, views in enumerate(found):
        assert [tuple(view.shape) for view in views] == [(3, 3, 16, 16)] * 2 + [(3, 3, 8, 8)] * 2
        images = [int(i) for i in order[3 * number : 3 * number + 3]]
        made = [make_views(dataset.image(i), SPEC, view_rng(5, 2, i)) for i in images]
        for k, view in enumerate(views):
            assert torch.equal(view, to_batch([image[k] for image in made]))


def test_any_number_of_workers_makes_the_same_batches(folder: Path) -> None:
    (folder / "04.png").write_bytes(b"")
    dataset = open_dataset(folder)
    loaders = [ViewLoader(dataset, SPEC, 2, seed=1, workers=workers) for workers in (0, 1, 2)]
    found = [batches(loader, epoch=3) for loader in loaders]
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert [set(loader.skipped) for loader in loaders] == [{"04.png"}] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_resumed_at_any_batch(folder: Path, workers: int) -> None:
    dataset = open_dataset(folder)
    whole = batches(ViewLoader(dataset, SPEC, 2, seed=1), epoch=1)
    for start in range(len(whole) + 1) if workers == 0 else (3,):
        assert_same(batches(ViewLoader(dataset, SPEC, 2, seed=1, workers=workers), 1, start), whole[start:])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_a_worker_that_is_just_starting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The trainer saves first, and needs its workers for that; this one is signalled before it has begun to pass signals over."""
    set_up = loader._start_worker

    def signalled(worker: int) -> None:
        os.kill(os.getpid(), number)
        set_up(worker)

    monkeypatch.setattr(loader, "_start_worker", signalled)
    dataset = open_dataset(folder)
    assert_same(batches(ViewLoader(dataset, SPEC, 2, workers=1)), batches(ViewLoader(dataset, SPEC, 2)))
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "they reach the trainer as before"


ENDS_AMID_AN_EPOCH = """
import multiprocessing, os, signal, sys
from data.crops import CropSpec
from data.datasets import open_dataset
from data.loader import ViewLoader

dataset = open_dataset(sys.argv[1])
epoch = ViewLoader(dataset, CropSpec(global_px=16, local_px=8, n_local=2), 2, workers=2).epoch(0, 0)
next(epoch)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
sys.exit(3)
"""


def test_a_worker_that_hears_nothing_any_more_does_not_keep_the_process_that_ends(folder: Path) -> None:
    """As one whose queue broke when another worker was killed."""
    command = [sys.executable, "-c", ENDS_AMID_AN_EPOCH, str(folder)]
    root = str(Path(loader.__file__).parents[1])
    assert subprocess.run(command, cwd=root, timeout=120).returncode == 3


def test_a_batch_beyond_the_epoch_is_refused(folder: Path) -> None:
    loader = ViewLoader(open_dataset(folder), SPEC, 2)
    for start in (-1, 6):
        with pytest.raises(InputError, match=rf"batch {start} of an epoch of 5 batches; was the data set changed"):
            batches(loader, 0, start)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(20)) for order in orders)
    np.testing.assert_array_equal(epoch_order(20, 1, 2), epoch_order(20, 1, 2))


def test_epochs_alter_an_image_differently(folder: Path) -> None:
    loader = ViewLoader(open_dataset(folder), SPEC, N_IMAGES)
    (first,), (again,), (second,) = batches(loader, 0), batches(loader, 0), batches(loader, 1)
    assert torch.equal(first[0], again[0])
    assert {view.numpy().tobytes() for view in first[0]}.isdisjoint(view.numpy().tobytes() for view in second[0])


def test_corrupt_images_are_replaced_by_the_next_good_one_and_listed(folder: Path) -> None:
    (folder / "03.png").write_text("no picture")
    (folder / "07.png").write_bytes(encode(noise(20, 20), "PNG")[:300])
    dataset = open_dataset(folder)
    loader = ViewLoader(dataset, SPEC, 1, seed=2)
    found = batches(loader)
    assert len(found) == N_IMAGES, "batches keep their number and size"
    assert set(loader.skipped) == {"03.png", "07.png"}
    assert "no image" in loader.skipped["03.png"]
    assert "ends early" in loader.skipped["07.png"]
    order = [int(i) for i in epoch_order(N_IMAGES, 2, 0)]
    for position, index in enumerate(order):
        used = index
        for step in range(N_IMAGES):
            used = order[(position + step) % N_IMAGES]
            if used not in (3, 7):
                break
        # the views are drawn for the place in the order, so a repaired file changes no other image's views
        wanted = make_views(dataset.image(used), SPEC, view_rng(2, 0, index))
        assert torch.equal(found[position][0], to_batch([wanted[0]]))
        assert found[position].names == (dataset.items[used].name,), "the image shown, not the one in its place"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_nothing_but_corrupt_images_is_an_error(folder: Path, workers: int) -> None:
    for path in folder.iterdir():
        path.write_text("no picture")
    with pytest.raises(InputError, match=rf"{N_IMAGES} images in a row cannot be read, first \d\d\.png"):
        batches(ViewLoader(open_dataset(folder), SPEC, 2, workers=workers))


def test_too_few_readable_images_for_one_batch_are_an_error(folder: Path) -> None:
    """Or every batch would hold one image several times, and teach nothing."""
    for path in sorted(folder.iterdir())[1:]:
        path.write_text("no picture")
    with pytest.raises(InputError, match=r"the 1 that are left are fewer than one batch of 2"):
        batches(ViewLoader(open_dataset(folder), SPEC, 2))


def test_many_corrupt_images_in_a_row_end_the_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.draws, "MAX_BAD_IN_A_ROW", 3)
    for index in epoch_order(N_IMAGES, 0, 0)[:4]:
        (folder / f"{index:02d}.png").write_text("no picture")
    with pytest.raises(InputError, match="3 images in a row cannot be read"):
        batches(ViewLoader(open_dataset(folder), SPEC, 1))


def test_ranks_share_an_epoch_without_overlap(folder: Path) -> None:
    dataset = open_dataset(folder)
    whole = batches(ViewLoader(dataset, SPEC, 4, seed=3))
    ranks = [batches(ViewLoader(dataset, SPEC, 2, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    joined = [[torch.cat(pair) for pair in zip(a, b, strict=True)] for a, b in zip(*ranks, strict=True)]
    assert_same(joined, whole)


def test_no_local_views_and_another_normalisation(folder: Path) -> None:
    spec = CropSpec(global_px=16, local_px=8, n_local=0)
    dataset = open_dataset(folder)
    (plain, *_) = batches(ViewLoader(dataset, spec, 2))
    (other, *_) = batches(ViewLoader(dataset, spec, 2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert [tuple(view.shape) for view in plain] == [(2, 3, 16, 16)] * 2
    assert 0 <= float(other[0].min()) < float(other[0].max()) <= 1
    assert not torch.equal(plain[0], other[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 2, "workers": -1}, "-1 workers"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 12}, "11 images are fewer than one batch of 12"),
        ({"batch_size": 6, "world_size": 2}, "11 images are fewer than one batch of 12"),
        ({"batch_size": 2, "seed": -1}, "seed -1"),
    ],
    ids=str,
)
def test_what_makes_no_batches_is_refused(folder: Path, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ViewLoader(open_dataset(folder), SPEC, **options)
