"""Image files for requests: good ones, and those that a server must refuse."""

import struct
import zlib
from functools import cache

import cv2
import numpy as np


def picture(seed: int, height: int = 80, width: int = 100) -> np.ndarray:
    """Soft random blotches, uint8 [H,W,3]; each seed another picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def png(seed: int, height: int = 80, width: int = 100) -> bytes:
    return encode(".png", picture(seed, height, width))


def jpeg(seed: int, height: int = 80, width: int = 100) -> bytes:
    return encode(".jpg", picture(seed, height, width))


def encode(suffix: str, image_HWC: np.ndarray) -> bytes:
    done, data = cv2.imencode(suffix, image_HWC)
    assert done
    return data.tobytes()


@cache
def bomb(side: int = 20_000) -> bytes:
    """A true PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "a text file renamed .jpg": (lambda: b"Dear Sir or Madam, this is no picture.\n" * 20, "no image"),
    "a JPEG cut in half": (lambda: jpeg(1)[: len(jpeg(1)) // 2], "ends early|damaged|past the end"),
    "a JPEG cut in its header": (lambda: jpeg(1)[:60], "ends|past the end|damaged"),
    "a PNG cut in half": (lambda: png(1)[: len(png(1)) // 2], "ends early|damaged"),
    "an image of one pixel": (lambda: encode(".png", np.zeros((1, 1, 3), np.uint8)), "1x1 pixels"),
    "20000 x 20000 pixels": (bomb, "20000x20000 pixels"),
    "no bytes at all": (lambda: b"", "empty"),
    "a GIF": (lambda: b"GIF89a" + bytes(40), "GIF is not accepted"),
}
"""What it is: (its bytes, what the error must say)."""
