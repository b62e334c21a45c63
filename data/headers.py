"""What the first bytes of an image file say, read without decoding a pixel.

`image_format` names the format; `read_jpeg_header` and `webp_size` give the size before a decoder allocates anything
(the other formats are read lazily by Pillow, which does the same). Sources: ITU-T T.81 annex B, RFC 9649, TIFF 6.0.
"""

import re
import struct
from dataclasses import dataclass

ACCEPTED = ("JPEG", "PNG", "WebP", "BMP", "TIFF")

_MAGIC: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "GIF": (b"GIF87a", b"GIF89a"),
    "PDF": (b"%PDF-",),
    "PSD": (b"8BPS",),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "SVG": (b"<svg",),
    "ICO": (b"\0\0\1\0",),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
}
_HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}

_TIFF_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
_MAX_TIFF_TAGS = 65_535
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))
MAX_SEGMENTS = 10_000
"""A photograph has some dozens; millions of empty ones would only cost time."""
_NOT_FILL = re.compile(rb"[^\xff]")
_NEXT_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""Inside a scan 0xFF is followed by 0 or a restart marker; anything else ends the scan."""


class HeaderError(ValueError):
    """The header breaks its format's rules; the message says where."""


@dataclass(frozen=True)
class JpegHeader:
    """What the markers of a JPEG file say."""

    width: int
    height: int
    components: int
    precision_bits: int
    sof: int
    """Marker of the frame: 0xC0 baseline, 0xC2 progressive."""
    exif: bytes
    """Payload of the first EXIF segment without its `Exif00` prefix, or nothing."""
    scans: int
    complete: bool
    """Whether an end-of-image marker follows the last scan."""


def image_format(data: bytes) -> str | None:
    """The name of the format by its magic bytes, or None where it is no image known here."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return _HEIF_BRANDS[data[8:12]]
    return next((name for name, magics in _MAGIC.items() if data.startswith(magics)), None)


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Walk all markers of a JPEG file. Raises HeaderError where the structure is broken before its first scan."""
    frame: tuple[int, int, int, int, int] | None = None
    exif, scans, position = b"", 0, 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _marker_at(data, position)
        if marker == 0xD9 or marker is None:
            break
        if marker in _STANDALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            if frame and scans:
                marker = None
                break
            raise HeaderError(f"a segment at byte {position} runs past the end of the file")
        body = data[position + 2 : position + length]
        position += length
        if marker in _SOF and frame is None and len(body) >= 6:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            frame = (width, height, body[5], body[0], marker)
        elif marker == 0xE1 and not exif and body.startswith(b"Exif\0"):
            exif = body[6:]
        elif marker == 0xDA:
            scans += 1
            found = _NEXT_MARKER.search(data, position)
            if found is None:
                marker = None
                break
            position = found.start()
    else:
        raise HeaderError(f"it has more than {MAX_SEGMENTS} segments")
    if frame is None or not scans:
        raise HeaderError("it ends before its first scan")
    width, height, components, precision, sof = frame
    return JpegHeader(width, height, components, precision, sof, exif, scans, complete=marker == 0xD9)


def _marker_at(data: bytes, position: int) -> tuple[int | None, int]:
    """The marker at or after `position` and the byte after it; None at the end of the file."""
    start = data.find(b"\xff", position)
    if start < 0:
        return None, len(data)
    found = _NOT_FILL.search(data, start)
    return (found[0][0], found.end()) if found else (None, len(data))


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP file's canvas, px. Raises HeaderError where the first chunk is none that WebP has."""
    chunk, body = data[12:16], data[20:30]
    if len(body) == 10 and chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if len(body) >= 5 and chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise HeaderError("its first chunk is none of VP8, VP8L and VP8X")


def webp_is_truncated(data: bytes) -> bool:
    """Whether fewer bytes came than the RIFF header announces."""
    return len(data) < 8 + int.from_bytes(data[4:8], "little")


def tiff_is_truncated(data: bytes) -> bool:
    """Whether the first directory of a TIFF or BigTIFF, or a value that it points to, lies beyond the end of the file."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    counter, pointer = ("Q", "Q") if big else ("H", "I")
    try:
        (directory,) = struct.unpack_from(f"{order}{pointer}", data, 8 if big else 4)
        (entries,) = struct.unpack_from(f"{order}{counter}", data, directory)
        entry = struct.Struct(f"{order}HH{pointer}{pointer}")
        start = directory + struct.calcsize(counter)
        for kind, count, at in (
            entry.unpack_from(data, start + k * entry.size)[1:] for k in range(min(entries, _MAX_TIFF_TAGS))
        ):
            size = count * _TIFF_VALUE_BYTES.get(kind, 0)
            if size > struct.calcsize(pointer) and at + size > len(data):
                return True
    except struct.error:
        return True
    return False
