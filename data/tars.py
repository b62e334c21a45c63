"""An uncompressed tar archive read front to back: from one header to the next, without touching what lies between.

POSIX ustar and pax, GNU long names and sizes beyond 8 GiB. `tarfile` reads the same (tests compare them), but takes an archive for finished
where a header is damaged, remembers every entry, and needs several times as long for each, which counts when every process of a run walks
all headers of a hundred million images.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError
from data.members import Member, is_compressed

BLOCK = 512
"""Headers and contents begin at multiples of this many bytes."""
_MAX_EXTENSION_BYTES = 2**20
_REGULAR = b"0\07"
_WITHOUT_CONTENT = b"123456"
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file of a tar archive."""

    name: str
    member: Member
    end: int
    """Where the next header begins."""


def walk_tar(path: Path, start: int = 0) -> Iterator[Entry]:
    """The regular files of an archive in order, from the header at byte `start` on.

    Raises InputError at the first damage: a header whose checksum fails, an entry that runs past the end, a compressed
    archive, no mark of the end. What was yielded before is sound.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        yield from _entries(path, handle, os.fstat(handle).st_size, start)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    finally:
        os.close(handle)


def _entries(path: Path, handle: int, total: int, at: int) -> Iterator[Entry]:
    if total == 0:
        raise InputError(f"{path}: it is empty")
    extended: dict[str, str] = {}
    while at < total:
        header = os.pread(handle, BLOCK, at)
        if not header.strip(b"\0"):  # the mark of the end
            return
        size = _checked_size(path, header, at)
        kind = header[156:157]
        size = _pax_size(path, extended, size, at)
        begin = at + BLOCK
        at = begin if kind in _WITHOUT_CONTENT else begin + -(-size // BLOCK) * BLOCK
        if begin + size > total and kind not in _WITHOUT_CONTENT:
            raise _damaged(path, begin - BLOCK, "an entry runs past the end of the file")
        if kind in (_PAX, _GNU_LONG_NAME):
            if size > _MAX_EXTENSION_BYTES:
                raise _damaged(path, begin - BLOCK, f"a name of {size:,} bytes")
            content = os.pread(handle, size, begin)
            extended |= _pax_fields(content) if kind == _PAX else {"path": _text(content)}
            continue
        if kind in (_PAX_GLOBAL, _GNU_LONG_LINK):
            continue
        name, sparse = (
            extended.get("path") or _ustar_name(header),
            any(key.startswith("GNU.sparse") for key in extended),
        )
        extended = {}
        if kind == _GNU_SPARSE:
            raise _damaged(path, begin - BLOCK, "a sparse entry, which is not read")
        if kind in _REGULAR and not name.endswith("/") and not sparse:
            yield Entry(name, Member(str(path), begin, size, "plain", size), at)
    raise _damaged(path, total, "the mark of the end is missing, so it may have been cut")


def _checked_size(path: Path, header: bytes, at: int) -> int:
    """Size in bytes that a header states, after its checksum was held against it."""
    try:
        told = int(header[148:156].strip(b"\0 "), 8)
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except (ValueError, IndexError):
        told, size = -1, 0
    # the checksum field itself counts as eight spaces
    if len(header) < BLOCK or told != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        hint = "it is compressed; unpack it first (gunzip)" if at == 0 and is_compressed(path) else "no sound header"
        raise _damaged(path, at, hint)
    return size


def _pax_size(path: Path, extended: dict[str, str], size: int, at: int) -> int:
    told = extended.get("size")
    if told is None:
        return size
    if not told.isdecimal() or len(told) > 18:
        raise _damaged(path, at, f"a size of {told[:20]!r}")
    return int(told)


def _pax_fields(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE newline`; what does not parse ends the list."""
    fields: dict[str, str] = {}
    while content:
        length, space, _ = content[:20].partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(content)):
            break
        key, _, value = content[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        fields[_text(key)] = _text(value)
        content = content[int(length) :]
    return fields


def _ustar_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _damaged(path: Path, at: int, what: str) -> InputError:
    return InputError(f"{path}: damaged at byte {at:,} ({what}); what lies behind it is passed over")
