"""Checksums that are remembered: never other than those of the bytes, and asked of the file again once anything about it changed."""

import os
import time
from pathlib import Path

import pytest

from data import marks, members
from data.datasets import open_dataset
from data.errors import InputError
from data.members import Member

N = marks.REMEMBERED_FROM


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Paths that were read, with notes in a folder of the test's own, and files that count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(marks, "SETTLED_S", -1.0)
    paths: list[str] = []

    def content_mark(member: Member) -> str:
        paths.append(member.path)
        return members.content_mark(member)

    monkeypatch.setattr(marks, "content_mark", content_mark)
    return paths


def files(folder: Path, n: int = N) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(f"picture {i:04d}".encode())
    return paths


def test_a_large_set_is_read_once_and_a_small_one_each_time(tmp_path: Path, read: list[str]) -> None:
    files(tmp_path / "large")
    first = open_dataset(tmp_path / "large").fingerprint()
    assert len(read) == N
    assert open_dataset(tmp_path / "large").fingerprint() == first
    assert len(read) == N
    files(tmp_path / "small", 3)
    assert open_dataset(tmp_path / "small").fingerprint() == open_dataset(tmp_path / "small").fingerprint()
    assert len(read) == N + 6


def test_other_bytes_of_the_same_length_and_date_are_seen(tmp_path: Path, read: list[str]) -> None:
    paths = files(tmp_path / "large")
    first, before = open_dataset(tmp_path / "large").fingerprint(), paths[7].stat()
    time.sleep(0.02)  # a tick of the clock that the file system goes by
    paths[7].write_bytes(b"PICTURE 0007")
    os.utime(paths[7], ns=(before.st_atime_ns, before.st_mtime_ns))
    read.clear()
    changed = open_dataset(tmp_path / "large").fingerprint()
    assert changed != first
    assert read == [str(paths[7])]
    assert open_dataset(tmp_path / "large").fingerprint() == changed


def test_what_is_remembered_equals_what_is_read(tmp_path: Path, read: list[str]) -> None:
    paths = files(tmp_path / "large")
    found = [Member(str(path)) for path in paths]
    wanted = [members.content_mark(member) for member in found]
    assert marks.content_marks(found) == marks.content_marks(found) == marks.content_marks(found[::-1])[::-1] == wanted


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "SETTLED_S", 60.0)
    files(tmp_path / "large")
    for _ in range(2):
        open_dataset(tmp_path / "large").fingerprint()
    assert len(read) == 2 * N


def test_parts_of_one_folder_do_not_forget_each_other(tmp_path: Path, read: list[str]) -> None:
    files(tmp_path / "large", 2 * N)
    for times in (1, 2):
        whole = open_dataset(tmp_path / "large")
        prints = [whole.subset(range(start, 2 * N, 2)).fingerprint() for start in (0, 1)]
        assert len(set(prints)) == 2
        assert len(read) == 2 * N, f"read once, at the first of {times} times"


def test_an_archive_without_checksums_is_asked_about_once_for_all_its_entries(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(range(256)) * N)
    entries = [Member(str(path), 256 * i, 16 + i % 7) for i in range(N)]
    found = marks.content_marks(entries)
    assert found == [members.content_mark(entry) for entry in entries]
    read.clear()
    assert marks.content_marks(entries) == found
    assert read == []
    path.write_bytes(bytes(range(256)) * (N + 1))
    marks.content_marks(entries)
    assert len(read) == N


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"x": 1}', b"\xff\xfe", b'{"/0000.jpg@0+None": [[], 3]}', b"PK\3\4"])
def test_damaged_notes_cost_time_only(tmp_path: Path, read: list[str], damage: bytes) -> None:
    files(tmp_path / "large")
    first = open_dataset(tmp_path / "large").fingerprint()
    (note,) = (tmp_path / "cache" / "dinoscope" / "marks").iterdir()
    note.write_bytes(damage)
    assert open_dataset(tmp_path / "large").fingerprint() == first
    assert len(read) == 2 * N


def test_a_file_that_has_gone_is_named(tmp_path: Path, read: list[str]) -> None:
    paths = files(tmp_path / "large")
    open_dataset(tmp_path / "large").fingerprint()
    dataset = open_dataset(tmp_path / "large")
    paths[3].unlink()
    with pytest.raises(InputError, match=r"0003\.jpg: cannot be read"):
        dataset.fingerprint()


@pytest.mark.parametrize("n", [3, N])
def test_a_file_that_is_too_large_to_be_read_hinders_no_fingerprint(tmp_path: Path, read: list[str], n: int) -> None:
    """One stray film among a million photographs is passed over when it is met; its size counts, and it is not remembered as read."""
    paths = files(tmp_path / "set", n)
    found = []
    for size in (members.MAX_MEMBER_BYTES + 1, members.MAX_MEMBER_BYTES + 2, members.MAX_MEMBER_BYTES + 2):
        os.truncate(paths[1], size)
        read.clear()
        found.append(open_dataset(tmp_path / "set").fingerprint())
        assert str(paths[1]) in read
    assert found[0] != found[1] == found[2]
