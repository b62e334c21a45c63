"""Many images in one file: tar shards, a zip archive with its manifest, and the real sets packed that way."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from data.datasets import open_dataset
from data.decode import decode_image
from data.errors import InputError
from tests.data.pictures import encode, noise

PICTURES = [encode(noise(8, 8, seed), "PNG") for seed in range(6)]


def write_tar(path: Path, entries: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in entries.items() if isinstance(entries, Mapping) else entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


# --- tar shards -------------------------------------------------------------------------------------------------------


def test_a_shard_gives_images_with_their_labels(tmp_path: Path) -> None:
    entries = {"000.png": PICTURES[0], "000.cls": b"3\n", "001.PNG": PICTURES[1], "001.cls": b"5"}
    dataset = open_dataset(write_tar(tmp_path / "set-000.tar", entries))
    assert [(item.name, item.label) for item in dataset.items] == [("set-000/000", "3"), ("set-000/001", "5")]
    assert [dataset.read(i) for i in range(2)] == PICTURES[:2]
    np.testing.assert_array_equal(dataset.image(1), noise(8, 8, 1))


def test_a_name_ends_at_the_first_dot_and_the_rest_is_the_kind(tmp_path: Path) -> None:
    entries = {
        "./a/000.png": PICTURES[0],
        "./a/000.depth_mm.png": PICTURES[1],
        "./a/000.json": json.dumps({"label": "cat", "split": "validation", "size": [8, 8]}).encode(),
        "./b.c/000.png": PICTURES[2],
        "./b.c/000.txt": "Käse\n".encode(),
        "./b.c/._000.png": b"resource fork",
    }
    dataset = open_dataset(write_tar(tmp_path / "x.tar", entries))
    first, second = dataset.items
    assert (first.name, first.label, first.split, first.row["size"]) == ("x/a/000", "cat", "val", "[8, 8]")
    assert (second.name, second.label, second.split) == ("x/b.c/000", "Käse", None)
    assert dataset.read_member(0, "depth_mm") == PICTURES[1]


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for shard in ("s-2", "s-10", "s-1"):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": PICTURES[0]})
    for name in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-[0-9]*.tar"):
        assert [item.name for item in open_dataset(name).items] == ["s-1/a", "s-10/a", "s-2/a"]
    with pytest.raises(InputError, match="no tar file matches"):
        open_dataset(tmp_path / "t-*.tar")


def test_a_shard_named_after_a_split_holds_it(tmp_path: Path) -> None:
    for shard in ("train-000", "val_000", "other-000"):
        write_tar(tmp_path / "flat" / f"{shard}.tar", {f"{shard[0]}.png": PICTURES[0]})
    assert [item.split for item in open_dataset(tmp_path / "flat").items] == [None, "train", "val"]
    for split in ("train", "val"):
        write_tar(tmp_path / "deep" / split / "000.tar", {"x.png": PICTURES[0]})
    deep = open_dataset(tmp_path / "deep")
    assert [(item.name, item.split) for item in deep.items] == [("train/000/x", "train"), ("val/000/x", "val")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_tar_format_is_read_back(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    name = "folder/" * 12 + "n" * 60  # longer than the 100 bytes of the original header
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("README"))
        info = tarfile.TarInfo(f"{name}.png")
        info.size = len(PICTURES[0])
        archive.addfile(info, io.BytesIO(PICTURES[0]))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    dataset = open_dataset(path)
    assert [item.name for item in dataset.items] == [f"x/{name}"]
    assert dataset.read(0) == PICTURES[0]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10  # the second header
    path.write_bytes(bytes(data))


def test_a_damaged_or_shortened_shard_is_refused(tmp_path: Path) -> None:
    for change in (_cut, _damage):
        path = write_tar(tmp_path / "x.tar", {"a.png": PICTURES[0], "b.png": PICTURES[1]})
        assert len(PICTURES[0]) < 512
        change(path)
        with pytest.raises(InputError, match=r"damaged or ends early|cannot be read as a tar archive"):
            open_dataset(path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("a.cls", b"1")], "sample a has cls but no image"),
        ([("a.png", PICTURES[0]), ("a.png", PICTURES[1])], r"it holds a\.png twice"),
        ([("a.png", PICTURES[0]), ("a.jpg", PICTURES[1])], "sample a has two files of kind image"),
        ([("a.png", PICTURES[0]), ("a.json", b"{")], r"a\.json is not what it is named after"),
        ([("a.png", PICTURES[0]), ("a.txt", b"\xff\xfe")], r"a\.txt is not what it is named after"),
        ([("a.png", PICTURES[0]), ("a.cls", b"1" * 2**21)], r"a\.cls has 2,097,152 bytes; a label was wanted"),
        ([], "no images in 1 tar file"),
        ([("../../evil.png", PICTURES[0])], r"'\.\./\.\./evil\.png' climbs out of the archive"),
        ([("/etc/evil.png", PICTURES[0])], "climbs out of the archive"),
        ([("a\\..\\..\\evil.png", PICTURES[0])], "climbs out of the archive"),
        ([("C:\\evil.png", PICTURES[0])], "climbs out of the archive"),
    ],
    ids=range(11),
)
def test_a_shard_that_cannot_be_used_says_why(tmp_path: Path, entries: list[tuple[str, bytes]], words: str) -> None:
    path = write_tar(tmp_path / "x.tar", entries)
    with pytest.raises(InputError, match=words):
        open_dataset(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tar"]


def test_a_compressed_shard_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": PICTURES[0]}, "w:gz")
    with pytest.raises(InputError, match=r"unpack it first \(gunzip\)"):
        open_dataset(path)


def test_a_shard_that_shrinks_later_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": PICTURES[0]})
    dataset = open_dataset(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"it ends .* bytes early"):
        dataset.read(0)


# --- packed sets ------------------------------------------------------------------------------------------------------


def pack(folder: Path, manifest: str, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    (folder / "set.csv").write_text(manifest)
    write_zip(folder / "set.zip", entries, compression)
    return folder / "set"


ENTRIES = {"images/a.png": PICTURES[0], "images/b.png": PICTURES[1], "masks/a.png": PICTURES[2]}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_packed_set_meets_its_manifest_in_the_name(tmp_path: Path, compression: int) -> None:
    base = pack(tmp_path, "name,label,split,x\na,cat,train,1\nb,dog,val,2\n", ENTRIES, compression)
    for named in (base, base.with_suffix(".csv"), base.with_suffix(".zip")):
        dataset = open_dataset(named)
        assert [(item.name, item.label, item.split) for item in dataset.items] == [
            ("a", "cat", "train"),
            ("b", "dog", "val"),
        ]
        assert [dataset.read(i) for i in range(2)] == PICTURES[:2]
        assert dataset.read_member(0, "masks") == PICTURES[2]
        assert dataset.kinds == ("image",)
        assert dataset.items[1].row["x"] == "2"


def test_the_fingerprint_of_a_packed_set_knows_its_content(tmp_path: Path) -> None:
    manifest = "name\na\nb\n"
    before = open_dataset(pack(tmp_path, manifest, ENTRIES)).fingerprint()
    assert open_dataset(pack(tmp_path, manifest, ENTRIES, zipfile.ZIP_DEFLATED)).fingerprint() == before
    altered = PICTURES[1][:-1] + b"\0"
    assert open_dataset(pack(tmp_path, manifest, {**ENTRIES, "images/b.png": altered})).fingerprint() != before


def test_the_fingerprint_of_a_shard_knows_its_content(tmp_path: Path) -> None:
    found = set()
    for data in (PICTURES[0], PICTURES[0][:-1] + b"\0", PICTURES[0][:60] + b"\0" + PICTURES[0][61:]):
        found.add(open_dataset(write_tar(tmp_path / "x.tar", {"a.png": data, "b.png": PICTURES[1]})).fingerprint())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("manifest", "entries", "words"),
    [
        ("name\nc\n", ENTRIES, r"no images/c\.\*, which the manifest lists"),
        ("name\n../a\n", ENTRIES, r"no images/\.\./a\.\*, which the manifest lists"),
        ("name\na\na\n", ENTRIES, "a stands in two rows"),
        ("title\na\n", ENTRIES, "no column `name` or `clip`"),
        ("clip\nclip_01\n", ENTRIES, r"no images/clip_01/\*"),
        ("name\na\n", {**ENTRIES, "../../evil.png": b"x"}, "climbs out of the archive"),
        ("name\na\n", {**ENTRIES, "images/..\\..\\evil.png": b"x"}, "climbs out of the archive"),
    ],
    ids=range(7),
)
def test_a_packed_set_that_cannot_be_used_says_why(
    tmp_path: Path, manifest: str, entries: Mapping[str, bytes], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        open_dataset(pack(tmp_path, manifest, entries))


def test_an_archive_without_its_manifest_and_one_that_is_none(tmp_path: Path) -> None:
    write_zip(tmp_path / "alone.zip", ENTRIES)
    with pytest.raises(InputError, match=r"no manifest beside it; wanted alone\.csv"):
        open_dataset(tmp_path / "alone.zip")
    (tmp_path / "text.csv").write_text("name\na\n")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(InputError, match="cannot be read as a zip archive"):
        open_dataset(tmp_path / "text")


def test_damage_inside_an_archive_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    dataset = open_dataset(pack(tmp_path, "name\na\nb\n", ENTRIES))
    path = tmp_path / "set.zip"
    data = bytearray(path.read_bytes())
    data[data.index(PICTURES[1]) + 50] ^= 0xFF
    path.write_bytes(bytes(data))
    assert dataset.read(0) == PICTURES[0]
    with pytest.raises(InputError, match="fails its checksum"):
        dataset.read(1)


def test_a_zip_bomb_is_cut_off_at_the_size_it_announced(tmp_path: Path) -> None:
    dataset = open_dataset(pack(tmp_path, "name\na\n", {"images/a.png": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED))
    record = dataset._records[0].members["image"]
    object.__setattr__(record, "size", 1000)
    with pytest.raises(InputError, match="fails its checksum"):
        dataset.read(0)


# --- the real sets ----------------------------------------------------------------------------------------------------

ROWS = {
    "pool": 3235,
    "photos": 296,
    "stamps": 392,
    "clipart": 1116,
    "emoji": 1774,
    "objects": 1647,
    "rooms": 420,
    "stereo": 60,
    "neardup": 368,
}
"""From the README beside the sets."""


@pytest.mark.parametrize("name", ROWS)
def test_a_real_set_has_the_rows_its_readme_counts(shared_data: Path, name: str) -> None:
    dataset = open_dataset(shared_data / name)
    assert len(dataset) == ROWS[name]
    assert len({item.name for item in dataset.items}) == ROWS[name]
    side = 64 if name == "emoji" else 128
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        assert dataset.image(i).shape == (side, side, 3)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("photos", {"image"}),
        ("stamps", {"image", "masks", "plain", "plain_mask"}),
        ("clipart", {"image", "masks"}),
        ("objects", {"image", "masks"}),
        ("rooms", {"image", "depth_mm", "sem"}),
        ("stereo", {"image", "disparity_x64"}),
    ],
)
def test_a_real_set_has_the_further_files_its_readme_names(shared_data: Path, name: str, kinds: set[str]) -> None:
    dataset = open_dataset(shared_data / name)
    assert kinds <= set(dataset.kinds)
    for kind in kinds:
        assert decode_image(dataset.read_member(len(dataset) - 1, kind)).shape == (128, 128, 3)


@pytest.mark.parametrize(("name", "clips"), [("clips", 14), ("vclips", 12)])
def test_a_set_of_clips_gives_their_frames_in_order(shared_data: Path, name: str, clips: int) -> None:
    dataset = open_dataset(shared_data / name)
    assert len(dataset) == clips * 20
    assert dataset.kinds == ("image", "instances")
    assert [item.row["frame"] for item in dataset.items[:20]] == [f"{k:02d}" for k in range(20)]
    assert {item.split for item in dataset.items} == {"val"}


def test_photos_have_ten_classes(shared_data: Path) -> None:
    wanted = ["bird", "fish", "mammal", "fruit", "vegetable", "flower", "tool", "vehicle", "monument", "energy"]
    assert open_dataset(shared_data / "photos").classes == sorted(wanted)


def test_objects_are_split_by_model_never_by_view(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "objects")
    splits: dict[str, set[str | None]] = {}
    for item in dataset.items:
        instance = item.row["instance"]
        number = int(hashlib.sha1(b"ov" + instance.encode()).hexdigest()[:8], 16)
        assert item.split == ("val" if number % 4 == 0 else "train")
        splits.setdefault(instance, set()).add(item.split)
    assert len(splits) == 330
    assert all(len(found) == 1 for found in splits.values())


def test_the_training_pool_is_as_large_as_the_readme_says(shared_data: Path) -> None:
    names = ("pool", "photos", "stamps", "clipart", "emoji", "objects", "rooms")
    joined = open_dataset(",".join(str(shared_data / name) for name in names), "train")
    assert len(joined) == 7250
    assert {item.split for item in joined.items} == {"train"}
