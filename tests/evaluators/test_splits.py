"""Which image is for training and which for the test, and what is refused before anything is computed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from evaluators.splits import Splits, labelled, open_splits, parts_to_hold_out

PIXEL = (
    bytes.fromhex("424d3a0000000000000036000000280000000100000001000000010018000000000004000000130b0000130b0000")
    + b"\0" * 12
)
"""A BMP of one pixel; nothing here decodes it."""


def csv_set(folder: Path, rows: list[dict[str, str]]) -> str:
    for row in rows:
        (folder / row["path"]).write_bytes(PIXEL)
    columns = list(rows[0])
    lines = [",".join(columns)] + [",".join(row[column] for column in columns) for row in rows]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "list.csv")


def plain_rows(n: int, **more: list[str]) -> list[dict[str, str]]:
    return [
        {"path": f"{i}.bmp", **{column: values[i % len(values)] for column, values in more.items()}} for i in range(n)
    ]


def names(splits: Splits) -> tuple[set[str], set[str]]:
    return {item.name for item in splits.train.items}, {item.name for item in splits.val.items}


def test_split_column_is_followed_and_test_stands_in_for_val_with_a_note(tmp_path: Path) -> None:
    data = csv_set(tmp_path, plain_rows(6, label=["a", "b"], split=["train", "train", "test"]))
    train, val = names(splits := open_splits(data))
    assert val == {"2.bmp", "5.bmp"}
    assert len(train) == 4
    assert any("'test'" in note for note in splits.notes)
    assert names(open_splits(data, val_split="test")) == (train, val)


def test_groups_that_a_set_has_on_both_sides_are_told(tmp_path: Path) -> None:
    rows = plain_rows(8, label=["a", "b"], split=["train", "train", "val", "val"], instance=["x", "y", "y", "z"])
    (note,) = open_splits(csv_set(tmp_path, rows)).notes
    assert note.startswith("1 of 2 test groups (`instance`) have training images too")
    assert open_splits(tmp_path / "list.csv", group_by="none").notes == []


def test_without_splits_one_in_five_names_is_held_out_and_stays_so_when_images_are_added(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few = open_splits(csv_set(tmp_path / "few", plain_rows(200, label=["a", "b"])))
    many = open_splits(csv_set(tmp_path / "many", plain_rows(300, label=["a", "b"])))
    assert 25 <= len(few.val.items) <= 55
    assert few.how in few.notes[0]
    for small, large in zip(names(few), names(many), strict=True):
        assert small <= large


def test_views_of_one_instance_stay_on_one_side_by_the_rule_of_the_set_objects(tmp_path: Path) -> None:
    instances = [f"maker/{i // 5}" for i in range(200)]
    splits = open_splits(csv_set(tmp_path, plain_rows(200, label=["a", "b"], instance=instances)))
    train, val = ({item.row["instance"] for item in part.items} for part in (splits.train, splits.val))
    assert train.isdisjoint(val)
    wanted = {i for i in instances if int(hashlib.sha1(f"ov{i}".encode()).hexdigest()[:8], 16) % 4 == 0}
    assert val == wanted
    apart = open_splits(csv_set(tmp_path, plain_rows(200, label=["a"], instance=instances)), group_by="none")
    assert {item.row["instance"] for item in apart.val.items} & {item.row["instance"] for item in apart.train.items}


def test_the_shared_set_objects_is_split_by_model(shared_data: Path) -> None:
    splits = labelled(open_splits(shared_data / "objects"), "objects")
    assert splits.group_column == "instance"
    assert (len(splits.train.items), len(splits.val.items)) == (1252, 395)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"train_split": "nope"},
            r"no split 'nope', its splits are: train \(4\), val \(2\); choose with --train-split",
        ),
        ({"val_split": "test"}, "no split 'test'.*--val-split"),
        ({"train_split": "val"}, "asked for on both sides"),
        ({"group_by": "colour"}, "no such column; it has path, label, split"),
    ],
)
def test_unknown_splits_and_columns_are_refused_with_what_there_is(
    tmp_path: Path, flags: dict[str, str], message: str
) -> None:
    data = csv_set(tmp_path, plain_rows(6, label=["a", "b"], split=["train", "train", "val"]))
    with pytest.raises(InputError, match=message):
        open_splits(data, **flags)


def test_a_set_that_leaves_one_side_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="part is empty"):
        open_splits(csv_set(tmp_path, plain_rows(1, label=["a"])))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([""], "none of its .* images has a label"),
        (["a"], "all images are of class 'a'"),
        ([str(i) for i in range(30)], "training images for 30 classes"),
    ],
)
def test_labels_no_classifier_can_be_judged_on_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    data = csv_set(tmp_path, plain_rows(30, label=labels, split=["train", "train", "val"]))
    with pytest.raises(InputError, match=message):
        labelled(open_splits(data), data)


def test_test_labels_of_which_none_was_trained_on_are_refused(tmp_path: Path) -> None:
    data = csv_set(tmp_path, plain_rows(9, label=["cat", "dog", "n001"], split=["train", "train", "val"]))
    with pytest.raises(
        InputError, match=r"no test image is of a class that has training images \(n001 against cat, dog\)"
    ):
        labelled(open_splits(data), data)


def test_unseen_test_classes_and_images_without_label_are_told(tmp_path: Path) -> None:
    rows = plain_rows(9, label=["a", "b", "a"], split=["train", "train", "val"])
    rows[8]["label"], rows[0]["label"] = "only here", ""
    data = csv_set(tmp_path, rows)
    splits = labelled(open_splits(data), data)
    assert (len(splits.train.items), len(splits.val.items)) == (5, 3)
    assert any("1 images without a label" in note for note in splits.notes)
    assert any("1 test images are of classes without training images (only here)" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("folds", "wanted", "parts"),
    [
        ([0, 1, 2, 3, 4, 0], 1, [0]),
        ([0, 1, 2, 3, 4, 0], 3, [0, 1, 2]),
        ([3, 3, 4], 1, [3]),  # the first parts are empty
        ([1, 4], 3, [1, 4]),
        ([0, 2, 3, 4], 2, [0, 2]),
        ([2, 2, 2], 5, []),  # nothing would be left to train on
    ],
)
def test_the_first_parts_that_hold_some_images_but_not_all_are_held_out(
    folds: list[int], wanted: int, parts: list[int]
) -> None:
    assert parts_to_hold_out(np.array(folds), wanted) == parts
