"""Small pictures made by formula, and their encodings, for the tests of this room."""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image


def gradient(height: int = 24, width: int = 36) -> np.ndarray:
    """A smooth uint8 [H,W,3] picture without symmetry: red grows to the right, green downwards, blue has a corner."""
    y, x = np.mgrid[0:height, 0:width]
    blue = np.where((y < height // 3) & (x < width // 3), 220, 30)
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), blue], axis=2).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,3] without structure."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a file in a format that Pillow writes."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block with nothing in it but the orientation."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    block = head + struct.pack(f"{order}IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + block


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores so that the given EXIF orientation shows `upright` (CIPA DC-008, table of orientations)."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # shown after a turn to the right
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation].copy()
