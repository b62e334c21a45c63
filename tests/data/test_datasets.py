"""Data sets in every form: which rows, labels and splits they give, and what is refused with which words."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.datasets import Dataset, open_dataset
from data.decode import DecodeError, DecodeLimits
from data.errors import InputError
from tests.data.pictures import encode, gradient, noise


def put(path: Path, seed: int = 0) -> Path:
    """An image file of its own content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(noise(8, 8, seed), "PNG"))
    return path


def rows(dataset: Dataset) -> list[tuple[str, str | None, str | None]]:
    return [(item.name, item.label, item.split) for item in dataset.items]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_plain_folder_is_read_recursively_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/down/c.webp", ".hidden.png", "notes.txt", "__MACOSX/x.png", ".cache/y.png"):
        put(tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert rows(dataset) == [("a.JPG", None, None), ("b.png", None, None), ("deep/down/c.webp", None, None)]
    assert dataset.classes == []
    with pytest.raises(InputError, match=r"a\.JPG has no label"):
        dataset.labels()


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/old/3.png", "empty/readme.txt"):
        put(tmp_path / name)
    dataset = open_dataset(str(tmp_path))
    assert rows(dataset) == [("cat/2.png", "cat", None), ("cat/old/3.png", "cat", None), ("dog/1.png", "dog", None)]
    assert dataset.classes == ["cat", "dog"]
    np.testing.assert_array_equal(dataset.labels(), [0, 0, 1])


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "validation"), ("train", "valid")])
def test_split_folders_hold_class_folders(tmp_path: Path, train: str, val: str) -> None:
    for name in (f"{train}/cat/1.png", f"{train}/dog/2.png", f"{val}/dog/3.png"):
        put(tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert {(item.label, item.split) for item in dataset.items} == {("cat", "train"), ("dog", "train"), ("dog", "val")}
    held_out = open_dataset(tmp_path, "val")
    assert rows(held_out) == [(f"{val}/dog/3.png", "dog", "val")]
    assert held_out.classes == ["cat", "dog"], "parts share the classes of the whole, so that indices agree"
    np.testing.assert_array_equal(held_out.labels(), [1])


def test_split_folders_may_hold_images_directly(tmp_path: Path) -> None:
    for name in ("train/1.png", "val/2.png"):
        put(tmp_path / name)
    assert rows(open_dataset(tmp_path)) == [("train/1.png", None, "train"), ("val/2.png", None, "val")]


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("val/a/1.png", "validation/a/2.png"):
        put(tmp_path / name)
    with pytest.raises(InputError, match="val/ and validation/ both mean split 'val'"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("stray", ["preview.png", "train/preview.png"])
def test_a_stray_image_beside_folders_that_mean_something_is_refused(tmp_path: Path, stray: str) -> None:
    """Taken for a plain folder the set would lose its splits, and training on `train` would see `val`."""
    for name in ("train/cat/1.png", "val/cat/2.png", stray):
        put(tmp_path / name)
    with pytest.raises(InputError, match=r"preview\.png lies beside the folder (train|cat)/"):
        open_dataset(tmp_path, "train")


def test_split_folders_beside_others_are_refused(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "backup/cat/1.png"):
        put(tmp_path / name)
    with pytest.raises(InputError, match=r"mixes split folders \(train/\) with others \(backup/\)"):
        open_dataset(tmp_path)


def test_splits_beside_another_folder_are_refused_and_a_class_of_that_name_is_not(tmp_path: Path) -> None:
    for name in ("train/1.png", "bus/2.png"):
        put(tmp_path / name)
    assert open_dataset(tmp_path).classes == ["bus", "train"]
    put(tmp_path / "Val" / "3.png")
    with pytest.raises(InputError, match=r"mixes split folders \(Val/\) with others \(bus/\)"):
        open_dataset(tmp_path)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_dataset(tmp_path)) == 1


def test_an_empty_folder_a_missing_one_and_no_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in this folder"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="nothing there; wanted a folder of images"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(InputError, match=r"this benchmark is not read here; wanted .* imagenet:ROOT"):
        open_dataset("imagewoof:/nowhere")
    for text in ("", "  "):
        with pytest.raises(InputError, match="no data was named"):
            open_dataset(text)
    for text in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot be opened"):
            open_dataset(text)


def test_a_file_of_another_kind_is_no_data_set(tmp_path: Path) -> None:
    for name, hint in (("a.parquet", "a .parquet is no data set"), ("a.tar.gz", "must not be compressed")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=hint):
            open_dataset(tmp_path / name)


# --- CSV lists --------------------------------------------------------------------------------------------------------


def write_list(folder: Path, text: str) -> Path:
    path = folder / "list.csv"
    path.write_text(text)
    return path


def test_a_list_gives_path_label_split_and_carries_other_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 1)
    put(tmp_path / "sub" / "b, c.png", 2)
    put(tmp_path / "m.png", 3)
    path = write_list(
        tmp_path, 'split,path,label,camera,masks\ntrain,a.png,cat,old,m.png\nvalidation,"sub/b, c.png",dog,,\n'
    )
    dataset = open_dataset(path)
    assert rows(dataset) == [("a.png", "cat", "train"), ("sub/b, c.png", "dog", "val")]
    assert [item.row["camera"] for item in dataset.items] == ["old", ""]
    assert dataset.read_member(0, "masks") == (tmp_path / "m.png").read_bytes()
    assert dataset.kinds == ("image",)
    with pytest.raises(InputError, match="has no 'masks'; it has image"):
        dataset.read_member(1, "masks")
    assert dataset.read(1) == (tmp_path / "sub" / "b, c.png").read_bytes()


def test_spaces_around_the_commas_do_not_matter(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    path = write_list(tmp_path, "label , path, split\ncat ,a.png , train\n dog,b.png, val \n")
    (tmp_path / "list.zip").touch()  # a column `path` says that this is not a packed set
    assert rows(open_dataset(path)) == [("a.png", "cat", "train"), ("b.png", "dog", "val")]


def test_a_list_of_paths_alone_is_enough(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert rows(open_dataset(write_list(tmp_path, "\ufeffpath\r\na.png\r\n"))) == [("a.png", None, None)]


def test_a_list_from_windows_names_the_same_files(tmp_path: Path) -> None:
    """A file that has a backslash in its name, which other systems allow, is still found by it."""
    put(tmp_path / "cat" / "a.png", 1)
    put(tmp_path / "cat\\b.png", 2)
    for text in ("path\r\ncat\\a.png\r\ncat\\b.png\r\n", "path\ncat/a.png\ncat\\b.png\n"):
        dataset = open_dataset(write_list(tmp_path, text))
        assert [item.name for item in dataset.items] == ["cat/a.png", "cat/b.png"]
        assert [dataset.read(i) for i in (0, 1)] == [
            (tmp_path / name).read_bytes() for name in ("cat/a.png", "cat\\b.png")
        ]


def test_a_full_path_in_a_list_is_taken_as_written(tmp_path: Path) -> None:
    image = put(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "lists").mkdir()
    dataset = open_dataset(write_list(tmp_path / "lists", f"path\n{image}\n"))
    assert dataset.read(0) == image.read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.png,cat\nb.png,dog\n", r"line 3: 'b\.png' is missing; paths are relative to"),
        ("path,label\n\na.png,cat\n\n\nb.png,dog\n", r"line 6: 'b\.png' is missing"),
        ("path,label\n../a.png,cat\n", r"line 2: '\.\./a\.png' climbs out of the folder"),
        ("path,label\nx/../../a.png,cat\n", "climbs out of the folder"),
        ("path,label\n..\\a.png,cat\n", "climbs out of the folder"),
        ("path,masks\na.png,../a.png\n", "climbs out of the folder"),
        ("path,label\n,cat\n", "line 2: the path is empty"),
        ("path,label\na\0.png,cat\n", "(no file name|line contains NUL|is it a CSV file)"),
        ("path,label\na.png,cat\na.png,dog\n", r"line 3: a\.png stands in line 2 already"),
        ("path,label\na.png,cat\n./a.png,dog\n", r"line 3: a\.png stands in line 2 already"),
        ("path,label\n" + "x" * 5000 + ",cat\n", "line 2: 'xxx.* is missing"),
        ("path,label\na.png,cat,extra\n", "line 2: wanted 2 values as in the header"),
        ("path,label\na.png\n", "line 2: wanted 2 values as in the header"),
        ("file,label\na.png,cat\n", r"no column `path` \(it has file, label\)"),
        ("path,path\na.png,cat\n", "a column is named twice"),
        ("path,label\n", "it has a header but no rows"),
        ("", "it is empty; wanted a header"),
        ('path,label\na.png,cat\n"b.png,dog\n', "line 3: .*is it a CSV file"),
    ],
    ids=range(18),
)
def test_a_list_that_cannot_be_used_says_where_and_why(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path / "a.png")
    put(tmp_path.parent / "a.png")
    path = write_list(tmp_path, text)
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)


def test_a_list_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes("path,label\nä.png,Käse\n".encode("latin-1"))
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        open_dataset(path)


# --- splits and lists of sets -----------------------------------------------------------------------------------------


def test_a_set_without_splits_is_training_data(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert len(open_dataset(tmp_path, "train")) == 1
    with pytest.raises(InputError, match="no split 'val'; its splits are: none"):
        open_dataset(tmp_path, "val")


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png")
    put(tmp_path / "val" / "a.png")
    with pytest.raises(InputError, match="no split 'holdout'; its splits are: train, val"):
        open_dataset(tmp_path, "holdout")


def test_several_sets_are_joined_and_their_names_stay_apart(tmp_path: Path) -> None:
    for k, name in enumerate(("one/train/x/a.png", "one/val/x/a.png", "two/a.png", "more/two/a.png")):
        put(tmp_path / name, k)
    text = f"{tmp_path}/one, {tmp_path}/two,{tmp_path}/more/two"
    joined = open_dataset(text)
    assert [item.name for item in joined.items] == ["one/train/x/a.png", "one/val/x/a.png", "two/a.png", "two#3/a.png"]
    train = open_dataset(text, "train")
    assert [item.name for item in train.items] == ["one/train/x/a.png", "two/a.png", "two#3/a.png"]
    assert len({train.read(i) for i in range(3)}) == 3


def test_an_empty_split_is_no_training_image_alone_and_joined_alike(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    put(tmp_path / "more" / "c.png")
    path = write_list(tmp_path, "path,split\na.png,train\nb.png,\n")
    assert len(open_dataset(path, "train")) == 1
    joined = open_dataset(f"{path},{tmp_path / 'more'}", "train")
    assert [item.name for item in joined.items] == ["list/a.png", "more/c.png"]


def test_a_folder_with_a_comma_in_its_name_is_one_set(tmp_path: Path) -> None:
    put(tmp_path / "a,b" / "1.png")
    assert len(open_dataset(tmp_path / "a,b")) == 1


def test_a_subset_keeps_order_and_classes(tmp_path: Path) -> None:
    for k, name in enumerate(("a/1.png", "b/2.png", "c/3.png")):
        put(tmp_path / name, k)
    subset = open_dataset(tmp_path).subset(np.array([2, 0]))
    assert [item.name for item in subset.items] == ["c/3.png", "a/1.png"]
    np.testing.assert_array_equal(subset.labels(), [2, 0])


# --- images and fingerprints ------------------------------------------------------------------------------------------


def test_an_image_comes_decoded_and_a_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encode(gradient(9, 7), "PNG"))
    (tmp_path / "text.jpg").write_text("no picture")
    dataset = open_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.image(0), gradient(9, 7))
    with pytest.raises(DecodeError, match=r"^text\.jpg: these bytes are no image") as caught:
        dataset.image(1)
    assert caught.value.reason == "not_an_image"
    with pytest.raises(DecodeError, match=r"^good\.png: "):
        dataset.image(0, DecodeLimits(max_pixels=10))


def test_a_file_that_has_gone_is_an_input_error(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    dataset = open_dataset(tmp_path)
    (tmp_path / "a.png").unlink()
    for use in (lambda: dataset.read(0), dataset.fingerprint):
        with pytest.raises(InputError, match="cannot be read"):
            use()


def test_the_fingerprint_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    for root in ("here", "there"):
        for k in range(3):
            put(tmp_path / root / f"class_{k}" / "a.png", k)
    os.utime(tmp_path / "there" / "class_0" / "a.png", (0, 0))
    assert open_dataset(tmp_path / "here").fingerprint() == open_dataset(tmp_path / "there").fingerprint()


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WebP", "BMP", "TIFF"])
def test_the_fingerprint_changes_with_every_byte(tmp_path: Path, suffix: str) -> None:
    """Also where the size stays and a decoder may not even notice, as within the scan of a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encode(pixels, suffix))
    before, data = open_dataset(tmp_path).fingerprint(), bytearray(path.read_bytes())
    for place in np.linspace(0, len(data) - 1, 23).astype(int):
        data[place] ^= 1
        path.write_bytes(data)
        assert open_dataset(tmp_path).fingerprint() != before
        data[place] ^= 1


def test_the_fingerprint_changes_with_content_name_label_split_and_order(tmp_path: Path) -> None:
    flat = np.zeros((64, 64, 3), np.uint8)
    for k, name in enumerate(("a.bmp", "b.bmp")):
        (tmp_path / name).write_bytes(encode(flat + k, "BMP"))
    found = [open_dataset(tmp_path).fingerprint(), open_dataset(tmp_path).subset([1, 0]).fingerprint()]
    for place in ((0, 0), (-1, -1), (40, 7)):  # a BMP keeps its size whatever it shows
        changed = flat.copy()
        changed[place] = 9
        (tmp_path / "a.bmp").write_bytes(encode(changed, "BMP"))
        found.append(open_dataset(tmp_path).fingerprint())
    for text in ("path\na.bmp\n", "path,label\na.bmp,x\n", "path,label\na.bmp,y\n", "path,split\na.bmp,val\n"):
        found.append(open_dataset(write_list(tmp_path, text)).fingerprint())
    (tmp_path / "a.bmp").rename(tmp_path / "c.bmp")
    found.append(open_dataset(tmp_path).fingerprint())
    assert len(set(found)) == len(found)
    assert all(len(digest) == 64 and int(digest, 16) for digest in found)


def test_extra_columns_are_plain_text(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    dataset = open_dataset(write_list(tmp_path, 'path,note\na.png,"{""x"": 1}"\n'))
    assert json.loads(dataset.items[0].row["note"]) == {"x": 1}
