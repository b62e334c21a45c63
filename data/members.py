"""Where encoded bytes lie: a `Member` is a whole file or a range of one (of a tar shard or a zip archive).

A member is plain data and every read opens, reads and closes: there is no handle to share between threads, to leak in
a fork or to run out of. Tar and zip archives are listed once and never extracted, so no name in them becomes a path.
"""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from data.errors import InputError

MAX_MEMBER_BYTES = 256 * 2**20
"""Nothing larger is read into memory, whatever a listing says."""

_TAR_BLOCK = 512
_ZIP_HEADER = struct.Struct("<4s22xHH")
"""Local file header: signature, lengths of name and extra field (APPNOTE 4.3.7)."""


@dataclass(frozen=True, slots=True)
class Member:
    """Bytes of one file, or of one entry of an archive."""

    path: str
    """The file, or the archive."""
    offset: int = 0
    """First byte of the entry; of a zip entry, of its local header."""
    stored_bytes: int | None = None
    """Bytes to read; None means the whole file."""
    packing: str = "plain"
    """`plain`, or of a zip entry `stored` or `deflated`."""
    size: int | None = None
    """Bytes after unpacking, where known."""
    crc32: int | None = None
    """Checksum of the unpacked bytes, where known."""


def read_bytes(member: Member) -> bytes:
    """The member's bytes. Raises InputError when it has gone, shrunk, grown past the limit or fails its checksum."""
    try:
        with open(member.path, "rb", buffering=0) as file:
            if member.stored_bytes is None:
                return _read(file, MAX_MEMBER_BYTES + 1, member, exact=False)
            file.seek(member.offset)
            if member.packing == "plain":
                return _read(file, member.stored_bytes, member)
            signature, name_bytes, extra_bytes = _ZIP_HEADER.unpack(_read(file, _ZIP_HEADER.size, member))
            if signature != b"PK\3\4":
                raise InputError(f"{member.path}: no entry at byte {member.offset}; was the archive changed meanwhile?")
            file.seek(name_bytes + extra_bytes, 1)
            packed = _read(file, member.stored_bytes, member)
    except OSError as error:
        raise InputError(f"{member.path}: cannot be read ({error.strerror or error})") from error
    return _unpack(packed, member)


def member_bytes(member: Member) -> int:
    """Size in bytes after unpacking; of a plain file, its size now. Raises InputError when the file has gone."""
    if member.size is not None:
        return member.size
    try:
        return Path(member.path).stat().st_size
    except OSError as error:
        raise InputError(f"{member.path}: cannot be read ({error.strerror or error})") from error


def content_mark(member: Member) -> str:
    """Size and CRC-32 of a member's bytes, `SIZE CRC`, for a fingerprint. Raises InputError when it cannot be read.

    Where an archive knows its checksums nothing is read. Anything else is read as a whole: samples would be hardly
    faster (opening a file costs more than the checksum of a photograph) and would miss what changes between them.
    """
    if member.crc32 is not None:
        return f"{member_bytes(member)} {member.crc32}"
    data = read_bytes(member)
    return f"{len(data)} {zlib.crc32(data)}"


def _read(file: object, wanted: int, member: Member, exact: bool = True) -> bytes:
    if wanted > MAX_MEMBER_BYTES + 1:
        raise InputError(f"{member.path}: an entry of {wanted:,} bytes; at most {MAX_MEMBER_BYTES:,} are read")
    chunks, left = [], wanted
    while left and (chunk := file.read(min(left, 2**24))):  # type: ignore[attr-defined]
        chunks.append(chunk)
        left -= len(chunk)
    if exact and left:
        raise InputError(f"{member.path}: it ends {left:,} bytes early; copy it again")
    if wanted - left > MAX_MEMBER_BYTES:
        raise InputError(f"{member.path}: it has more than {MAX_MEMBER_BYTES:,} bytes; no image file is that large")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _unpack(packed: bytes, member: Member) -> bytes:
    size = member.size or 0
    data = packed
    if member.packing == "deflated":
        try:
            data = zlib.decompressobj(-15).decompress(packed, min(size, MAX_MEMBER_BYTES) + 1)
        except zlib.error as error:
            raise InputError(f"{member.path}: the entry at byte {member.offset} is damaged ({error})") from error
    if len(data) != size or zlib.crc32(data) != member.crc32:
        raise InputError(f"{member.path}: the entry at byte {member.offset} fails its checksum; copy the archive again")
    return data


def list_zip(path: Path) -> dict[str, Member]:
    """Entries of a zip archive by name. Raises InputError when it is damaged, encrypted, or names an entry twice."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{path}: cannot be read as a zip archive ({error}); copy or pack it again") from error
    members: dict[str, Member] = {}
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: {entry.filename} is encrypted or oddly compressed; pack it stored or deflated")
        check_entry_name(path, entry.filename)
        if entry.filename in members:
            raise InputError(f"{path}: it holds {entry.filename} twice; pack it again")
        packing = "stored" if entry.compress_type == zipfile.ZIP_STORED else "deflated"
        members[entry.filename] = Member(
            str(path), entry.header_offset, entry.compress_size, packing, entry.file_size, entry.CRC
        )
    return members


def list_tar(path: Path) -> Iterator[tuple[str, Member]]:
    """Name and member of each regular file of an uncompressed tar archive, in order.

    Raises InputError when the archive is compressed (its entries cannot be reached one by one) or ends early.
    """
    end = 0
    try:
        with tarfile.open(path, "r:", errorlevel=1) as archive:
            for entry in archive:
                end = entry.offset_data + -(-entry.size // _TAR_BLOCK) * _TAR_BLOCK
                if entry.isreg() and not entry.issparse():
                    check_entry_name(path, entry.name)
                    yield entry.name, Member(str(path), entry.offset_data, entry.size, "plain", entry.size)
        with open(path, "rb") as file:
            total = file.seek(0, 2)
            file.seek(end)
            rest = file.read(_TAR_BLOCK)
    except InputError:
        raise
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        hint = "unpack it first (gunzip)" if is_compressed(path) else "copy or pack it again"
        raise InputError(f"{path}: cannot be read as a tar archive ({error}); {hint}") from error
    # tarfile takes a damaged header after the first entry for the end of the archive
    if total < end or rest.strip(b"\0") or 0 < len(rest) < _TAR_BLOCK:
        raise InputError(f"{path}: the archive is damaged or ends early, at byte {min(total, end):,}; copy it again")


def check_entry_name(archive: Path, name: str) -> None:
    """Nothing is extracted, but names travel on into lists and reports, where they must not point elsewhere."""
    if ".." not in name and ":" not in name and not name.startswith(("/", "\\")):
        return  # at once, since a stream asks this of every image
    if name.startswith(("/", "\\")) or ".." in PureWindowsPath(name).parts or PureWindowsPath(name).drive:
        raise InputError(f"{archive}: {name!r} climbs out of the archive; pack it again with plain relative names")


def is_compressed(path: Path) -> bool:
    """Whether a file begins as gzip, bzip2, xz or zstd do."""
    try:
        with open(path, "rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    except OSError:
        return False
