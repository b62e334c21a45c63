"""Features in, memory-mapped files out, keyed by content: what was extracted once is never extracted again.

An entry is a folder `<root>/<key>/` with one `<column>.npy` a column. `progress.json` says how far a running
extraction got (a killed one goes on there); `meta.json` appears last, by rename, and makes the entry complete. The key
is a hash of everything the features depend on, so nothing is ever out of date. A lock file beside the entry keeps a
second process waiting until the first has finished, and then hands it the result. A complete entry is only read, without
the lock: it may lie where nothing can be written.

Disk space is taken before anything is written: a map of a file with holes is killed (SIGBUS) where a full disk cannot fill them.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import InputError

FORMAT = 1
"""Part of every key: raise it when the files or the meaning of a column change."""
_UNSOUND = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged entry raises."""


def cache_key(parts: Mapping[str, Any]) -> str:
    """Hash of what features depend on; `parts` is anything JSON can hold."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FeatureStore:
    """Columns that grow row by row, in memory or in a cache entry.

    Rows of the data set are visited in order; a row is either appended to every column or skipped with a reason.
    """

    def __init__(self, n_items: int, folder: Path | None = None) -> None:
        self.folder = folder
        self.n_items = n_items
        self.next_item = 0
        self.skipped: dict[int, str] = {}
        self.complete = False
        self._arrays: dict[str, np.ndarray] = {}
        if folder is not None:
            self._resume()

    @property
    def n_rows(self) -> int:
        """Rows held so far."""
        return self.next_item - len(self.skipped)

    def append(self, columns: Mapping[str, np.ndarray], n_items: int, skipped: Mapping[int, str]) -> None:
        """Add the features of the next `n_items` rows of the data set, of which `skipped` could not be read.

        Raises InputError where the disk has no room for all the columns; nothing of them is left then.
        """
        rows = n_items - len(skipped)
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = self._new_array(name, values.shape[1:])
            self._arrays[name][self.n_rows : self.n_rows + rows] = values
        self.skipped.update(skipped)
        self.next_item += n_items

    def save_progress(self) -> None:
        """Bring everything so far to disk, then note how far it goes (in this order: a note never runs ahead)."""
        if self.folder is None or self.complete:
            return
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self._write("progress.json")

    def finish(self) -> None:
        """Mark the entry complete."""
        if self.folder is not None and not self.complete:
            self.save_progress()
            self._write("meta.json")
            (self.folder / "progress.json").unlink(missing_ok=True)
        self.complete = True

    def discard(self) -> None:
        """Forget everything, files included: what was extracted is not fit to be kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def columns(self) -> dict[str, np.ndarray]:
        """Read-only views of the rows held, memory-mapped where they lie in a cache."""
        views = {name: array[: self.n_rows] for name, array in self._arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def _new_array(self, name: str, tail: tuple[int, ...]) -> np.ndarray:
        shape = (self.n_items, *tail)
        if self.folder is None:
            return np.empty(shape, dtype=np.float32)
        path = self.folder / f"{name}.npy"
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            _take_space(path)
        except OSError as error:
            self.discard()
            raise _not_written(self.folder.parent, error, 4 * math.prod(shape)) from error
        return array

    def _write(self, name: str) -> None:
        assert self.folder is not None
        body = {
            "n_items": self.n_items,
            "next_item": self.next_item,
            "skipped": {str(row): reason for row, reason in self.skipped.items()},
            "columns": {column: list(array.shape) for column, array in self._arrays.items()},
        }
        temporary = self.folder / f".{name}.tmp"
        try:
            with temporary.open("w") as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _not_written(self.folder.parent, error) from error

    def _resume(self) -> None:
        """Take up what an earlier process left; files that do not fit their own note are thrown away."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("meta.json", "progress.json"):
            try:
                self._take_up(json.loads((self.folder / name).read_text()), finished=name == "meta.json")
                return
            except FileNotFoundError:
                continue
            except InputError:  # no room to go on: what is there stays
                raise
            except _UNSOUND:
                break
        shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    @classmethod
    def completed(cls, n_items: int, folder: Path) -> "FeatureStore | None":
        """The complete entry in a folder, of which nothing is written or opened for writing; None where there is no sound one."""
        store = cls(n_items)
        store.folder = folder
        try:
            store._take_up(json.loads((folder / "meta.json").read_text()), finished=True)
        except _UNSOUND:
            return None
        return store

    def _take_up(self, body: dict[str, Any], finished: bool) -> None:
        assert self.folder is not None
        if body["n_items"] != self.n_items or (finished and body["next_item"] != self.n_items):
            raise ValueError("the note is about another set")
        arrays: dict[str, np.ndarray] = {}
        for name, shape in body["columns"].items():
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r" if finished else "r+", allow_pickle=False)
            if list(array.shape) != shape or array.dtype != np.float32:
                raise ValueError(f"{name}.npy is of another shape")
            if not finished:
                try:
                    _take_space(self.folder / f"{name}.npy")
                except OSError as error:
                    raise _not_written(self.folder.parent, error, array.nbytes) from error
            arrays[name] = array
        self._arrays = arrays
        self.next_item = int(body["next_item"])
        self.skipped = {int(row): str(reason) for row, reason in body["skipped"].items()}
        self.complete = finished


def _take_space(path: Path) -> None:
    """Fill the holes of a file, as far as its length goes. Raises OSError where the disk is full."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _take(lock: IO[str], root: Path) -> None:
    """Hold a lock file until it is closed; where another process holds it, say so and wait. Raises InputError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process extracts these features; waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(
            f"--cache-dir {root}: its disk takes no locks ({error.strerror}); name a folder on a local disk, or use --cache-dir None"
        ) from error


def _not_written(root: Path, error: OSError, wanted_bytes: int = 0) -> InputError:
    size = f" to a file of {wanted_bytes:,} bytes" if wanted_bytes else ""
    return InputError(
        f"--cache-dir {root}: cannot write there{size} ({error.strerror}); name another folder or use --cache-dir None"
    )


@contextmanager
def open_store(root: Path | None, key: str, n_items: int) -> Iterator[FeatureStore]:
    """The entry of `key`, locked while the block runs unless it is complete; without a root, a store in memory. Raises InputError."""
    if root is None:
        yield FeatureStore(n_items)
        return
    if (complete := FeatureStore.completed(n_items, root / key)) is not None:
        yield complete
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{key}.lock").open("w")
    except OSError as error:
        raise _not_written(root, error) from error
    with lock:
        _take(lock, root)
        try:
            store = FeatureStore(n_items, root / key)
        except OSError as error:
            raise _not_written(root, error) from error
        try:
            yield store
        finally:
            if store.folder is not None and store.folder.is_dir():
                store.save_progress()
