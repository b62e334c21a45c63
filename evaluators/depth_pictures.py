"""Images with measured and predicted depth in, one PNG out: image | measured | predicted, from the best to the worst.

Near is bright and far is dark, both maps of a row on the scale of the measured one; grey is where nothing was measured.
"""

from pathlib import Path

import cv2
import numpy as np

from backbones.heads import AnyDepthHead
from data.datasets import Dataset
from evaluators.depth_probe import DepthTable, predict_depth
from evaluators.depth_scores import SHORT_UNITS, aligned
from evaluators.picture_sheet import UNKNOWN_GREY, save_sheet, spread_picks


def save_comparison(
    path: Path, head: AnyDepthHead, test: DepthTable, images: Dataset, predictions: dict[str, np.ndarray]
) -> None:
    """Write the sheet of `ROWS` test images, evenly spaced from the worst to the best.

    `predictions` holds `rows` of `test` and their `abs_rel`; names of `test` are looked up in `images`.
    """
    index = {item.name: number for number, item in enumerate(images.items)}
    short, rows = SHORT_UNITS.get(head.spec.unit, head.spec.unit), []
    for pick in spread_picks(-predictions["abs_rel"]):
        row = int(predictions["rows"][pick])
        name, measured_HW = test.names[row], test.depth_m[row]
        predicted_HW = predict_depth(head, test, row)
        if head.spec.unit != "metre":  # as it was scored
            predicted_HW = aligned(predicted_HW, measured_HW)
        tiles = depth_tiles(images.image(index[name]), measured_HW, predicted_HW, head.spec.unit != "metre")
        known = measured_HW[measured_HW > 0]
        error = predictions["abs_rel"][pick]
        rows.append((f"{name}   abs_rel {error:.3f}   {known.min():.1f} .. {known.max():.1f} {short}", tiles))
    save_sheet(path, rows)


def depth_tiles(
    image_HWC: np.ndarray, measured_HW: np.ndarray, predicted_HW: np.ndarray, large_is_near: bool = False
) -> list[np.ndarray]:
    """Image, measured and predicted depth (or disparity, which is large near by), uint8 [H, W, 3] in RGB."""
    known = measured_HW > 0
    low, high = float(measured_HW[known].min()), float(measured_HW[known].max())
    low, high = (high, low) if large_is_near else (low, high)
    measured_HWC = np.where(known[:, :, None], depth_colours(measured_HW, low, high), np.uint8(UNKNOWN_GREY))
    return [image_HWC, measured_HWC, depth_colours(predicted_HW, low, high)]


def depth_colours(depth_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map as colours [H, W, 3], RGB: `low` bright, `high` (which may be below it) dark, what lies outside like the nearer end."""
    span = high - low if abs(high - low) > 1e-6 else 1e-6
    nearness = 1 - np.clip((depth_HW - low) / span, 0, 1)
    levels = (nearness * 255).round().astype(np.uint8)
    colours_HWC: np.ndarray = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB)
    return colours_HWC
