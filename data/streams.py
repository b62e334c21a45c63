"""Tar shards in, the samples of an epoch out, without listing the shards first: training begins after some thousand headers.

The order of an epoch follows from (seed, epoch) and the shards alone. The shards are shuffled; LANES of them are open at a
time and give one image each in turn; what they give is shuffled in blocks of BLOCK images. Every process walks the headers
of all shards (512 bytes an entry, some microseconds) and reads only the images that are its own, so no image's views
depend on how many processes or workers there are.

How many images there are is known exactly where the walk at the start reached the end, and else estimated from the shards'
sizes. An epoch has as many batches as that number gives: where there are fewer images it begins over, where there are more
the rest waits for the next order.
"""

import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.datasets import Dataset, find_shards, open_dataset, real_path
from data.decode import decode_image
from data.draws import Sample, Share, epoch_order
from data.errors import InputError
from data.listings import is_image_name, split_name
from data.members import check_entry_name, read_bytes
from data.packs import split_of_shard
from data.tars import walk_tar

LANES = 16
"""Shards that are read at a time, so that neighbours of one shard lie apart."""
BLOCK = 8192
"""Images that are shuffled together."""
STAND_INS = 64
"""Samples behind a slot that may take its place; where none of them can be read, the run ends."""
_HEAD_BYTES = 4096
"""Beginning of a shard that its fingerprint covers."""


class Stream:
    """The images of tar shards, in the order in which they come. Plain data: cheap to pass to worker processes."""

    def __init__(self, shards: Sequence[Path], name: str) -> None:
        self.name = name
        self.shards = sorted(shards)
        self.prefixes = _prefixes(self.shards)
        self.bytes = [_size(shard) for shard in self.shards]
        self.n_images, self.exact = self._count()

    def __len__(self) -> int:
        """Images, exactly or about; see the head of this file."""
        return self.n_images

    def _count(self) -> tuple[int, bool]:
        walk, n = Walk(self, 0, 0), 0
        while n < BLOCK and walk.next_sample():
            n += 1
        if n == 0:
            first = next(iter(walk.problems.values()), "no image in it")
            raise InputError(f"{self.name}: no images in {len(self.shards)} tar file(s), first: {first}")
        if n < BLOCK or walk.next_sample() is None:
            return n, True
        return round(n * sum(self.bytes) / max(walk.walked_bytes, 1)), False

    def fingerprint(self) -> str:
        """SHA-256 (hex) over each shard's name, size in bytes and the checksum of its first 4 KiB.

        What changes further inside a shard and leaves its size alone goes unnoticed: to notice it, all of it would have to be read.
        """
        digest = hashlib.sha256()
        for shard, prefix, size in zip(self.shards, self.prefixes, self.bytes, strict=True):
            try:
                with open(shard, "rb") as file:
                    mark = zlib.crc32(file.read(_HEAD_BYTES))
            except OSError as error:
                raise InputError(f"{shard}: cannot be read ({error.strerror or error})") from error
            digest.update(f"{prefix}\0{size}\0{mark}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def shares_images(self, other: Dataset) -> bool:
        """Whether a data set holds an image of one of these shards, whatever it is called."""
        shards = {real_path(str(shard)) for shard in self.shards}
        return any(real_path(other.member(i).path) in shards for i in range(len(other)))

    def examples(self, n: int) -> list[np.ndarray]:
        """Up to n images of different shards where there are so many, uint8 [H,W,3] each; unreadable ones are passed over."""
        images: list[np.ndarray] = []
        walk = Walk(self, 0, 0)
        for _ in range(10 * n):
            sample = walk.next_sample()
            if sample is None or len(images) == n:
                break
            try:
                images.append(decode_image(read_bytes(sample.member)))
            except InputError:
                continue
        return images


@dataclass
class Place:
    """Where a walk stands."""

    next_shard: int = 0
    """Place in the epoch's order of shards of the one that is opened next."""
    turn: int = 0
    """Lane that gives the next image."""
    lanes: list[list[int]] = field(default_factory=list)
    """Of each lane, the number of its shard and where in it the next header begins."""


class Walk:
    """The samples of one pass over the shards, before the blocks are shuffled."""

    def __init__(self, stream: Stream, seed: int, epoch: int, place: Place | None = None) -> None:
        self.stream = stream
        self.order = epoch_order(len(stream.shards), seed, epoch)
        place = place or Place()
        self.next_shard, self.turn = place.next_shard, place.turn
        self.lanes = [_Lane(stream, shard, at) for shard, at in place.lanes]
        self.problems: dict[str, str] = {}
        """Shards and entries that were passed over, and why."""
        self.walked_bytes = 0

    def place(self) -> Place:
        """From here the walk goes on."""
        return Place(self.next_shard, self.turn, [[lane.shard, lane.at] for lane in self.lanes])

    def next_sample(self) -> Sample | None:
        """The next image; None at the end."""
        while True:
            while len(self.lanes) < LANES and self.next_shard < len(self.order):
                self.lanes.append(_Lane(self.stream, int(self.order[self.next_shard])))
                self.next_shard += 1
            if not self.lanes:
                return None
            self.turn %= len(self.lanes)
            lane = self.lanes[self.turn]
            before = lane.at
            sample = lane.next_sample(self.problems)
            self.walked_bytes += lane.at - before
            if sample is not None:
                self.turn += 1
                return sample
            # the next shard takes the lane's place; without one the lanes close up
            del self.lanes[self.turn]
            if self.next_shard < len(self.order):
                self.lanes.insert(self.turn, _Lane(self.stream, int(self.order[self.next_shard])))
                self.next_shard += 1


class _Lane:
    """One shard under way."""

    def __init__(self, stream: Stream, shard: int, at: int = 0) -> None:
        self.path, self.prefix = stream.shards[shard], stream.prefixes[shard]
        self.shard, self.at = shard, at
        self._entries = walk_tar(self.path, at)

    def next_sample(self, problems: dict[str, str]) -> Sample | None:
        try:
            for entry in self._entries:
                self.at = entry.end
                key, is_image = image_key(entry.name)
                if not is_image:
                    continue
                try:
                    check_entry_name(self.path, entry.name)
                except InputError as error:
                    problems[f"{self.prefix}@{entry.member.offset}"] = str(error)
                    continue
                name = f"{self.prefix}/{key}"
                return Sample(name, _number(name), entry.member)
        except InputError as error:
            problems[f"{self.prefix}.tar"] = str(error)
        return None


def image_key(name: str) -> tuple[str, bool]:
    """Key of a WebDataset entry, and whether it is its sample's image: `a/000.jpg` is that of `a/000`, `a/000.masks.png` none."""
    folder, slash, last = name.rpartition("/")
    stem, _, part = last.partition(".")
    return f"{folder}{slash}{stem}".removeprefix("./"), "." not in part and is_image_name(last)


class StreamDraws:
    """One epoch of a `Stream`. A task is this process's part of a batch and its stand-ins, as samples."""

    def __init__(
        self, stream: Stream, share: Share, seed: int, epoch: int, problems: dict[str, str], places: Path | None = None
    ) -> None:
        """`problems` takes what is passed over on the way; `places` is a file in which the walk leaves marks, to resume at once."""
        self._stream, self._seed, self._epoch, self._problems, self._places = stream, seed, epoch, problems, places
        self.share, self.n_batches = share, len(stream) // share.whole

    def __getstate__(self) -> dict[str, object]:
        return {}  # a worker needs none of it

    def tasks(self, first_batch: int) -> Iterator[list[Sample]]:
        """The batches from `first_batch` on."""
        share = self.share
        marks = _Marks(self._places, self._seed, self._epoch, writes=share.rank == 0)
        samples = _endless(self._stream, self._seed, self._epoch, self._problems, marks, first_batch * share.whole)
        ahead: deque[Sample] = deque()
        for _ in range(first_batch, self.n_batches):
            ahead.extend(islice(samples, share.whole + STAND_INS - len(ahead)))
            first = share.rank * share.batch_size
            yield list(islice(ahead, first, first + share.batch_size + STAND_INS))
            for _ in range(share.whole):
                ahead.popleft()

    @staticmethod
    def candidates(task: list[Sample], slot: int) -> Iterator[Sample]:
        """The sample for a slot, and behind it those that stand in for it."""
        return iter(task[slot : slot + 1 + STAND_INS])


def _endless(
    stream: Stream, seed: int, epoch: int, problems: dict[str, str], marks: "_Marks", first: int
) -> Iterator[Sample]:
    """The samples of an epoch from number `first` on; after the last comes the first again."""
    block, place = marks.before(first // BLOCK)
    skip = first - block * BLOCK
    while True:
        walk = Walk(stream, seed, epoch, place)
        walk.problems = problems
        rest = iter(walk.next_sample, None)
        place, samples = walk.place(), list(islice(rest, BLOCK))
        while samples:
            marks.leave(block, place)
            place = walk.place()
            upcoming: list[Sample] = []
            for k in _block_order(len(samples), seed, epoch, block)[skip:]:
                upcoming += islice(rest, 1)  # the next block on the way, so that there is no pause where it begins
                yield samples[k]
            upcoming += islice(rest, BLOCK - len(upcoming))
            skip = max(skip - len(samples), 0)
            samples, block = upcoming, block + 1
        if block == 0:
            raise InputError(f"{stream.name}: no images are left in its {len(stream.shards)} tar file(s)")
        block, place = 0, Place()


class _Marks:
    """Where the blocks of an epoch begin, kept in a file of JSON lines. It saves a resumed run the walk up to there, and nothing else."""

    def __init__(self, path: Path | None, seed: int, epoch: int, writes: bool) -> None:
        self.path, self.seed, self.epoch, self.writes = path, seed, epoch, writes and path is not None
        kept = [line for line in self._lines() if line["seed"] == seed and line["epoch"] in (epoch - 1, epoch)]
        self.places = {
            line["block"]: Place(line["next_shard"], line["turn"], line["lanes"])
            for line in kept
            if line["epoch"] == epoch
        }
        if path is not None and writes:
            with suppress(OSError):  # a full disk costs the short cut only
                scratch = path.with_name(f".{path.name}.part")
                scratch.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
                os.replace(scratch, path)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.is_file():
            return
        for text in self.path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                Place(line["next_shard"], line["turn"], [[int(shard), int(at)] for shard, at in line["lanes"]])
                yield {name: line[name] for name in ("seed", "epoch", "block", "next_shard", "turn", "lanes")}
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a crash

    def before(self, block: int) -> tuple[int, Place]:
        """The last block at or before this one whose beginning is known, and where it is."""
        known = max((mark for mark in self.places if mark <= block), default=None)
        return (0, Place()) if known is None else (known, self.places[known])

    def leave(self, block: int, place: Place) -> None:
        """Remember where a block begins."""
        if self.path is None or not self.writes or block in self.places:
            return
        self.places[block] = place
        line = {"seed": self.seed, "epoch": self.epoch, "block": block, **asdict(place)}
        with suppress(OSError), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _block_order(n: int, seed: int, epoch: int, block: int) -> np.ndarray:
    # five words keep this apart from the orders of epochs (four) and the views (three)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, block, 0, 2)))).permutation(n)


def _number(name: str) -> int:
    """64 bits of a name: the sample's own number, wherever and in whatever order it is met."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _prefixes(shards: Sequence[Path]) -> list[str]:
    """A name for each shard: its own, with as many of its folders as tell all of them apart."""
    for parts in range(1, 1 + max(len(shard.parts) for shard in shards)):
        names = ["/".join(shard.with_suffix("").parts[-parts:]) for shard in shards]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{shards[0]}: named twice")


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError as error:
        raise InputError(f"{shard}: cannot be read ({error.strerror or error})") from error


def open_images(data: str | Path, split: str | None = None) -> Dataset | Stream:
    """The images to train on: tar shards as a stream, any other form as `open_dataset` has it. Raises InputError.

    Of shards, a split is that in their names (`train-000.tar`, `train/000.tar`); where they name none, their samples are
    listed first, to see what those say.
    """
    shards = find_shards(data)
    if not shards:
        return open_dataset(data, split)
    if split is not None:
        named = [split_of_shard(shard) for shard in shards]
        if None in named or split_name(split) not in named:
            return open_dataset(data, split)
        shards = [shard for shard, of in zip(shards, named, strict=True) if of == split_name(split)]
    return Stream(shards, str(data))
