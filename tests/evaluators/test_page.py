"""Pieces of pages: charts whose axes fit, and text that stays text."""

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
