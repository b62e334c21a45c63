"""What each step of a run takes for its schedule values."""

from data.errors import InputError
from training.dinov2 import Dinov2Spec
from training.distillation import Schedule
from training.recipe import Recipe
from training.schedules import Cosine, LinearWarmup


class Plan:
    """Schedule values of every step of a run.

    Where heads learn alone at first, their learning rate rises to its peak within a tenth of that time; then all schedules begin, the
    learning rate once more at 0.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        optim, steps = recipe.optim, recipe.epochs * steps_per_epoch
        self.steps_per_epoch, self.steps = steps_per_epoch, steps
        self.alone = optim.freeze_backbone_steps
        if not 0 <= self.alone < steps:
            raise InputError(
                f"--freeze-backbone-steps {self.alone}: want at least 0 and fewer than the {steps} steps of the run"
            )
        self.peak, rest = optim.peak_lr(recipe.batch_size), steps - self.alone
        warmup = min(round(optim.warmup_epochs * steps_per_epoch), rest)
        self.lr = Cosine(self.peak, min(optim.min_lr, self.peak), rest, warmup)
        self.weight_decay = Cosine(*optim.weight_decay, rest)
        self.momentum = Cosine(*optim.momentum, rest)
        # DINOv1 warms the teacher up by the epoch, DINOv2 by the step.
        self.steps_per_temperature = 1 if isinstance(recipe.step, Dinov2Spec) else steps_per_epoch
        temperatures = round(optim.teacher_warmup_epochs * steps_per_epoch / self.steps_per_temperature)
        self.temperature = LinearWarmup(*optim.teacher_temperature, temperatures)
        self.frozen_steps = round(optim.freeze_last_layer_epochs * steps_per_epoch)
        if self.alone:  # the prototypes have most of this time to find their places
            self.frozen_steps = min(self.frozen_steps, self.alone // 10)

    def at(self, step: int) -> Schedule:
        """Values of a step."""
        late = max(step - self.alone, 0)
        rise = max(self.alone // 10, 1)
        return Schedule(
            lr=self.lr.at(late) if step >= self.alone else self.peak * min((step + 1) / rise, 1.0),
            weight_decay=self.weight_decay.at(late),
            momentum=self.momentum.at(late),
            teacher_temperature=self.temperature.at(late // self.steps_per_temperature),
            freeze_last_layer=step < self.frozen_steps,
            freeze_backbone=step < self.alone,
        )
