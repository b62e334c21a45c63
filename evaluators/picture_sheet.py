"""Rows of pictures with a line of text each in, one PNG out: what lies beside the results of dense evaluators."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.errors import InputError
from evaluators.results import replacing

ROWS = 6
HEIGHT_PX, GAP_PX, CAPTION_PX = 192, 8, 24
MIN_WIDTH_PX, MAX_WIDTH_PX = 24, 480
UNKNOWN_GREY = 128
OVERLAY = 0.6
"""Share of a colour that is laid over a picture."""


def spread_picks(scores_n: np.ndarray, rows: int = ROWS) -> list[int]:
    """Indices of `rows` items, evenly spaced from the smallest score to the largest."""
    order = np.argsort(scores_n, kind="stable")
    picks = np.unique(np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int))
    return [int(order[pick]) for pick in picks]


def save_sheet(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> None:
    """Write rows of (caption, pictures uint8 [H, W, 3] in RGB); pictures of a row get one height, shapes kept."""
    strips = [captioned(strip(tiles), text) for text, tiles in rows]
    width = max(one.shape[1] for one in strips)
    sheet_HWC = np.concatenate(
        [cv2.copyMakeBorder(s, 0, GAP_PX, 0, width - s.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3) for s in strips]
    )
    save_png(path, cv2.cvtColor(sheet_HWC, cv2.COLOR_RGB2BGR))


def save_png(path: Path, picture_HWC: np.ndarray) -> None:
    """Write a picture as OpenCV holds it (BGR), whole or not at all. Raises InputError where it cannot be written."""
    encoded = cv2.imencode(".png", picture_HWC)[1]
    try:
        with replacing(path) as scratch:
            scratch.write_bytes(encoded.tobytes())
    except OSError as error:
        raise InputError(f"--out: cannot write {path} ({error.strerror}); name another place") from error


def strip(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side at one height."""
    parts: list[np.ndarray] = []
    for tile in tiles:
        width = int(np.clip(round(HEIGHT_PX * tile.shape[1] / tile.shape[0]), MIN_WIDTH_PX, MAX_WIDTH_PX))
        smaller = tile.shape[0] > HEIGHT_PX
        parts += [
            cv2.resize(tile, (width, HEIGHT_PX), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_NEAREST),
            np.full((HEIGHT_PX, GAP_PX, 3), 255, np.uint8),
        ]
    return np.concatenate(parts[:-1], axis=1)


def captioned(strip_HWC: np.ndarray, text: str) -> np.ndarray:
    """The strip below a line of text; what OpenCV's letters cannot show becomes `?`."""
    line = np.full((CAPTION_PX, strip_HWC.shape[1], 3), 255, np.uint8)
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(line, plain, (2, CAPTION_PX - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([line, strip_HWC])


def number_colours() -> np.ndarray:
    """A colour for each number, uint8 [256, 3] in RGB: 0 black, then those of the PASCAL VOC palette, all different."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(256):
        left = number
        for bit in range(7, -1, -1):  # three bits a round go to the next lower bit of red, green and blue
            for channel in range(3):
                colours[number, channel] |= ((left >> channel) & 1) << bit
            left >>= 3
    return colours


def numbers_over(image_HWC: np.ndarray, numbers_HW: np.ndarray) -> np.ndarray:
    """The image with each number's colour laid over it; 0 leaves it as it is, a number below 0 is grey."""
    numbers_HW = numbers_HW.astype(np.int64)
    colours = number_colours()[np.maximum(numbers_HW, 0) % 256].astype(np.float32)
    colours[numbers_HW < 0] = UNKNOWN_GREY
    mixed = (1 - OVERLAY) * image_HWC + OVERLAY * colours
    return np.where((numbers_HW == 0)[:, :, None], image_HWC, mixed.round().astype(np.uint8))


def heat(values_hw: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """A map as colours [H, W, 3] in RGB, enlarged without smoothing: its largest value bright, 0 dark."""
    levels = (values_hw / max(float(values_hw.max()), 1e-12) * 255).clip(0, 255).round().astype(np.uint8)
    coloured = cv2.applyColorMap(levels, cv2.COLORMAP_MAGMA)
    large: np.ndarray = cv2.resize(
        cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), (hw[1], hw[0]), interpolation=cv2.INTER_NEAREST
    )
    return large
