"""Files in, what their bytes are like out (size and checksum), remembered so that a large set is read once and not at every start.

A file counts as unchanged while its size, its inode and both its times (of content and of status, in nanoseconds) are: what git goes by.
Status times cannot be set back by a program, so a file that was overwritten and given its old date is read again. A file younger than
`SETTLED_S` when it was read is not remembered, since it may be written again within one tick of the clock.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.members import Member, content_mark

REMEMBERED_FROM = 256
"""Fewer files are read each time: that takes no longer than asking."""
SETTLED_S = 2.0


def content_marks(members: Sequence[Member]) -> list[str]:
    """`members.content_mark` of each. Raises InputError where one cannot be read."""
    unknown = [member.path for member in members if member.crc32 is None]
    if len(unknown) < REMEMBERED_FROM:
        return [content_mark(member) for member in members]
    common = os.path.commonpath([os.path.dirname(path) for path in (min(unknown), max(unknown))])
    notes = _notes_file(os.path.abspath(common))
    before, now_ns, after = _read(notes), time.time_ns(), {}
    states: dict[str, list[int]] = {}
    marks = []
    for member in members:
        if member.crc32 is not None:
            marks.append(content_mark(member))
            continue
        state = states.get(member.path)
        if state is None:
            state = states[member.path] = _state(member.path)
        key = f"{member.path[len(common) :]}@{member.offset}+{member.stored_bytes}"
        known = before.get(key)
        mark = known[1] if known and known[0] == state else content_mark(member)
        if max(state[2:]) < now_ns - SETTLED_S * 1e9:
            after[key] = [state, mark]
        marks.append(mark)
    if after != before:
        _write(notes, after)
    return marks


def _state(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _notes_file(common: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoscope" / "marks"
    return root / f"{hashlib.sha256(os.fsencode(common)).hexdigest()[:32]}.json"


def _read(notes: Path) -> dict[str, Any]:
    """What was remembered; nothing where it is absent or damaged."""
    try:
        found = json.loads(notes.read_text())
        assert all(isinstance(state, list) and isinstance(mark, str) for state, mark in found.values())
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError):
        return {}
    return dict(found)


def _write(notes: Path, marks: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    scratch = notes.with_name(f".{notes.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        notes.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(marks))
        os.replace(scratch, notes)
