"""What a step of every method shares: backward passes over the parts of a batch, then one change of student and teacher.

A batch may be taken in several parts (gradient accumulation), so that the activations of only one are in memory. What is taken over the
batch, targets, centres and KoLeo, is computed before, over all parts; so their number does not change what is learned.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from data.errors import InputError
from training import parallel
from training.distillation import State, ema_update_

Clip = Callable[[nn.Module], dict[str, Tensor]]
"""Scales the gradients of a network where they are too large; returns their norms before, by name."""


def parts_of(n_images: int, n_parts: int) -> Iterator[slice]:
    """Equal parts of a batch. Raises InputError where it does not divide."""
    if n_parts < 1 or n_images % n_parts:
        raise InputError(f"--accumulate {n_parts}: {n_images} images do not divide into so many parts")
    yield from (slice(*ends) for ends in pairwise(range(0, n_images + 1, n_images // n_parts)))


def backward_(state: State[Any], parts: Iterable[tuple[Tensor, dict[str, Tensor]]], n_parts: int) -> dict[str, Tensor]:
    """The backward pass of each part, before the next part is computed. Returns the means of the `loss` and of its terms.

    `parts` yields the loss of each part and the terms it is the sum of. Gradients end as the mean over all parts and processes, times the
    scaler's factor.
    """
    state.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, (loss, terms) in enumerate(parts):
        for name, value in ({"loss": loss} | terms).items():
            sums[name] = sums.get(name, 0) + value.detach().float() / n_parts
        with parallel.averaged_gradients(state.student, state.averager, last=i == n_parts - 1):
            state.scaler.scale(loss / n_parts).backward()
        del loss, terms, value  # or they hold this part's activations while the next part's are made
    return sums


def update_(
    state: State[Any], terms: dict[str, Tensor], momentum: float, clip: Clip, spare: Sequence[nn.Module] = ()
) -> tuple[dict[str, float], bool]:
    """One step of the optimiser along the gradients, and of the teacher after the student; what was optimised, and whether it was done.

    Nothing changes where a term or a gradient is not finite. With float16 that is how the factor of the loss finds its size: as long as
    it can be halved the gradients' norms are left out of what is returned. `spare` names modules that keep their weights in this step.
    """
    state.scaler.unscale_(state.optimizer)
    # One transfer from the device tells all processes whether to go on.
    found = parallel.mean_scalars(terms | clip(state.student))
    finite = all(map(math.isfinite, found.values()))
    for module in spare:
        for parameter in module.parameters():
            parameter.grad = None
    if finite:
        state.scaler.step(state.optimizer)
        ema_update_(state.teacher, state.student, momentum)
    if state.scaler.is_enabled():
        found["loss_scale"] = state.scaler.get_scale()
        state.scaler.update()
        if not finite and found["loss_scale"] > 1 and math.isfinite(found["loss"]):
            found = {name: value for name, value in found.items() if math.isfinite(value)}
    return found, finite


def way_back(state: State[Any]) -> Callable[[], None]:
    """Keeps what a step changes before it knows its loss, running statistics. Calling what is returned puts them back."""
    changing = [*state.student.buffers(), *state.teacher.buffers()]
    kept = [tensor.clone() for tensor in changing]

    def go_back() -> None:
        for tensor, before in zip(changing, kept, strict=True):
            tensor.copy_(before)

    return go_back
