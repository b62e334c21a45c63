"""A predicted and a measured depth map in, the figures of the depth literature out (Eigen et al. 2014).

Figures are taken per image over the pixels with a measurement, then averaged over images, as DINOv2 reports them.
"""

import numpy as np

METRE_METRICS = ("rmse", "mae", "sq_rel")
"""Figures in metres; the others are ratios, shares or logarithms of ratios."""
LOWER_IS_BETTER = ("abs_rel", "sq_rel", "rmse", "mae", "rmse_log", "log10", "silog")


def image_metrics(predicted_HW: np.ndarray, measured_HW: np.ndarray) -> dict[str, float] | None:
    """Figures of one image, both maps in metres; None where `measured_HW` has no pixel above 0 (0 = no measurement).

    `delta1 delta2 delta3`: share of pixels within a factor of 1.25, 1.25^2, 1.25^3. `silog` is not multiplied by 100.
    """
    known = measured_HW > 0
    if not known.any():
        return None
    predicted = predicted_HW[known].astype(np.float64)
    measured = measured_HW[known].astype(np.float64)
    error = predicted - measured
    log_error = np.log(predicted) - np.log(measured)
    ratio = np.exp(np.abs(log_error))
    return {
        "abs_rel": float(np.mean(np.abs(error) / measured)),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "delta1": float(np.mean(ratio < 1.25)),
        "delta2": float(np.mean(ratio < 1.25**2)),
        "delta3": float(np.mean(ratio < 1.25**3)),
        "sq_rel": float(np.mean(error**2 / measured)),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "log10": float(np.mean(np.abs(log_error)) / np.log(10)),
        "silog": float(np.sqrt(max(0.0, np.mean(log_error**2) - np.mean(log_error) ** 2))),
    }
