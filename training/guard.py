"""A guard for runs that begin with good weights: it notices when they get worse, keeps the best, and ends the run.

Continuing a published backbone naively with fresh heads ruins it within some thousand images. k-NN on labelled images sees it; losses do
not.
"""

import json
from pathlib import Path

from data.errors import CheckFailed
from training.run_folder import RunFolder, read_object
from training.run_log import NoLog

SHARE = 0.9
"""Of the k-NN accuracy at the start; less is a warning."""
PATIENCE = 2
"""Measurements in a row below the share that end the run; one alone may be chance, since labelled sets are small."""


class Guard:
    """What was measured of a run, kept in its folder, so that a resumed run knows its start."""

    def __init__(self, folder: RunFolder, log: NoLog) -> None:
        self.folder, self.log = folder, log
        self.path = folder.path / "guard.json"
        known = read_object(self.path) if self.path.is_file() else {}
        self.seen: dict[int, float] = {int(step): float(top1) for step, top1 in known.items()}

    def begin(self, step: int) -> None:
        """Forget what was measured after `step` steps: those steps will be taken again."""
        self.seen = {at: top1 for at, top1 in self.seen.items() if at <= step}

    @property
    def best_checkpoint(self) -> Path:
        """Where the best backbone of the run is kept."""
        return self.folder.checkpoint.with_name("best.safetensors")

    def see(self, step: int, top1: float) -> bool:
        """Note a measurement after `step` steps; whether it is the best so far, which the caller then saves.

        Raises CheckFailed where the last few fell below a share of the first.
        """
        is_best = top1 > max(self.seen.values(), default=-1.0)
        self.seen[step] = top1
        self.folder.write_text(self.path.name, json.dumps(self.seen))
        start = self.seen[min(self.seen)]
        if top1 >= SHARE * start:
            return is_best
        best = max(self.seen, key=lambda at: self.seen[at])
        text = (
            f"k-NN top-1 of the teacher fell from {start:.4f} at the start to {top1:.4f} after step {step}, below {SHARE:g} of it; "
            f"{self.best_checkpoint} holds the best, of step {best} ({self.seen[best]:.4f})"
        )
        if all(self.seen[at] < SHARE * start for at in sorted(self.seen)[-PATIENCE:]):
            raise CheckFailed(
                f"{text}; lower the learning rate or lengthen --freeze-backbone-steps, and choose another --out"
            )
        self.log.say(text)
        return is_best
