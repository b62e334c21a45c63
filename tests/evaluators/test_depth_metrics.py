"""Depth figures on cases with a known answer."""

import numpy as np
import pytest

from evaluators.depth_metrics import image_metrics

MEASURED = np.linspace(1.0, 5.0, 48).reshape(6, 8)


def test_a_prediction_twenty_percent_too_far_is_right_within_a_quarter() -> None:
    figures = image_metrics(1.2 * MEASURED, MEASURED)
    assert figures is not None
    assert figures["abs_rel"] == pytest.approx(0.2)
    assert figures["delta1"] == 1.0
    assert figures["silog"] == pytest.approx(0.0, abs=1e-6)
    assert figures["rmse_log"] == pytest.approx(np.log(1.2))
    assert figures["log10"] == pytest.approx(np.log10(1.2))
    assert figures["sq_rel"] == pytest.approx(0.04 * MEASURED.mean())


def test_a_constant_offset_is_its_own_rmse_and_mae() -> None:
    figures = image_metrics(MEASURED + 0.5, MEASURED)
    assert figures is not None
    assert figures["rmse"] == pytest.approx(0.5)
    assert figures["mae"] == pytest.approx(0.5)


def test_shares_within_a_factor_count_both_directions() -> None:
    measured = np.full((1, 4), 2.0)
    figures = image_metrics(measured * np.array([[1.0, 1 / 1.3, 1.3, 2.0]]), measured)
    assert figures is not None
    assert (figures["delta1"], figures["delta2"], figures["delta3"]) == (0.25, 0.75, 0.75)


def test_pixels_without_a_measurement_do_not_count_and_an_image_without_any_has_no_figures() -> None:
    holes = MEASURED.copy()
    holes[:3] = 0
    predicted = MEASURED.copy()
    predicted[:3] = 99.0
    figures = image_metrics(predicted, holes)
    assert figures is not None
    assert figures["abs_rel"] == 0.0
    assert image_metrics(predicted, np.zeros_like(MEASURED)) is None
