"""What a run tells while it goes on: lines of JSON, curves, and words for whoever watches.

The first line of the log is `{"start": {...}}`: the resolved recipe, the data, the source revision; a resumed run adds another.
`{"note": {...}}` is what was said of a step, a warning for example. Every other line is a step.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.run_folder import RunFolder

LINE_EVERY_S = 15.0


def read_steps(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that belong to steps, in order; those that tell of a start, or were cut short, are left out."""
    found = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def step_words(record: Mapping[str, Any]) -> str:
    """The few numbers of a step that a person wants to see."""
    parts = [f"loss {record['loss']:.4f}", f"{record['images_per_s']:.1f} images/s"]
    parts += [f"MFU {100 * record['mfu']:.0f} %"] if "mfu" in record else []
    parts += [f"data wait {100 * record['data_wait']:.0f} %"] if "data_wait" in record else []
    parts += [f"{record['peak_memory_gb']:.1f} GB"] if "peak_memory_gb" in record else []
    return ", ".join(parts)


def left_words(seconds: float) -> str:
    """A duration for people."""
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


class NoLog:
    """Of a process that does not lead: nothing is written or shown."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Note what the step found after which `step` steps are done."""

    def say(self, text: str) -> None:
        """A line for whoever watches."""

    def note(self, step: int, text: str) -> None:
        """A line for whoever watches, kept in the log too."""


class RunLog(NoLog):
    """The log file and the curves of a run that goes from `step` to `end`; a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, folder: RunFolder, step: int, end: int, resolved: Mapping[str, Any]) -> None:
        """`resolved`: the recipe, the data and the source revision, which head the lines of each start."""
        self.folder, self.first, self.end, self.resolved = folder, step, end, resolved
        self.began = self.lined = time.monotonic()

    def __enter__(self) -> "RunLog":
        self.lines = self.folder.log.open("a", buffering=1)
        self.lines.write(json.dumps({"start": {"step": self.first, **self.resolved}}) + "\n")
        self.curves = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.first)
        self.bar = tqdm(total=self.end, initial=self.first, unit="step", disable=not sys.stderr.isatty())
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.curves.close()
        self.lines.close()

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """A line of JSON, a point of each curve, the bar."""
        now = time.monotonic()
        left_s = (now - self.began) / (step - self.first) * (self.end - step)
        record = {**record, "time_left_s": round(left_s, 1)}
        # JSON knows no NaN; null where a value is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.lines.write(json.dumps(finite) + "\n")
        for name, value in finite.items():
            if name not in ("step", "epoch") and value is not None:
                self.curves.add_scalar(name, value, step)
        words = step_words(record)
        self.bar.update(1)
        self.bar.set_postfix_str(words)
        if self.bar.disable and (now - self.lined > LINE_EVERY_S or step == self.end):
            self.lined = now
            print(f"step {step}/{self.end}, {words}, {left_words(left_s)} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Above the bar."""
        tqdm.write(text, file=sys.stderr)

    def note(self, step: int, text: str) -> None:
        """Above the bar and in the log."""
        self.lines.write(json.dumps({"note": {"step": step, "text": text}}) + "\n")
        self.say(f"step {step}: {text}")
