"""Values that change over a run, as functions of the step."""

import math
from dataclasses import dataclass

from data.errors import InputError


@dataclass(frozen=True)
class Cosine:
    """Zero for `frozen` steps, a linear warm-up from `start` to `base`, then half a cosine from `base` to `final`.

    As published, `base` is reached at the last warm-up step and held at the first cosine step, and `final` lies one step beyond the end.
    """

    base: float
    final: float
    steps: int
    warmup: int = 0
    start: float = 0.0
    frozen: int = 0

    def __post_init__(self) -> None:
        if min(self.warmup, self.frozen) < 0 or self.frozen + self.warmup > self.steps:
            raise InputError(
                f"a schedule of {self.steps} steps cannot warm up for {self.warmup + self.frozen}; shorten the warm-up"
            )

    def at(self, step: int) -> float:
        """Value at a step; `final` from the end on."""
        if step >= self.steps:
            return self.final
        step -= self.frozen
        if step < 0:
            return 0.0
        if step < self.warmup:
            return self.start + (self.base - self.start) * step / (self.warmup - 1) if self.warmup > 1 else self.start
        progress = (step - self.warmup) / (self.steps - self.frozen - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearWarmup:
    """From `start` to `final` in equal increments over `warmup` epochs, constant afterwards (the teacher's temperature)."""

    start: float
    final: float
    warmup: int

    def at(self, epoch: int) -> float:
        """Value at an epoch."""
        if epoch >= self.warmup:
            return self.final
        return self.start + (self.final - self.start) * epoch / (self.warmup - 1) if self.warmup > 1 else self.start
