"""Numbers of a run over its steps, as little pictures: a long log thinned to what a chart can show, and charts as inline SVG."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_POINTS = 400
"""Of a curve; when there are twice as many, neighbours are averaged."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 52, 10, 8, 22
"""Of a chart and its margins, in units of its own."""
N_COLOURS = 6


@dataclass
class Curve:
    """Points (step, mean, number of values), in the order of steps."""

    points: list[tuple[float, float, int]] = field(default_factory=list)
    last: float = math.nan

    def add(self, step: int, value: float) -> None:
        """One more value."""
        self.points.append((step, value, 1))
        self.last = value
        if len(self.points) >= 2 * MAX_POINTS:
            self.points = [merged(self.points[i : i + 2]) for i in range(0, len(self.points), 2)]


def merged(points: Sequence[tuple[float, float, int]]) -> tuple[float, float, int]:
    """The weighted mean of some points."""
    n = sum(count for _, _, count in points)
    return sum(x * count for x, _, count in points) / n, sum(y * count for _, y, count in points) / n, n


class History:
    """What a log holds, read a piece at a time: `update` reads on where it stopped, so a long log costs no more at its end."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.curves: dict[str, Curve] = {}
        self.notes: list[tuple[int, str]] = []
        self.last: dict[str, Any] = {}
        self._offset = 0

    def update(self) -> None:
        """Take in the lines that were added."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if "note" in record:
                self.notes.append((int(record["note"]["step"]), str(record["note"]["text"])))
            elif "step" in record:
                self.last = record
                step = int(record["step"])
                for name, value in record.items():
                    if name not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool):
                        self.curves.setdefault(name, Curve()).add(step, float(value))
        except (ValueError, KeyError, TypeError):
            return  # a line cut short by a crash


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    """A figure with one line a curve, its axes and a legend with the last values; the curves share the vertical axis."""
    drawn = {name: curve for name, curve in curves.items() if curve.points}
    xs = [x for curve in drawn.values() for x, _, _ in curve.points]
    ys = [y for curve in drawn.values() for _, y, _ in curve.points if math.isfinite(y)]
    if not ys:
        return ""
    y_ticks = ticks(min(ys), max(ys), 4)
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> str:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in y_ticks:
        down = at(first, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{down}" text-anchor="end" dominant-baseline="middle">{short(tick)}</text>'
        )
    for tick in (tick for tick in ticks(first, last, 4) if first <= tick <= last and tick == round(tick)):
        across = at(tick, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="middle">{short(tick)}</text>')
    legend = []
    for i, (name, curve) in enumerate(drawn.items()):
        points = [at(x, y) for x, y, _ in curve.points if math.isfinite(y)]
        if len(points) == 1:
            across, down = points[0].split(",")
            parts.append(f'<circle class="c{i % N_COLOURS}" cx="{across}" cy="{down}" r="2.5"/>')
        parts.append(f'<polyline class="c{i % N_COLOURS}" points="{" ".join(points)}"/>')
        legend.append(f'<span><i class="c{i % N_COLOURS}"></i>{html.escape(name)} <b>{short(curve.last)}</b></span>')
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)} over steps">{"".join(parts)}</svg><p class="legend">{"".join(legend)}</p></figure>'
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about so many."""
    size = max(abs(low), abs(high))
    # A curve that hardly moves gets an axis on which it is seen to stand still.
    span = max(high - low, size * 0.01) or 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number in few characters: 4 digits, thousands as k, millions as M, small ones as powers of ten."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / (factor if factor != 1e4 else 1e3):.4g}{letter}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-")
