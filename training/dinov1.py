"""One step of DINOv1: views and schedule values in, losses out; student, teacher, centre and optimiser change (Caron et al. 2021).

Axes: T teacher views (the two global ones), B images, D features, K prototypes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from training.distillation import Learner, Schedule, State, StepSpec, update_center_
from training.losses import teacher_targets
from training.monitors import collapse_monitors, predictions
from training.optimizer import clip_each_, set_rates_
from training.prototypes import pair_weights, targets_of_pairs
from training.step import backward_, parts_of, update_, way_back


def train_step_(
    state: State[Learner],
    views: Sequence[Tensor],
    at: Schedule,
    spec: StepSpec,
    watch: bool = True,
    accumulate: int = 1,
) -> dict[str, float]:
    """One step on views [B, 3, h, w], the two global ones first; returns what was optimised and, if `watch`, what tells of collapse.

    `accumulate` is the number of parts that the batch is taken in. A loss or gradient that is not finite changes nothing; the caller
    sees it in what is returned.
    """
    set_rates_(state.optimizer, at.lr, at.weight_decay, at.lr)
    go_back = way_back(state)
    parts = list(parts_of(len(views[0]), accumulate))
    with torch.no_grad():
        said = [state.teacher([view[part] for view in views[:2]], spec.precision) for part in parts]
        teacher_logits_TBK = torch.cat([logits for logits, _ in said], dim=1)
        teacher_features_TBD = torch.cat([features for _, features in said], dim=1)
        targets_TBK = teacher_targets(teacher_logits_TBK, state.centers["dino"], at.teacher_temperature)

    guesses: list[Tensor] = []  # the student's probabilities for the global views, for the monitors

    def losses() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in parts:
            targets = targets_of_pairs(targets_TBK[:, part])
            weights_R = pair_weights(len(views), targets_TBK[:, part])
            loss, guess_RK = state.student.loss([view[part] for view in views], targets, weights_R, spec, watch)
            guesses.append(guess_RK)
            yield loss, {}

    sums = backward_(state, losses(), accumulate)
    frozen: list[nn.Module] = [state.student.head.last_layer] if at.freeze_last_layer else []
    frozen += [state.student.backbone] if at.freeze_backbone else []
    found, done = update_(
        state,
        sums,
        at.momentum,
        lambda student: {"grad_norm": clip_each_(student.parameters(), spec.clip_norm)},
        spare=frozen,
    )
    if not done:
        go_back()
        return found
    update_center_(state.centers["dino"], teacher_logits_TBK, spec.center_momentum)
    if not watch:
        return found
    watched = collapse_monitors(
        targets_TBK.flatten(0, 1),
        teacher_features_TBD.flatten(0, 1),
        state.centers["dino"],
        student_RK=predictions(torch.cat(guesses)[None], spec.student_temperature),
    )
    return found | {"kl_nats": found["loss"] - watched["target_entropy_nats"], **watched}
