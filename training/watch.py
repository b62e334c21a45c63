"""Noticing while a run goes on what would spoil it: steps that are not finite, and signs of collapse.

A step that is not finite changes nothing. It is said with its terms and its images, and kept in `nan.jsonl`; too many in a row end the run.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import Dataset
from data.errors import CheckFailed
from data.loader import Views
from data.streams import Stream
from training import parallel
from training.dinov2 import Dinov2Spec
from training.distillation import State
from training.monitors import collapse_warnings
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.run_log import NoLog, RunLog

WATCH_EVERY = 10
"""Steps between two looks at the monitors of collapse, which cost a decomposition each."""
PATIENCE = 3
"""Looks in a row that show the same trouble before it is told."""
MIN_GRACE = 100
"""Steps, or the learning rate's warm-up if that is longer, in which features may be as they began: nearly equal, behind a LayerScale."""
MIN_SILENCE = 500
"""Steps, or an epoch if that is longer, before the same trouble is told again."""
MAX_BAD_STEPS = 5
"""So many steps in a row that are not finite end the run."""
MAX_NAMED = 8
IMAGES_MEASURED = 24
"""At the start, evenly spread over the data."""


class Watch:
    """Sees every step of a run; all processes have one."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int, folder: RunFolder, log: NoLog) -> None:
        self.recipe, self.steps_per_epoch, self.folder, self.log = recipe, steps_per_epoch, folder, log
        grace = max(round(recipe.optim.warmup_epochs * steps_per_epoch), MIN_GRACE)
        self.alarm = Alarm(grace, max(steps_per_epoch, MIN_SILENCE))
        self.bad_steps = 0

    def begin(self, dataset: Dataset | Stream) -> None:
        """Say where many images are smaller than the crops cut from them."""
        px = self.recipe.crops.global_px
        looked_at = dataset.examples(IMAGES_MEASURED) if isinstance(self.log, RunLog) else []
        small = [image for image in looked_at if min(image.shape[:2]) < px]
        if 2 * len(small) > len(looked_at):
            self.log.note(
                0,
                f"{len(small)} of {len(looked_at)} images looked at are smaller than a global crop of {px} px and are enlarged; "
                "larger images teach more, a recipe with smaller crops costs less",
            )

    def looks_at(self, step: int) -> bool:
        """Whether the monitors of collapse are wanted of this step: now and then, and at the end of an epoch."""
        return step % WATCH_EVERY == 0 or step % self.steps_per_epoch == self.steps_per_epoch - 1

    def see(self, step: int, found: Mapping[str, float], state: State[Any], views: Views) -> None:
        """Take note of what a step found. Raises CheckFailed where too many in a row are not finite."""
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if bad:
            self._see_bad(step, bad, found, state, views)
            return
        self.bad_steps = 0
        if "feature_spread" in found:
            spec = self.recipe.step
            patches = (spec.ibot_head or self.recipe.head).prototypes if isinstance(spec, Dinov2Spec) else None
            warnings = collapse_warnings(found, self.recipe.head.prototypes, patches)
            for text in self.alarm.hear(step, warnings):
                self.log.note(step, text)

    def _see_bad(
        self, step: int, bad: Sequence[str], found: Mapping[str, float], state: State[Any], views: Views
    ) -> None:
        self.bad_steps += 1
        suspects = [views.names[i] for i in suspect_images(state, views)]
        everywhere = parallel.gathered((suspects, views.names))
        suspects = [name for some, _ in everywhere for name in some]
        batch = [name for _, some in everywhere for name in some]
        first = [name for name in bad if name == "loss" or not name.startswith("grad_norm")] or list(bad)
        images = f"images {listed(suspects)}" if suspects else f"no image alone is to blame, batch {listed(batch)}"
        self.log.note(step, f"{', '.join(first)} not finite ({images}); the step changes nothing, see nan.jsonl")
        if isinstance(self.log, RunLog):
            values = {name: str(value) if name in bad else value for name, value in found.items()}
            line = {"step": step, "not_finite": list(bad), "suspects": suspects, "batch": batch, "found": values}
            with self.folder.bad_steps.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.bad_steps >= MAX_BAD_STEPS:
            raise CheckFailed(
                f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient, last step {step} ({', '.join(first)}; {images}); "
                "lower lr or the teacher temperature, and resume from the last state"
            )

    def check_weights(self, step: int, state: State[Any]) -> None:
        """Raise CheckFailed where a weight is not finite, before it is written over good ones."""
        sums = torch.stack([parallel.shard_of(p).detach().float().sum() for p in state.student.parameters()])
        if parallel.largest(int(not torch.isfinite(sums).all()), sums.device):
            raise CheckFailed(
                f"after step {step} weights are not finite and are not saved; lower lr and resume from the last state"
            )


class Alarm:
    """Decides when a warning is worth a line.

    Features start out nearly equal and targets nearly uniform, so what never was well counts only after a time of grace; what
    was well and is no more counts at once. Either must hold for a few looks in a row. The first warning stands for all that come with it;
    it is said again now and then while it lasts, and once more when it is over.
    """

    def __init__(self, grace_steps: int, silence_steps: int) -> None:
        self.grace_steps, self.silence_steps = grace_steps, silence_steps
        self.looks = 0
        self.seen: Counter[str] = Counter()
        """Looks at which a kind of trouble was there; fewer than all looks: it once was well."""
        self.held: dict[str, int] = {}
        """Looks in a row."""
        self.said: dict[str, int] = {}
        """Step at which a trouble that lasts was last told of."""

    def hear(self, step: int, warnings: Mapping[str, str]) -> list[str]:
        """Lines to say after a look at the monitors, which gave these warnings by kind."""
        self.looks += 1
        self.seen.update(warnings.keys())
        self.held = {kind: self.held.get(kind, 0) + 1 for kind in warnings}
        lines = [f"the trouble of step {self.said.pop(kind)} is over ({kind})" for kind in {*self.said} - {*warnings}]
        counts = [
            kind
            for kind in warnings
            if self.held[kind] >= PATIENCE and (step >= self.grace_steps or self.seen[kind] < self.looks)
        ]
        if counts and step - self.said.get(counts[0], -self.silence_steps) >= self.silence_steps:
            lines.append(f"collapse? {warnings[counts[0]]}")
            self.said[counts[0]] = step
        return lines


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


@torch.no_grad()
def suspect_images(state: State[Any], views: Sequence[Tensor]) -> list[int]:
    """Images of the batch whose pixels, features or logits are not finite, in student or teacher; none where all of them are.

    Each image goes through alone, with running statistics where there is batch norm, so that one does not spoil the others.
    """
    bad_B = torch.stack([~finite_rows(view) for view in views]).any(dim=0)
    teaching: Any = state.guide if isinstance(state.guide, nn.Module) else state.teacher
    for learner in (state.student, teaching):
        if parallel.largest(int(bad_B.any()), bad_B.device):  # all or none go on, since networks may be sharded
            break
        head = learner.head if hasattr(learner, "head") else learner.dino_head
        was_training = learner.training
        learner.eval()
        for view in views:
            bad_B |= ~finite_rows(logits(learner.backbone, head, view))
        learner.train(was_training)
    return [] if bad_B.all() else bad_B.nonzero().flatten().tolist()


def logits(backbone: nn.Module, head: nn.Module, view_BCHW: Tensor) -> Tensor:
    """Of each image alone."""
    return torch.cat([head(backbone(image_CHW[None]).float()) for image_CHW in view_BCHW])


def finite_rows(x: Tensor) -> Tensor:
    """Whether all values of each row are finite, [B]."""
    return torch.isfinite(x).flatten(1).all(dim=1)
