"""Numbers of a run over its steps: a long log, thinned to what a chart can show."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_POINTS = 400
"""Of a curve; when there are twice as many, neighbours are averaged."""


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

    @property
    def xy(self) -> list[tuple[float, float]]:
        """For a chart: steps and means."""
        return [(step, mean) for step, mean, _ in self.points]


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
