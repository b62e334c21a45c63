"""Images with measured and predicted depth in, one PNG out: image | measured | predicted, from the best to the worst.

Near is bright and far is dark, both maps of a row on the scale of the measured one; grey is where nothing was measured.
"""

from pathlib import Path

import cv2
import numpy as np

from backbones.heads import DepthHead
from data.datasets import Dataset
from evaluators.depth_probe import DepthTable, predict_depth
from evaluators.results import replacing

ROWS = 6
HEIGHT_PX, GAP_PX, CAPTION_PX = 192, 8, 24
UNKNOWN_GREY = 128


def save_comparison(
    path: Path, head: DepthHead, test: DepthTable, images: Dataset, predictions: dict[str, np.ndarray]
) -> None:
    """Write the sheet of `ROWS` test images, evenly spaced in the order of their error.

    `predictions` holds `rows` of `test` and their `abs_rel`; names of `test` are looked up in `images`.
    """
    order = np.argsort(predictions["abs_rel"], kind="stable")
    picks = order[np.unique(np.linspace(0, len(order) - 1, min(ROWS, len(order))).round().astype(int))]
    index = {item.name: number for number, item in enumerate(images.items)}
    strips = []
    for pick in picks:
        row = int(predictions["rows"][pick])
        name, measured_HW = test.names[row], test.depth_m[row]
        tiles = depth_strip(images.image(index[name]), measured_HW, predict_depth(head, test, row))
        known = measured_HW[measured_HW > 0]
        error = predictions["abs_rel"][pick]
        strips.append(captioned(tiles, f"{name}   abs_rel {error:.3f}   {known.min():.1f} .. {known.max():.1f} m"))
    width = max(strip.shape[1] for strip in strips)
    sheet_HWC = np.concatenate(
        [cv2.copyMakeBorder(s, 0, GAP_PX, 0, width - s.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3) for s in strips]
    )
    encoded = cv2.imencode(".png", cv2.cvtColor(sheet_HWC, cv2.COLOR_RGB2BGR))[1]
    with replacing(path) as scratch:
        scratch.write_bytes(encoded.tobytes())


def depth_strip(image_HWC: np.ndarray, measured_HW: np.ndarray, predicted_HW: np.ndarray) -> np.ndarray:
    """image | measured | predicted, uint8 [HEIGHT_PX, W, 3] in RGB."""
    known = measured_HW > 0
    low, high = float(measured_HW[known].min()), float(measured_HW[known].max())
    measured_HWC = np.where(known[:, :, None], depth_colours(measured_HW, low, high), np.uint8(UNKNOWN_GREY))
    width = max(1, round(HEIGHT_PX * measured_HW.shape[1] / measured_HW.shape[0]))
    gap = np.full((HEIGHT_PX, GAP_PX, 3), 255, np.uint8)
    picture = cv2.resize(image_HWC, (width, HEIGHT_PX), interpolation=cv2.INTER_AREA)
    maps = [
        cv2.resize(one, (width, HEIGHT_PX), interpolation=cv2.INTER_NEAREST)
        for one in (measured_HWC, depth_colours(predicted_HW, low, high))
    ]
    return np.concatenate([picture, gap, maps[0], gap, maps[1]], axis=1)


def depth_colours(depth_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map as colours [H, W, 3], RGB: `low` metres bright, `high` dark, what lies outside like the nearer end."""
    nearness = 1 - (np.clip(depth_HW, low, high) - low) / max(high - low, 1e-6)
    levels = (nearness * 255).round().astype(np.uint8)
    colours_HWC: np.ndarray = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    return colours_HWC


def captioned(strip_HWC: np.ndarray, text: str) -> np.ndarray:
    """The strip below a line of text; what OpenCV's letters cannot show becomes `?`."""
    line = np.full((CAPTION_PX, strip_HWC.shape[1], 3), 255, np.uint8)
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(line, plain, (2, CAPTION_PX - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([line, strip_HWC])
