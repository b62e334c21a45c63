"""What a run tells while it goes on: a line of JSON a step, curves, and words for whoever watches."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.run_folder import RunFolder

LINE_EVERY_S = 15.0


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


class RunLog(NoLog):
    """The log file and the curves of a run that goes from `step` to `end`; a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, folder: RunFolder, step: int, end: int) -> None:
        self.folder, self.first, self.end = folder, step, end
        self.began = self.lined = time.monotonic()

    def __enter__(self) -> "RunLog":
        self.lines = self.folder.log.open("a", buffering=1)
        self.curves = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.first)
        self.bar = tqdm(total=self.end, initial=self.first, unit="step", disable=not sys.stderr.isatty())
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.curves.close()
        self.lines.close()

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """A line of JSON, a point of each curve, the bar."""
        self.lines.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "epoch") and math.isfinite(value):
                self.curves.add_scalar(name, value, step)
        words = f"loss {record['loss']:.4f}, {record['images_per_s']:.1f} images/s"
        self.bar.update(1)
        self.bar.set_postfix_str(words)
        now = time.monotonic()
        if self.bar.disable and (now - self.lined > LINE_EVERY_S or step == self.end):
            self.lined = now
            left_s = (now - self.began) / (step - self.first) * (self.end - step)
            print(f"step {step}/{self.end}, {words}, {left_s / 60:.1f} min left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Above the bar."""
        tqdm.write(text, file=sys.stderr)
