"""One safe decoder: the bytes of an image file in, an upright RGB array out, or a `DecodeError` with a reason.

The size is read from the header and held against the limits before a pixel is decoded. JPEG goes through OpenCV (the
fastest), everything else and the rare kinds of JPEG (CMYK) through Pillow. A JPEG without its end marker counts as
truncated: neither decoder can tell whether its last rows came. No global setting of either library is touched and no
state is kept, so any thread may decode. Pillow's warnings are silenced once, at import: what is wrong comes as an error.

What becomes of unusual files: EXIF orientation is applied; transparency is laid over white; gray, palette and CMYK
become RGB; of 16-bit samples the high byte is kept; of an animation the first frame.
"""

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

import cv2
import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from data.errors import InputError
from data.headers import (
    ACCEPTED,
    JpegHeader,
    image_format,
    read_jpeg_header,
    tiff_is_truncated,
    webp_is_truncated,
    webp_size,
)

Reason = Literal[
    "empty",
    "too_many_bytes",
    "not_an_image",
    "unsupported",
    "truncated",
    "corrupt",
    "too_many_pixels",
    "too_small",
]

MAX_JPEG_SCANS = 200
"""A progressive JPEG has about 10 scans; thousands of empty ones keep the decoder busy for hours."""

MAX_FULL_SCANS = 20
"""Scans that an image of the most pixels may have; a smaller one may have more, in proportion."""

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_EXIF_ORIENTATION = 274
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_TIFF_WHITE_IS_ZERO = 0

warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(InputError):
    """An image file that cannot be used; `reason` is one of a fixed set of words, the message is for people."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What a file may cost at most."""

    max_bytes: int = 32 * 2**20
    """Size of the encoded file."""
    max_pixels: int = 64_000_000
    """Width times height; RGB of this many pixels takes three times as many bytes."""
    min_side_px: int = 2
    """Shortest side: below it there is nothing to see."""


DEFAULT_LIMITS = DecodeLimits()


Shrink = Callable[[int, int], int]
"""Height and width of the upright image in, by how much it may be shrunk out: 1, 2, 4 or 8."""
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,  # the flags combine to colour, halved, in the order RGB
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


def decode_image(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS, shrink: Shrink | None = None) -> np.ndarray:
    """Decode JPEG, PNG, WebP, BMP or TIFF to upright RGB, uint8 [H,W,3], contiguous. Raises DecodeError.

    `shrink` is asked once, before any pixel is decoded; all formats then come out smaller by its answer, rounded up.
    """
    if not data:
        raise DecodeError("empty", f"the image is empty (0 bytes); send a {_one_of(ACCEPTED)} file")
    if len(data) > limits.max_bytes:
        raise DecodeError(
            "too_many_bytes",
            f"the image file has {len(data):,} bytes, at most {limits.max_bytes:,} are accepted; send a smaller one",
        )
    found = image_format(data)
    if found is None:
        raise DecodeError("not_an_image", f"these bytes are no image; wanted a {_one_of(ACCEPTED)} file")
    if found not in ACCEPTED:
        raise DecodeError("unsupported", f"{found} is not accepted; convert it to {_one_of(ACCEPTED)}")
    try:
        if found == "JPEG":
            return _decode_jpeg(data, limits, shrink)
        return _shrunk(_decode_with_pillow(found, data, limits), shrink)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen types on hostile bytes, down to IndexError
        _refuse(found, data, error)


def _decode_jpeg(data: bytes, limits: DecodeLimits, shrink: Shrink | None) -> np.ndarray:
    header = read_jpeg_header(data)
    _check_size(header.width, header.height, limits)
    if header.scans > MAX_JPEG_SCANS:
        raise DecodeError("corrupt", f"this JPEG has {header.scans} scans, at most {MAX_JPEG_SCANS} make sense")
    if header.scans * header.width * header.height > MAX_FULL_SCANS * limits.max_pixels:
        raise DecodeError(
            "corrupt", f"this JPEG has {header.scans} scans of {header.width}x{header.height} pixels; save it anew"
        )
    if header.precision_bits != 8:
        raise DecodeError("unsupported", f"JPEG of {header.precision_bits} bits is not accepted; save it with 8 bits")
    if not header.complete:
        raise DecodeError("truncated", "this JPEG has no end marker, so it ends early; send the whole file")
    if header.components not in (1, 3):
        return _shrunk(_decode_with_pillow("JPEG", data, limits), shrink)
    orientation = _jpeg_orientation(header)
    stored = (header.height, header.width)
    factor = shrink(*(stored[::-1] if orientation in (5, 6, 7, 8) else stored)) if shrink else 1
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.shape[:2] != tuple(-(-side // factor) for side in stored):
        raise DecodeError("corrupt", "this JPEG is damaged: its pixels cannot be decoded; save it again")
    return turn_upright(image, orientation)


def _shrunk(image_HWC: np.ndarray, shrink: Shrink | None) -> np.ndarray:
    """What a JPEG decoder does on its way, for the formats whose decoders do not."""
    height, width = image_HWC.shape[:2]
    factor = shrink(height, width) if shrink else 1
    if factor == 1:
        return image_HWC
    return cv2.resize(image_HWC, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA)


def _decode_with_pillow(name: str, data: bytes, limits: DecodeLimits) -> np.ndarray:
    if name == "WebP":  # Pillow's plugin allocates the canvas as soon as it opens the file
        _check_size(*webp_size(data), limits)
        if webp_is_truncated(data):
            raise DecodeError("truncated", "this WebP ends early; send the whole file")
    image = _PLUGINS[name](io.BytesIO(data))  # the class itself: Image.open guesses formats and warns
    _check_size(*image.size, limits)
    _check_tiles(image, limits)
    image.load()
    orientation = _orientation(image)
    return turn_upright(_to_rgb(image), orientation)


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels:
        raise DecodeError(
            "too_many_pixels",
            f"the image has {width}x{height} pixels, at most {limits.max_pixels:,} in all are accepted; scale it down",
        )
    if min(width, height) < limits.min_side_px:
        raise DecodeError(
            "too_small",
            f"the image has {width}x{height} pixels, each side needs at least {limits.min_side_px}; send a bigger one",
        )


def _check_tiles(image: ImageFile.ImageFile, limits: DecodeLimits) -> None:
    """A TIFF of 10x10 pixels may ask for a tile of gigabytes."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (int(image.tag_v2.get(tag, 0)) for tag in (322, 323))
        if width * height > limits.max_pixels:
            raise DecodeError("too_many_pixels", f"this TIFF has tiles of {width}x{height} pixels; save it in strips")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any mode that Pillow decodes to uint8 [H,W,3]; transparency over white."""
    if image.mode.startswith("I;16"):
        return _gray16_to_rgb(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        kind = {"I": "32-bit or signed", "F": "floating-point"}.get(image.mode, image.mode)
        raise DecodeError("unsupported", f"{kind} samples have no agreed white; save the image with 8 or 16 bits")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        straight = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(straight.convert("RGB"), mask=straight.getchannel("A"))
        return np.array(white)
    return np.array(image.convert("RGB"))


def _gray16_to_rgb(image: Image.Image) -> np.ndarray:
    samples = np.array(image).astype(np.uint16)  # native byte order
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(_TIFF_BITS, (16,))
    gray = (samples >> (int(bits[0] if isinstance(bits, tuple) else bits) - 8)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        gray = 255 - gray
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[samples == key] = 255
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def turn_upright(image_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; anything else means upright). Contiguous [H,W,3] or [W,H,3]."""
    if orientation in (5, 6, 7, 8):
        image_HWC = image_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return np.ascontiguousarray(image_HWC)


def _jpeg_orientation(header: JpegHeader) -> int:
    return _exif_orientation(header.exif) if header.exif else 1


def _orientation(image: ImageFile.ImageFile) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        value = image.tag_v2.get(_EXIF_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    block = image.info.get("exif", b"")
    return _exif_orientation(block.removeprefix(b"Exif\0\0")) if isinstance(block, bytes) else 1


def _exif_orientation(block: bytes) -> int:
    """The orientation tag of a TIFF-structured EXIF block; 1 where there is none or the block is broken."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, directory)
        for k in range(min(entries, 512)):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", block, directory + 2 + 12 * k)
            if tag == _EXIF_ORIENTATION:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _refuse(name: str, data: bytes, error: Exception) -> NoReturn:
    """Sort what a plugin raised into our reasons."""
    if isinstance(error, MemoryError):
        raise DecodeError("too_many_pixels", f"this {name} needs more memory than there is; scale it down") from error
    if name == "TIFF" and tiff_is_truncated(data):  # Pillow passes over the tags that are missing and stumbles later
        raise DecodeError("truncated", "this TIFF ends before its tags do; send the whole file") from error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in text.lower() or "ends before" in text or "past the end" in text:
        raise DecodeError("truncated", f"this {name} ends early ({text}); send the whole file") from error
    if isinstance(error, NotImplementedError) or "unsupported" in text.lower() or "unknown pixel mode" in text.lower():
        raise DecodeError("unsupported", f"this kind of {name} is not read ({text}); save it as 8-bit RGB") from error
    raise DecodeError("corrupt", f"this {name} is damaged ({text}); save it again") from error


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
