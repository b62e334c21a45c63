"""Predicted and true masks of one object over a video in, the figures of the DAVIS challenge out.

J is the region's Jaccard index, F how well contours meet (Perazzi et al. 2016, Pont-Tuset et al. 2017), as the official
evaluation computes them: contours match within 0.8 % of the frame's diagonal, and of each series over frames the mean, the
share above a half (recall), and the first quarter's mean minus the last one's (decay) are told.
"""

import math

import cv2
import numpy as np

TOLERANCE = 0.008
"""How far contours may lie apart, as a share of the frame's diagonal."""
RECALL_FROM = 0.5
QUARTERS = 4


def region_jaccard(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    either = int((predicted_HW | truth_HW).sum())
    return int((predicted_HW & truth_HW).sum()) / either if either else 1.0


def contour_f(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """Harmonic mean of the shares of contour pixels that lie near the other's contour; 1 where both are empty."""
    reach = math.ceil(TOLERANCE * math.hypot(*truth_HW.shape))
    found, wanted = contour(predicted_HW), contour(truth_HW)
    n_found, n_wanted = int(found.sum()), int(wanted.sum())
    if not n_found or not n_wanted:
        return float(n_found == n_wanted)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x * x + y * y <= reach * reach).astype(np.uint8)
    precision = (found & (cv2.dilate(wanted.astype(np.uint8), disk) > 0)).sum() / n_found
    recall = (wanted & (cv2.dilate(found.astype(np.uint8), disk) > 0)).sum() / n_wanted
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both; bool [H, W]."""
    padded = np.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")
    edge: np.ndarray = (mask_HW != padded[:-1, 1:]) | (mask_HW != padded[1:, :-1]) | (mask_HW != padded[1:, 1:])
    return edge


def series_figures(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of a score over the frames of a video; the quarters share their border frames."""
    ends = np.round(np.linspace(1, len(values), QUARTERS + 1) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[-2] : ends[-1] + 1]
    return float(values.mean()), float((values > RECALL_FROM).mean()), float(first.mean() - last.mean())
