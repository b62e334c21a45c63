"""A data set in, a training and a test part out: the split it brings, or a deterministic one made from names.

Where a set names no splits, one in five images is held out by a hash of its name; where its table has a column that
ties images together (`instance`, `family`, `concept`, `group`), one in four of these groups is held out as a whole,
so that no view of a model is tested on a network that was fitted to another view of it. The hash is
`sha1("ov" + key)`, first 8 hex digits, modulo the share; 0 is held out. It depends on the key alone: adding images
never moves the others to the other side.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.datasets import Dataset, open_dataset
from data.errors import InputError
from data.listings import Item, split_name

VAL_NAMES = ("val", "test")
"""Names under which the held-out part of a set is looked for, in this order."""
GROUP_COLUMNS = ("instance", "family", "concept", "group")
"""Columns that tie images together, in order of preference, where `--group-by` is auto."""
SCENE_COLUMNS = ("scene", "room", "objects")
"""Columns that tie views of one scene together, before those, where images have maps; `objects` lists what stands in a rendered room."""
ONE_IN_NAMES, ONE_IN_GROUPS = 5, 4
"""Share held out: every fifth image by name, every fourth group (the rule of the packed set `objects`)."""
FOLDS = 5
"""Parts that training images are cut into by a hash of what ties them together; some of them choose a head or a learning rate."""


@dataclass(frozen=True)
class Splits:
    """The two parts of a data set and how they came about."""

    train: Dataset
    val: Dataset
    how: str
    """Where the split comes from, in words."""
    group_column: str | None
    """Column whose equal values tie images together; None: every image stands for itself."""
    notes: list[str] = field(default_factory=list)


def open_splits(
    data: str | Path, train_split: str | None = None, val_split: str | None = None, group_by: str = "auto"
) -> Splits:
    """Open `data` and take its two parts.

    Names of splits left out are `train` and the first of `VAL_NAMES` that occurs. `group_by` is a column, `auto` or
    `none`. Raises InputError for an unknown split or column, and when a part is empty.
    """
    return split_dataset(open_dataset(data), train_split, val_split, group_by)


def split_dataset(
    dataset: Dataset, train_split: str | None = None, val_split: str | None = None, group_by: str = "auto"
) -> Splits:
    """The two parts of a set that is open already; see `open_splits`."""
    data = dataset.name
    group_column = pick_group_column(dataset.items, group_by, data)
    present = Counter(item.split for item in dataset.items if item.split is not None)
    if not present and train_split is None and val_split is None:
        train_rows, val_rows, how = hash_split(dataset.items, group_column)
        notes = [f"{data} names no splits: {how}"]
    else:
        train_rows, val_rows, how, notes = named_split(dataset.items, present, train_split, val_split, data)
    for rows, part in ((train_rows, "training"), (val_rows, "test")):
        if not rows:
            raise InputError(
                f"{data}: the {part} part is empty ({len(dataset.items)} images, {how}); "
                "wanted images in both, name them with a `split` column or with train/ and val/ folders"
            )
    if group_column is not None:
        seen, tested = ({group_of(dataset.items[row], group_column) for row in rows} for rows in (train_rows, val_rows))
        if both := len(seen & tested):
            notes.append(
                f"{both} of {len(tested)} test groups (`{group_column}`) have training images too, which makes them easier to tell"
            )
    return Splits(dataset.subset(train_rows), dataset.subset(val_rows), how, group_column, notes)


def pick_group_column(items: Sequence[Item], group_by: str, data: str) -> str | None:
    """The column that ties images together, or None."""
    columns = list(items[0].row) if items else []
    if group_by == "none":
        return None
    if group_by != "auto":
        if group_by not in columns:
            raise InputError(f"--group-by {group_by}: {data} has no such column; it has {', '.join(columns) or 'none'}")
        return group_by
    return next((name for name in GROUP_COLUMNS if name in columns), None)


def scene_column(items: Sequence[Item], group_by: str) -> str:
    """What `--group-by` comes to for images with maps: where it is auto and there are columns of scenes, the first of these.

    `none` where all training images are of one scene, whose views cannot be held out as a whole.
    """
    column = next((name for name in SCENE_COLUMNS if items and name in items[0].row), None)
    if group_by != "auto" or column is None:
        return group_by
    scenes = {item.row.get(column) for item in items if item.split in ("train", None)}
    return "none" if len(scenes) == 1 else column


def group_of(item: Item, group_column: str | None) -> str:
    """What ties an image to others: the value of the column, or its own name where that is missing or empty."""
    return (item.row.get(group_column) if group_column else None) or item.name


def held_out(key: str, one_in: int) -> bool:
    """Whether a name or group is on the test side; see the head of this file."""
    return hash_bucket(key, one_in) == 0


def hash_bucket(key: str, buckets: int) -> int:
    """A bucket number that depends on the key alone."""
    return (
        int(hashlib.sha1(f"ov{key}".encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()[:8], 16)
        % buckets
    )


def parts_to_hold_out(folds_n: np.ndarray, wanted: int) -> list[int]:
    """The first `wanted` of all `FOLDS` parts that can be held out in turn: those that hold some images, but not all.

    Few images or groups leave parts empty, and the first ones may be among these.
    """
    usable = [fold for fold in range(FOLDS) if 0 < (folds_n == fold).sum() < len(folds_n)]
    return usable[:wanted]


def held_out_words(parts: Sequence[int]) -> str:
    """Which data a choice was made on, for a result file."""
    return f"train, {len(parts)} held-out fifth{'s in turn' * (len(parts) > 1)}"


def hash_split(items: Sequence[Item], group_column: str | None) -> tuple[list[int], list[int], str]:
    """Rows of both sides, and the rule in words."""
    one_in = ONE_IN_GROUPS if group_column else ONE_IN_NAMES
    sides = [held_out(group_of(item, group_column), one_in) for item in items]
    train_rows = [row for row, out in enumerate(sides) if not out]
    val_rows = [row for row, out in enumerate(sides) if out]
    by = f"`{group_column}`" if group_column else "name"
    how = f"held out by a hash of {by}, 1 in {one_in}: {len(train_rows)} train, {len(val_rows)} val"
    return train_rows, val_rows, how


def named_split(
    items: Sequence[Item], present: Counter[str], train_split: str | None, val_split: str | None, data: str
) -> tuple[list[int], list[int], str, list[str]]:
    """Rows of the two named parts. Raises InputError for a name that does not occur."""
    found = ", ".join(f"{name} ({count})" for name, count in sorted(present.items())) or "none"
    train_name = split_name(train_split) or "train"
    val_name = split_name(val_split) or next((name for name in VAL_NAMES if name in present), "val")
    for flag, name in (("--train-split", train_name), ("--val-split", val_name)):
        if name not in present:
            raise InputError(f"{data}: no split {name!r}, its splits are: {found}; choose with {flag}")
    if train_name == val_name:
        raise InputError(f"{data}: split {train_name!r} was asked for on both sides; its splits are: {found}")
    notes = []
    if val_split is None and val_name != "val":
        notes.append(f"tested on split {val_name!r}; {data} has none named 'val'")
    unnamed = sum(item.split is None for item in items)
    if unnamed:
        notes.append(f"{unnamed} images of {data} name no split and were left out")
    train_rows = [row for row, item in enumerate(items) if item.split == train_name]
    val_rows = [row for row, item in enumerate(items) if item.split == val_name]
    return train_rows, val_rows, f"splits {train_name!r} and {val_name!r} of the set", notes


def labelled(splits: Splits, data: str) -> Splits:
    """Keep rows with a label and check that a classifier can be judged on them.

    Raises InputError without labels, with one class, with fewer training images than classes, or where no class is in both parts.
    """
    notes = list(splits.notes)
    parts = []
    for part in (splits.train, splits.val):
        rows = [row for row, item in enumerate(part.items) if item.label]
        if not rows:
            raise InputError(
                f"{data}: none of its {len(part.items)} images has a label; "
                "wanted class folders (train/CLASS/*, val/CLASS/*) or a CSV with a `label` column"
            )
        if len(rows) < len(part.items):
            notes.append(f"{len(part.items) - len(rows)} images without a label were left out")
            part = part.subset(rows)
        parts.append(part)
    train, val = parts
    seen = {item.label for item in train.items}
    classes = seen | {item.label for item in val.items}
    if len(classes) < 2:
        raise InputError(f"{data}: all images are of class {min(map(str, classes))!r}; wanted at least two classes")
    if len(train.items) < len(classes):
        raise InputError(
            f"{data}: {len(train.items)} training images for {len(classes)} classes; wanted at least one a class. "
            "Is the label column the right one?"
        )
    unseen = Counter(str(item.label) for item in val.items if item.label not in seen)
    if unseen.total() == len(val.items):
        raise InputError(
            f"{data}: no test image is of a class that has training images ({', '.join(sorted(unseen)[:3])} against "
            f"{', '.join(sorted(map(str, seen))[:3])}); wanted the same class names in both parts"
        )
    if unseen:
        names = ", ".join(sorted(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        notes.append(f"{unseen.total()} test images are of classes without training images ({names}): always errors")
    return Splits(train, val, splits.how, splits.group_column, notes)
