"""Files in, what their bytes are like out (size and checksum), remembered so that a large set is read once and not at every start.

A file counts as unchanged while its size, its inode and both its times (of content and of status, in nanoseconds) are: what git goes by.
Status times cannot be set back by a program, so a file that was overwritten and given its old date is read again. A file younger than
`SETTLED_S` when it was read is not remembered, since it may be written again within one tick of the clock.
Legend: n files.
"""

import hashlib
import itertools
import os
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.members import Member, content_mark, member_bytes

REMEMBERED_FROM = 256
"""Fewer files are read each time: that takes no longer than asking."""
SETTLED_S = 2.0
UNREAD = -1
"""In place of the checksum of a file that cannot be read; never remembered."""


@dataclass(frozen=True)
class Notes:
    """What is remembered of files below one folder."""

    keys: list[str]
    """Path from that folder on, and which part of the file."""
    states_n4: np.ndarray
    """int64: size, inode, times of content and of status in nanoseconds, as they were when the file was read."""
    marks_n2: np.ndarray
    """int64: size in bytes and CRC-32."""


def content_marks(members: Sequence[Member]) -> list[str]:
    """`mark_of` each. Raises InputError where one has gone."""
    unknown = [member for member in members if member.crc32 is None]
    if len(unknown) < REMEMBERED_FROM:
        return [mark_of(member) for member in members]
    paths = [member.path for member in unknown]
    common = os.path.commonpath([os.path.dirname(path) for path in (min(paths), max(paths))])
    file, now_ns = _notes_file(os.path.abspath(common)), time.time_ns()
    keys = [f"{member.path[len(common) :]}@{member.offset}+{member.stored_bytes}" for member in unknown]
    states_n4, before = _states(paths), _read(file)
    marks_n2, known_n = _remembered(before, keys, states_n4)
    for row in np.flatnonzero(~known_n).tolist():
        marks_n2[row] = [int(part) for part in mark_of(unknown[row]).split()]
    settled_n = (states_n4[:, 2:].max(axis=1) < now_ns - SETTLED_S * 1e9) & (marks_n2[:, 1] != UNREAD)
    if not known_n[settled_n].all():
        _write(file, _merged(before, keys, states_n4, marks_n2, settled_n))
    found = iter([f"{size} {crc}" for size, crc in marks_n2.tolist()])
    return [next(found) if member.crc32 is None else mark_of(member) for member in members]


def mark_of(member: Member) -> str:
    """`members.content_mark`; of a file that is there and cannot be read, or is too large to be, `SIZE UNREAD`.

    Whoever wants its image is told then, and may do without it. Raises InputError where the file has gone.
    """
    try:
        return content_mark(member)
    except InputError:
        return f"{member_bytes(member)} {UNREAD}"


def _remembered(notes: Notes, keys: Sequence[str], states_n4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks [n, 2] of the files that are as they were when they were read, and which these are."""
    rows = {key: row for row, key in enumerate(notes.keys)}
    at_n = np.array([rows.get(key, -1) for key in keys], np.int64)
    marks_n2, known_n = np.zeros((len(keys), 2), np.int64), at_n >= 0
    known_n[known_n] = (notes.states_n4[at_n[known_n]] == states_n4[known_n]).all(axis=1)
    marks_n2[known_n] = notes.marks_n2[at_n[known_n]]
    return marks_n2, known_n


def _merged(
    before: Notes, keys: Sequence[str], states_n4: np.ndarray, marks_n2: np.ndarray, settled_n: np.ndarray
) -> Notes:
    """What is worth remembering now, and all that was remembered of other files: of another part of the same folder, say."""
    own = set(keys)
    kept = [row for row, key in enumerate(before.keys) if key not in own]
    return Notes(
        [before.keys[row] for row in kept] + [keys[row] for row in np.flatnonzero(settled_n).tolist()],
        np.concatenate([before.states_n4[kept], states_n4[settled_n]]),
        np.concatenate([before.marks_n2[kept], marks_n2[settled_n]]),
    )


def _states(paths: Sequence[str]) -> np.ndarray:
    """int64 [n, 4]: see `Notes`. Asked from within each folder, since to follow a long path takes longer than the answer."""
    distinct = list(dict.fromkeys(paths))  # all entries of an archive share theirs
    states: list[tuple[int, int, int, int]] = []
    for above, below in itertools.groupby(distinct, lambda path: path.rpartition(os.sep)[0]):
        files = list(below)
        cut = len(files[0]) - len(files[0].rpartition(os.sep)[2])
        try:
            folder = os.open(above or files[0][:cut] or ".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
            try:
                found = [os.stat(path[cut:], dir_fd=folder) for path in files]
            finally:
                os.close(folder)
        except OSError as error:
            raise InputError(
                f"{os.path.join(above, error.filename)}: cannot be read ({error.strerror or error})"
            ) from error
        states += [(one.st_size, one.st_ino, one.st_mtime_ns, one.st_ctime_ns) for one in found]
    states_n4 = np.array(states, np.int64)
    if len(distinct) == len(paths):
        return states_n4
    rows = {path: row for row, path in enumerate(distinct)}
    return states_n4[[rows[path] for path in paths]]


def _notes_file(common: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope" / "marks"
    return root / f"{hashlib.sha256(os.fsencode(common)).hexdigest()[:32]}.npz"


def _read(file: Path) -> Notes:
    """What was remembered; nothing where it is absent or damaged."""
    nothing = Notes([], np.zeros((0, 4), np.int64), np.zeros((0, 2), np.int64))
    try:
        with np.load(file, allow_pickle=False) as arrays:
            keys = arrays["keys"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            notes = Notes(keys, arrays["states"], arrays["marks"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return nothing
    fits = notes.states_n4.shape == (len(keys), 4) and notes.marks_n2.shape == (len(keys), 2)
    return notes if fits and notes.states_n4.dtype == notes.marks_n2.dtype == np.int64 else nothing


def _write(file: Path, notes: Notes) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    keys = np.frombuffer("\0".join(notes.keys).encode("utf-8", "surrogateescape"), np.uint8)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as body:
            np.savez(body, keys=keys, states=notes.states_n4, marks=notes.marks_n2)
        os.replace(scratch, file)
    with suppress(OSError):
        scratch.unlink()
