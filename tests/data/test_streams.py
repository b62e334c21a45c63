"""Tar shards as a stream: the order of an epoch, how it is shared out and resumed, and what becomes of damage."""

import gzip
import io
import itertools
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data.streams
from data.crops import CropSpec, view_rng
from data.datasets import Dataset, open_dataset
from data.decode import decode_image
from data.draws import Share
from data.errors import InputError
from data.loader import ViewLoader
from data.members import read_bytes
from data.streams import Stream, StreamDraws, image_key, open_images
from data.tars import walk_tar
from data.views import make_views, to_batch
from tests.data.pictures import encode, noise

SPEC = CropSpec(global_px=16, local_px=8, n_local=2)
SHARDS, EACH = 5, 7


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(content))
    return path


def picture(shard: int, k: int) -> bytes:
    return encode(noise(20 + k, 26 - k, 100 * shard + k), "PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        files: dict[str, bytes] = {}
        for k in range(EACH):
            files |= {
                f"{k:03d}.png": picture(shard, k),
                f"{k:03d}.cls": b"3",
                f"{k:03d}.masks.png": b"no view is made of it",
            }
        write_tar(tmp_path / f"s-{shard}.tar", files)
    return tmp_path


def stream_of(folder: Path) -> Stream:
    stream = open_images(folder)
    assert isinstance(stream, Stream)
    return stream


def names(stream: Stream, epoch: int = 0, first: int = 0, batch: int = 1, places: Path | None = None) -> list[str]:
    draws = StreamDraws(stream, Share(batch, 0, 1), 3, epoch, {}, places)
    return [sample.name for task in draws.tasks(first) for sample in task[:batch]]


def batches(folder: Path, epoch: int = 0, start: int = 0, batch: int = 4, **options: object) -> list[torch.Tensor]:
    """Each batch with its views one behind the other, flat."""
    loader = ViewLoader(stream_of(folder), SPEC, batch, 3, **options)  # type: ignore[arg-type]
    return [torch.cat([view.flatten(1) for view in views], 1) for views in loader.epoch(epoch, start)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- the order --------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(folder: Path) -> None:
    stream = stream_of(folder)
    assert (len(stream), stream.exact) == (SHARDS * EACH, True)
    wanted = {f"s-{shard}/{k:03d}" for shard in range(SHARDS) for k in range(EACH)}
    orders = [names(stream, epoch) for epoch in range(3)]
    assert [set(order) for order in orders] == [wanted] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert names(stream, 1) == orders[1]


def test_small_blocks_and_few_lanes_lose_nothing_either(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.streams, "LANES", 2)
    stream = stream_of(folder)
    for block in (1, 4, 10, 35):
        monkeypatch.setattr(data.streams, "BLOCK", block)
        order = names(stream)
        assert len(order) == len(set(order)) == SHARDS * EACH


def test_neighbours_of_one_shard_lie_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.streams, "BLOCK", 1)
    shards = [name.split("/")[0] for name in names(stream_of(folder))]
    assert all(one != other for one, other in itertools.pairwise(shards))


def test_a_view_depends_on_seed_epoch_and_the_images_name_alone(folder: Path) -> None:
    stream = stream_of(folder)
    draws = StreamDraws(stream, Share(1, 0, 1), 3, 2, {})
    found = batches(folder, epoch=2, batch=1)
    for task, batch in zip(draws.tasks(0), found, strict=True):
        image = decode_image(read_bytes(task[0].member))
        views = make_views(image, SPEC, view_rng(3, 2, task[0].key))
        assert torch.equal(batch[0], torch.cat([to_batch([view]).flatten() for view in views]))
    keys = {task[0].name: task[0].key for task in draws.tasks(0)}
    # the number of an image stays when others come and go
    (folder / "s-0.tar").unlink()
    fewer = {task[0].name: task[0].key for task in StreamDraws(stream_of(folder), Share(1, 0, 1), 9, 9, {}).tasks(0)}
    assert fewer.items() < keys.items()


# --- sharing out and resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["workers", "device"])
def test_any_number_of_workers_and_processes_makes_the_same_batches(folder: Path, views: str) -> None:
    write_tar(folder / "s-9.tar", {"a.png": b"", "b.png": b"no picture", "c.png": picture(9, 2)})
    alone = batches(folder, views=views)
    assert_same(batches(folder, views=views, workers=2), alone)
    pair = [batches(folder, batch=2, views=views, rank=rank, world_size=2, workers=rank) for rank in (0, 1)]
    assert_same([torch.cat(both) for both in zip(*pair, strict=True)], alone)


@pytest.mark.parametrize("block", [3, 8, 100])
def test_an_epoch_is_resumed_at_any_batch_with_and_without_its_marks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    stream, places = stream_of(folder), tmp_path / "places.jsonl"
    monkeypatch.setattr(data.streams, "BLOCK", block)
    monkeypatch.setattr(data.streams, "LANES", 3)
    whole = names(stream, 1, batch=4, places=places)
    assert places.read_text().count("\n") == -(-SHARDS * EACH // block)
    with open(places, "a") as file:
        file.write('{"seed": 3, "epo')  # a crash
    for first in range(9):
        assert names(stream, 1, first, batch=4, places=places) == whole[4 * first :]
        assert names(stream, 1, first, batch=4) == whole[4 * first :]


def test_marks_save_the_walk_up_to_where_a_run_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, places = stream_of(folder), tmp_path / "places.jsonl"
    monkeypatch.setattr(data.streams, "BLOCK", 5)
    monkeypatch.setattr(data.streams, "STAND_INS", 0)
    names(stream, places=places)
    walked: list[int] = []

    def counting(path: Path, start: int = 0):  # type: ignore[no-untyped-def]
        for entry in walk_tar(path, start):
            walked.append(1)
            yield entry

    monkeypatch.setattr(data.streams, "walk_tar", counting)
    assert len(names(stream, first=30, places=places)) == 5
    assert len(walked) <= 3 * 5 + data.streams.LANES
    marked = len(walked)
    names(stream, first=30)
    assert len(walked) - marked >= 3 * 30


def test_where_there_are_fewer_images_than_estimated_the_epoch_begins_over(folder: Path) -> None:
    stream = stream_of(folder)
    stream.n_images, stream.exact = 40, False
    order = names(stream, batch=4)
    assert len(order) == 40
    assert order[35:] == order[:5]
    assert names(stream, first=9, batch=4) == order[36:]


# --- starting at once -------------------------------------------------------------------------------------------------


def test_a_run_begins_after_some_thousand_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(20, 60):
        write_tar(folder / f"s-{shard}.tar", {f"{k}.png": picture(shard, 1) for k in range(20)})
    walked: list[int] = []

    def counting(path: Path, start: int = 0):  # type: ignore[no-untyped-def]
        for entry in walk_tar(path, start):
            walked.append(1)
            yield entry

    monkeypatch.setattr(data.streams, "walk_tar", counting)
    monkeypatch.setattr(data.streams, "BLOCK", 64)
    monkeypatch.setattr(data.streams, "STAND_INS", 4)
    stream = stream_of(folder)
    assert not stream.exact
    assert abs(len(stream) - 835) < 120
    next(iter(ViewLoader(stream, SPEC, 4).epoch(0)))
    assert len(walked) < 450, "of 905 entries"


def test_the_fingerprint_covers_names_sizes_and_first_bytes(folder: Path) -> None:
    before = stream_of(folder).fingerprint()
    assert stream_of(folder).fingerprint() == before
    shard = folder / "s-1.tar"
    content = shard.read_bytes()
    for change in (content + bytes(10240), bytes([content[0] ^ 1]) + content[1:]):
        shard.write_bytes(change)
        assert Stream([*stream_of(folder).shards], "x").fingerprint() != before
    shard.write_bytes(content)
    assert stream_of(folder).fingerprint() == before
    shard.rename(folder / "t-1.tar")
    assert stream_of(folder).fingerprint() != before


def test_examples_are_of_different_shards(folder: Path) -> None:
    write_tar(folder / "s-9.tar", {"a.png": b"no picture"})
    assert len(stream_of(folder).examples(5)) == 5
    assert len(stream_of(folder).examples(1000)) == SHARDS * EACH


def test_workers_are_sent_no_stream(folder: Path) -> None:
    draws = StreamDraws(stream_of(folder), Share(2, 0, 1), 0, 0, {})
    assert len(pickle.dumps(draws)) < 200


# --- damage -----------------------------------------------------------------------------------------------------------


def test_corrupt_entries_are_replaced_and_listed(folder: Path) -> None:
    write_tar(folder / "s-9.tar", {"a.png": b"no picture", "b.png": picture(9, 2)[:-40], "../c.png": picture(9, 2)})
    loader = ViewLoader(stream_of(folder), SPEC, 4, 3)
    found = list(loader.epoch(0))
    assert len(found) == (SHARDS * EACH + 2) // 4
    assert {"s-9/a", "s-9/b"} < set(loader.skipped)
    assert any("climbs out" in reason for reason in loader.skipped.values())
    assert len(loader.skipped) == 3


def test_of_a_shard_that_was_cut_the_sound_part_is_used_and_the_rest_listed(folder: Path) -> None:
    shard = folder / "s-2.tar"
    content = shard.read_bytes()
    for cut in (len(content) // 2, 700, 100):
        shard.write_bytes(content[:cut])
        loader = ViewLoader(stream_of(folder), SPEC, 4, 3)
        list(loader.epoch(0))
        (listed,) = [reason for name, reason in loader.skipped.items() if name == "s-2.tar"]
        assert "damaged at byte" in listed
        assert "passed over" in listed


def test_a_damaged_header_ends_its_shard_alone(folder: Path) -> None:
    shard = folder / "s-2.tar"
    content = bytearray(shard.read_bytes())
    at = [entry.end for entry in walk_tar(shard)][4]
    content[at : at + 512] = b"x" * 512
    shard.write_bytes(content)
    assert len(stream_of(folder)) == (SHARDS - 1) * EACH + 2


def test_a_compressed_shard_and_an_empty_one_are_listed(folder: Path) -> None:
    (folder / "s-7.tar").write_bytes(gzip.compress((folder / "s-1.tar").read_bytes()))
    (folder / "s-8.tar").write_bytes(b"")
    loader = ViewLoader(stream_of(folder), SPEC, 4, 3)
    list(loader.epoch(0))
    assert "unpack it first" in loader.skipped["s-7.tar"]
    assert "empty" in loader.skipped["s-8.tar"]


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_of_nothing_but_corrupt_images_are_an_error(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "a.tar", {f"{k}.jpg": b"no picture" for k in range(90)})
    with pytest.raises(InputError, match=r"65 images in a row cannot be read, first a/\d+ "):
        batches(tmp_path, workers=workers)


@pytest.mark.parametrize(
    ("content", "words"), [(b"x" * 2000, "damaged at byte 0"), (bytes(10240), "no image in it"), (b"", "empty")]
)
def test_tar_files_without_an_image_are_an_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=rf"no images in 1 tar file.*{words}"):
        open_images(tmp_path)


# --- which forms are streamed -----------------------------------------------------------------------------------------


def test_shards_alone_are_streamed_and_splits_are_taken_from_their_names(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / "by" / split / "0.tar", {"a.png": picture(0, 0), "b.png": picture(0, 1)})
    stream = open_images(tmp_path / "by", "train")
    assert isinstance(stream, Stream)
    assert stream.prefixes == ["0"]
    assert sorted(names(stream_of(tmp_path / "by"))) == ["train/0/a", "train/0/b", "val/0/a", "val/0/b"]
    assert isinstance(open_images(f"{folder}/s-[01].tar,{folder}/s-2.tar"), Stream)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.png").write_bytes(picture(1, 1))
    assert isinstance(open_images(f"{folder},{tmp_path / 'plain'}"), Dataset)
    assert isinstance(open_images(tmp_path / "plain"), Dataset)


def test_splits_that_only_the_samples_name_are_looked_up_in_a_list(tmp_path: Path) -> None:
    meta = [json.dumps({"split": split}).encode() for split in ("train", "val")]
    write_tar(
        tmp_path / "a.tar", {"0.png": picture(0, 0), "0.json": meta[0], "1.png": picture(0, 1), "1.json": meta[1]}
    )
    dataset = open_images(tmp_path, "val")
    assert isinstance(dataset, Dataset)
    assert [item.name for item in dataset.items] == ["a/1"]


@pytest.mark.parametrize(
    ("name", "key", "is_image"),
    [
        ("000.jpg", "000", True),
        ("./a/b.PNG", "a/b", True),
        ("a.b/c.webp", "a.b/c", True),
        ("000.masks.png", "000", False),
        ("000.cls", "000", False),
        (".hidden.jpg", "", False),
        ("README", "README", False),
    ],
)
def test_the_image_of_a_sample_has_nothing_but_its_suffix_behind_the_key(name: str, key: str, is_image: bool) -> None:
    assert image_key(name)[1] == is_image
    assert not is_image or image_key(name)[0] == key


# --- the archive itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_is_read_as_tarfile_reads_it(tmp_path: Path, form: int) -> None:
    deep = "d" * 90 + "/" + "e" * 90 + ".jpg"
    files = {"a.jpg": b"1" * 700, "b/c.cls": b"", deep: b"2" * 512, "z.png": b"3"}
    if form != tarfile.USTAR_FORMAT:
        files |= {"ü" * 80 + "/" + "x" * 200 + ".jpg": b"4" * 513}
    path = write_tar(tmp_path / "a.tar", files, form)
    with tarfile.open(path, "a", format=form) as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.jpg"), (tarfile.FIFOTYPE, "pipe.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("last.jpg"))
    entries = list(walk_tar(path))
    with tarfile.open(path) as archive:
        wanted = [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    assert [(entry.name, entry.member.offset, entry.member.size) for entry in entries] == wanted
    assert [read_bytes(entry.member) for entry in entries] == [*files.values(), b""]
    for k, entry in enumerate(entries):
        assert list(walk_tar(path, entry.end)) == entries[k + 1 :]


def test_any_cut_and_any_flipped_byte_ends_in_one_line(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{'n' * 120}{k}.jpg": b"1" * 600 for k in range(3)})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(content[: rng.integers(1, len(content))])
        for at in rng.integers(0, len(broken), 3):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        error = None
        try:
            assert len(list(walk_tar(path))) <= 3
        except InputError as raised:
            error = str(raised)
        assert error is None or re.fullmatch(r".*damaged at byte .*", error)


def test_an_index_and_a_stream_name_images_alike(folder: Path) -> None:
    listed = open_dataset(f"{folder}/s-[12].tar")
    assert sorted(item.name for item in listed.items) == sorted(names(open_images(f"{folder}/s-[12].tar")))  # type: ignore[arg-type]
