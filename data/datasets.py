"""Any data set named on a command line in, one `Dataset` out: names, labels, splits, and bytes on demand.

    photos/train/cat/1.jpg          folders of splits and classes, or of classes, or just images (recursive)
    list.csv                        path,label,split and any more columns; paths relative to the list
    shard-*.tar, a folder of tars   WebDataset: 000.jpg, 000.cls
    NAME, NAME.csv or NAME.zip      a packed set: NAME.csv beside NAME.zip
    imagenet:ROOT                   ImageNet-1k as distributed; see data/imagenet.py
    a,b,c                           several of these in one, for training

Nothing is decoded here before it is asked for. Every problem is an InputError of one line.
"""

import contextlib
import dataclasses
import gc
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.decode import DEFAULT_LIMITS, DecodeError, DecodeLimits, decode_image
from data.errors import InputError
from data.imagenet import PREFIX, scan_imagenet
from data.listings import IMAGE, Item, Record, scan_csv, scan_folder, split_name
from data.marks import content_marks
from data.members import Member, read_bytes
from data.packs import scan_packed, scan_shards

ACCEPTED_FORMS = (
    "a folder of images, of classes, or with train/ and val/; a CSV with a column `path`; tar shards; "
    "NAME.csv beside NAME.zip; imagenet:ROOT; or several of these with commas between"
)
_MAX_NAMED_SPLITS = 8


def real_path(path: str) -> str:
    """The path with the links among its folders followed, so that it is the same however its data set was named."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


_real_folder = lru_cache(4096)(os.path.realpath)
"""Images of one folder come together: it is looked up once."""


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Rows are made by the hundred thousand and all stay: looking for garbage among them takes as long as to make them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Dataset:
    """Rows of a data set in a fixed order. Plain data: cheap to pass to worker processes, safe to share by threads."""

    def __init__(self, records: Sequence[Record], classes: Sequence[str] | None = None, name: str = "the data") -> None:
        self._records = list(records)
        self.name = name
        self.items: list[Item] = [record.item for record in self._records]
        labels = {item.label for item in self.items if item.label is not None}
        self.classes: list[str] = sorted(labels) if classes is None else list(classes)
        """All labels of the whole set, sorted; parts of a set (splits, subsets) share them, so indices agree."""
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    def labels(self) -> np.ndarray:
        """Index of each item's label in `classes`, int64 [n]. Raises InputError where an item has no label."""
        index = {label: k for k, label in enumerate(self.classes)}
        for item in self.items:
            if item.label is None:
                raise InputError(f"{self.name}: {item.name} has no label; wanted class folders or a column `label`")
        return np.array([index[str(item.label)] for item in self.items], np.int64)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of member that every item has: `image`, and in some sets `masks`, `depth_mm`, `sem`..."""
        common = set(self._records[0].members) if self._records else set()
        for record in self._records:
            common &= set(record.members)
        return tuple(sorted(common))

    def read(self, i: int) -> bytes:
        """The encoded image of item i."""
        return self.read_member(i, IMAGE)

    def read_member(self, i: int, kind: str) -> bytes:
        """A further encoded file of item i. Raises InputError where it has none of that kind."""
        record = self._records[i]
        if kind not in record.members:
            raise InputError(
                f"{self.name}: {record.item.name} has no {kind!r}; it has {', '.join(sorted(record.members))}"
            )
        return read_bytes(record.members[kind])

    def file_of(self, i: int) -> Path | None:
        """The file that is the image of item i; None where it lies in an archive."""
        member = self._records[i].members[IMAGE]
        return Path(member.path) if member.stored_bytes is None else None

    def member(self, i: int) -> Member:
        """Where the encoded image of item i lies."""
        return self._records[i].members[IMAGE]

    def examples(self, n: int) -> list[np.ndarray]:
        """Up to n images spread over the set, uint8 [H,W,3] each; fewer where some cannot be read."""
        images: list[np.ndarray] = []
        n = min(n, len(self))
        # every so-manieth first; behind them their neighbours, in case some cannot be read
        places = dict.fromkeys((k * len(self) // n + k // n) % len(self) for k in range(10 * n))
        for place in places:
            if len(images) == n:
                break
            try:
                images.append(self.image(place))
            except InputError:
                continue
        return images

    def image(self, i: int, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """The image of item i, uint8 [H,W,3]. Raises DecodeError, its message beginning with the item's name."""
        try:
            return decode_image(self.read(i), limits)
        except DecodeError as error:
            raise DecodeError(error.reason, f"{self.items[i].name}: {error}") from error

    def shares_images(self, other: "Dataset") -> bool:
        """Whether another data set holds one of these files, whatever either is called."""
        return not self._places().isdisjoint(other._places())

    def files(self) -> list[str]:
        """Paths of all files that hold something of an item, its masks and depth maps too, sorted."""
        return sorted({member.path for record in self._records for member in record.members.values()})

    def _places(self) -> set[tuple[str, int]]:
        """Where the encoded images lie: file, and first byte in it."""
        members = (record.members[IMAGE] for record in self._records)
        return {(real_path(one.path), one.offset) for one in members}

    def subset(self, indices: Iterable[int]) -> "Dataset":
        """The items of these indices, in this order, with the classes of the whole set."""
        return Dataset([self._records[int(i)] for i in indices], self.classes, self.name)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over each item's name, label, split, size in bytes and checksum; see `marks.mark_of`. Read once a data set."""
        if self._fingerprint is None:
            self._fingerprint = self._fingerprint_now()
        return self._fingerprint

    @_nothing_to_collect()
    def _fingerprint_now(self) -> str:
        digest = hashlib.sha256()
        marks = content_marks([record.members[IMAGE] for record in self._records])
        lines = [
            f"{item.name}\0{item.label or ''}\0{item.split or ''}\0{mark.replace(' ', chr(0))}\n"
            for item, mark in zip(self.items, marks, strict=True)
        ]
        for start in range(0, len(lines), 10_000):
            digest.update("".join(lines[start : start + 10_000]).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_dataset(data: str | Path, split: str | None = None) -> Dataset:
    """Open a data set in any of the forms at the head of this file; `split` keeps one split's items, None all.

    A set that names no splits counts as training data: asking it for `train` gives all of it. In a list of sets, those
    without the split that is asked for contribute nothing. Raises InputError.
    """
    text = str(data)
    if not text.strip():
        raise InputError(f"no data was named; wanted {ACCEPTED_FORMS}")
    parts = named_sets(text)
    if len(parts) > 1:
        return _joined(text, [part for part in parts if part], split)
    dataset = Dataset(_scan(Path(text)), name=text)
    return dataset if split is None else _take(dataset, split)


def named_sets(text: str) -> list[str]:
    """The sets that `--data` names: one where something lies at the whole of it, else those between commas."""
    whole = _exists(Path(text)) or (text.startswith(PREFIX) and _exists(Path(text.removeprefix(PREFIX))))
    return [text] if whole else [part.strip() for part in text.split(",")]


def _joined(text: str, parts: Sequence[str], split: str | None) -> Dataset:
    records: list[Record] = []
    prefixes: set[str] = set()
    for part in parts:
        prefix = base = Path(part).stem or part
        while prefix in prefixes:
            prefix = f"{base}#{len(prefixes) + 1}"
        prefixes.add(prefix)
        scanned = _scan(Path(part))
        all_train = split == "train" and all(record.item.split is None for record in scanned)
        for record in scanned:
            item = dataclasses.replace(record.item, name=f"{prefix}/{record.item.name}")
            if all_train:
                item = dataclasses.replace(item, split="train")
            records.append(Record(item, record.members))
    joined = Dataset(records, name=text)
    return joined if split is None else _take(joined, split)


def _take(dataset: Dataset, split: str) -> Dataset:
    wanted = split_name(split)
    present = sorted({item.split for item in dataset.items if item.split is not None})
    if not present and wanted == "train":
        return dataset
    chosen = [i for i, item in enumerate(dataset.items) if item.split == wanted]
    if not chosen:
        known = ", ".join(present[:_MAX_NAMED_SPLITS]) or "none (all of it is for training)"
        raise InputError(f"{dataset.name}: no split {split!r}; its splits are: {known}")
    return dataset.subset(chosen)


@_nothing_to_collect()
def _scan(path: Path) -> list[Record]:
    """Find out which form lies at `path` and list it."""
    text = str(path)
    if text.startswith(PREFIX) and not _exists(path):
        return scan_imagenet(Path(text.removeprefix(PREFIX)))
    try:
        path.stat()
    except FileNotFoundError:
        pass  # NAME of NAME.csv and NAME.zip, or a pattern
    except (OSError, ValueError) as error:
        raise InputError(f"{text[:200]}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    if shards := _shards_at(path):
        return scan_shards(shards)
    if path.is_dir():
        return scan_folder(path)
    suffix = path.suffix.lower()
    manifest, archive = path.with_suffix(".csv"), path.with_suffix(".zip")
    if not suffix or not _exists(path):
        manifest, archive = Path(f"{text}.csv"), Path(f"{text}.zip")
        if not (manifest.is_file() and archive.is_file()):
            _refuse_missing(path)
        return scan_packed(manifest, archive)
    if suffix == ".csv":
        return scan_packed(path, archive) if archive.is_file() and not _has_path_column(path) else scan_csv(path)
    if suffix == ".zip":
        if not manifest.is_file():
            raise InputError(f"{path}: no manifest beside it; wanted {manifest.name} with a row an image, or unpack it")
        return scan_packed(manifest, path)
    hint = "; tar shards must not be compressed: unpack it first" if ".tar" in path.name else ""
    raise InputError(f"{path}: a {suffix or 'file without suffix'} is no data set{hint}; wanted {ACCEPTED_FORMS}")


def find_shards(data: str | Path) -> list[Path]:
    """The tar shards that a data set consists of, in all its parts; none where it is anything else."""
    text = str(data)
    parts = named_sets(text)
    found = [_shards_at(Path(part)) for part in parts if part]
    return [shard for shards in found for shard in shards] if all(found) else []


def _shards_at(path: Path) -> list[Path]:
    """The shards of a pattern, a file, or a folder (directly, or a folder a split). Raises InputError for a pattern of none."""
    text = str(path)
    if any(mark in text for mark in "*?[") and not _exists(path):
        shards = [Path(found) for found in sorted(glob.glob(text)) if found.endswith(".tar")]
        if not shards:
            raise InputError(f"{text}: no tar file matches; wanted shards such as shard-000.tar")
        return shards
    if not _exists(path):
        return []
    if path.is_dir():
        return sorted(path.glob("*.tar")) or sorted(path.glob("*/*.tar"))
    return [path] if path.suffix.lower() == ".tar" else []


def _has_path_column(manifest: Path) -> bool:
    with open(manifest, encoding="utf-8-sig", errors="replace") as file:
        return "path" in [name.strip(' "\r\n') for name in file.readline().split(",")]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _refuse_missing(path: Path) -> None:
    if re.match(r"^[a-z0-9_]+:", str(path)) and not _exists(path):
        raise InputError(f"{path}: this benchmark is not read here; wanted {ACCEPTED_FORMS}")
    raise InputError(f"{path}: nothing there; wanted {ACCEPTED_FORMS}")
