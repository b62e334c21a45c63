"""Pieces of pages: charts whose axes fit, and text that stays text."""

import re

import pytest

from evaluators.page import chart, ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 7.9), (64.0, 64.0), (0.0, 0.0), (1e-9, 3e-7), (1e5, 2e6)])
def test_ticks_are_few_and_cover_the_values(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7


def test_a_chart_of_one_point_and_of_none() -> None:
    one = {"a": [(0.0, 5.0)]}
    assert "circle" in chart("t <x>", one)
    assert "<x>" not in chart("t <x>", one)
    assert chart("t", {"a": []}) == chart("t", {"a": [(0.0, float("nan"))]}) == ""


def test_a_logarithmic_axis_ends_where_the_curve_does_and_names_its_few_points() -> None:
    few = chart("t", {"a": [(5.0, 0.1), (10.0, 0.2)]}, log_x=True)
    assert re.findall(r'text-anchor="(?:middle|end)">([^<]+)<', few) == ["5", "10"]
    assert re.search(r'points="52\.0,[0-9.]+ 350\.0,', few), "from the left margin to the right one"
    assert 'text-anchor="end">10<' in few, "the last label stays within the picture"
    many = chart("t", {"a": [(10.0**power, power) for power in range(-6, 6)]}, log_x=True)
    assert "100k" in many
    assert many.count("<text") < 14
