"""The cache holds what was finished, goes on where a killed extraction stopped, and trusts nothing that is damaged."""

import builtins
import errno
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError
from evaluators.feature_cache import FeatureStore, cache_key, open_store

KEY = "k"


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    values = np.arange(start, stop, dtype=np.float32)
    return {"embedding": np.stack([values, values + 0.5], axis=1), "patch_mean": values[:, None]}


def fill(root: Path, stop_after: int | None = None) -> None:
    with open_store(root, KEY, 10) as store:
        while store.next_item < 10:
            if stop_after is not None and store.next_item >= stop_after:
                raise KeyboardInterrupt
            store.append(rows(store.next_item, store.next_item + 2), 2, {})
        store.finish()


def test_key_changes_with_any_part_and_not_with_their_order() -> None:
    parts = {"weights": "a", "preprocess": {"size_px": 224}, "data": "d"}
    assert cache_key(parts) == cache_key(dict(reversed(parts.items())))
    others = [parts | {"weights": "b"}, parts | {"preprocess": {"size_px": 225}}, parts | {"data": "e"}]
    assert len({cache_key(p) for p in [parts, *others]}) == 4


def test_a_finished_entry_is_read_back_memory_mapped_and_read_only(tmp_path: Path) -> None:
    fill(tmp_path)
    with open_store(tmp_path, KEY, 10) as store:
        assert store.complete
        embedding = store.columns()["embedding"]
    np.testing.assert_array_equal(embedding, rows(0, 10)["embedding"])
    assert isinstance(embedding, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        embedding[0] = 0


def test_a_stopped_extraction_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, stop_after=4)
    with open_store(tmp_path, KEY, 10) as store:
        assert not store.complete
        assert store.next_item == 4
    fill(tmp_path)
    with open_store(tmp_path, KEY, 10) as store:
        np.testing.assert_array_equal(store.columns()["patch_mean"], rows(0, 10)["patch_mean"])


def test_rows_written_after_the_last_note_are_written_again(tmp_path: Path) -> None:
    store = FeatureStore(10, tmp_path / KEY)
    store.append(rows(0, 2), 2, {})
    store.save_progress()
    store.append({name: values * 0 - 1 for name, values in rows(2, 4).items()}, 2, {})
    del store  # killed: no note about rows 2 and 3
    fill(tmp_path)
    with open_store(tmp_path, KEY, 10) as store:
        np.testing.assert_array_equal(store.columns()["embedding"], rows(0, 10)["embedding"])


def test_skipped_rows_leave_no_gap_and_are_remembered(tmp_path: Path) -> None:
    with open_store(tmp_path, KEY, 4) as store:
        store.append({name: values[[0, 2]] for name, values in rows(0, 3).items()}, 3, {1: "corrupt"})
        store.append(rows(3, 4), 1, {})
        store.finish()
    with open_store(tmp_path, KEY, 4) as store:
        assert store.skipped == {1: "corrupt"}
        assert store.columns()["patch_mean"][:, 0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("damage", ["meta", "array", "empty", "missing"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    array = tmp_path / KEY / "embedding.npy"
    if damage == "meta":
        (tmp_path / KEY / "meta.json").write_text("{")
    elif damage == "array":
        array.write_bytes(array.read_bytes()[:-8])
    elif damage == "empty":
        array.write_bytes(b"")
    else:
        array.unlink()
    fill(tmp_path)
    with open_store(tmp_path, KEY, 10) as store:
        np.testing.assert_array_equal(store.columns()["embedding"], rows(0, 10)["embedding"])


def test_a_second_process_waits_for_the_first_and_finds_its_work_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entered = threading.Event()

    def slow() -> None:
        with open_store(tmp_path, KEY, 10) as store:
            entered.set()
            time.sleep(0.3)
            store.append(rows(0, 10), 10, {})
            store.finish()

    worker = threading.Thread(target=slow)
    worker.start()
    entered.wait()
    with open_store(tmp_path, KEY, 10) as store:
        assert store.complete
    worker.join()
    assert capsys.readouterr().err == "another process extracts these features; waiting for it\n"
    with open_store(tmp_path, KEY, 10):
        assert capsys.readouterr().err == ""


def test_a_disk_that_takes_no_locks_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(
        InputError, match=r"its disk takes no locks \(No locks available\); name a folder on a local disk"
    ):
        fill(tmp_path)


def test_without_a_root_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(None, KEY, 2) as store:
        store.append(rows(0, 2), 2, {})
        store.finish()
        assert store.columns()["embedding"].shape == (2, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache-dir"), open_store(tmp_path / "file", KEY, 2):
        pass


def test_a_complete_entry_is_used_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only disk whatever opens a file for writing, makes a folder or takes a lock fails."""
    fill(tmp_path)
    (tmp_path / f"{KEY}.lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    read_only_disk(monkeypatch)
    with open_store(tmp_path, KEY, 10) as store:
        assert store.complete
        np.testing.assert_array_equal(store.columns()["embedding"], rows(0, 10)["embedding"])
        store.finish()
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


@pytest.mark.parametrize("damage", ["half done", "damaged", "absent"])
def test_an_entry_that_has_to_be_written_to_a_read_only_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    if damage == "half done":
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path, stop_after=4)
    elif damage == "damaged":
        fill(tmp_path)
        (tmp_path / KEY / "embedding.npy").write_bytes(b"")
    read_only_disk(monkeypatch)
    with pytest.raises(InputError, match=r"cannot write there \(Read-only file system\); name another folder or use"):
        fill(tmp_path)


def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be opened for writing any more, whoever asks: permissions do not bind root."""
    real_open, real_os_open = io.open, os.open

    def refused() -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_(file: Any, mode: str = "r", *args: Any, **others: Any) -> Any:
        if set(mode) & set("wax+"):
            raise refused()
        return real_open(file, mode, *args, **others)

    def os_open(path: Any, flags: int, *args: Any, **others: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise refused()
        return real_os_open(path, flags, *args, **others)

    def change(*_: Any, **__: Any) -> Any:
        raise refused()

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", open_)
    monkeypatch.setattr(os, "open", os_open)
    for name in ("replace", "unlink", "rmdir", "utime"):
        monkeypatch.setattr(os, name, change)


def test_disk_space_is_taken_before_a_row_is_written(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot take space ahead")
    store = FeatureStore(100_000, tmp_path / KEY)
    store.append(rows(0, 2), 2, {})
    files = [(tmp_path / KEY / f"{name}.npy").stat() for name in ("embedding", "patch_mean")]
    assert [file.st_blocks * 512 >= file.st_size > 400_000 for file in files] == [True, True]


def full_disk(monkeypatch: pytest.MonkeyPatch, files_that_fit: int) -> None:
    left = iter(range(files_that_fit))

    def take(*_: object) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", take, raising=False)


def test_a_full_disk_is_one_clear_error_and_takes_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, files_that_fit=1)
    with pytest.raises(
        InputError, match=r"cannot write there to a file of 40 bytes \(No space left on device\); name another"
    ):
        fill(tmp_path)
    assert not (tmp_path / KEY).exists()


def test_what_was_extracted_is_kept_when_the_disk_is_full_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, stop_after=4)
    with monkeypatch.context() as patched:
        full_disk(patched, files_that_fit=0)
        with pytest.raises(InputError, match="No space left on device"):
            fill(tmp_path)
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        full_disk(patched, files_that_fit=9)
        with pytest.raises(InputError, match="No space left on device"):
            fill(tmp_path)
    with open_store(tmp_path, KEY, 10) as store:
        assert store.next_item == 4
    assert not list((tmp_path / KEY).glob(".*")), "nothing half written is left"
