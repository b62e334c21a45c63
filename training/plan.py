"""What each step of a run takes for its schedule values."""

from training.dinov2 import Dinov2Spec
from training.distillation import Schedule
from training.recipe import Recipe
from training.schedules import Cosine, LinearWarmup


class Plan:
    """Schedule values of every step of a run."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        optim, steps = recipe.optim, recipe.epochs * steps_per_epoch
        peak = optim.peak_lr(recipe.batch_size)
        warmup = min(round(optim.warmup_epochs * steps_per_epoch), steps)
        self.steps_per_epoch, self.steps = steps_per_epoch, steps
        self.lr = Cosine(peak, min(optim.min_lr, peak), steps, warmup)
        self.weight_decay = Cosine(*optim.weight_decay, steps)
        self.momentum = Cosine(*optim.momentum, steps)
        # DINOv1 warms the teacher up by the epoch, DINOv2 by the step.
        self.steps_per_temperature = 1 if isinstance(recipe.step, Dinov2Spec) else steps_per_epoch
        temperatures = round(optim.teacher_warmup_epochs * steps_per_epoch / self.steps_per_temperature)
        self.temperature = LinearWarmup(*optim.teacher_temperature, temperatures)
        self.frozen_steps = round(optim.freeze_last_layer_epochs * steps_per_epoch)

    def at(self, step: int) -> Schedule:
        """Values of a step."""
        return Schedule(
            lr=self.lr.at(step),
            weight_decay=self.weight_decay.at(step),
            momentum=self.momentum.at(step),
            teacher_temperature=self.temperature.at(step // self.steps_per_temperature),
            freeze_last_layer=step < self.frozen_steps,
        )
