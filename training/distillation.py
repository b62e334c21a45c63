"""One step of self-distillation: views and schedule values in, losses out; student, teacher, centre and optimiser change.

Axes: V views, T teacher views (the two global ones), B images, D features, K prototypes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from backbones.resnet import ResNet
from backbones.vit import Block, ViT
from training import parallel
from training.losses import dino_cross_entropy, teacher_targets
from training.monitors import collapse_monitors
from training.optimizer import clip_each_, set_rates_
from training.projection_head import HeadSpec, ProjectionHead

L = TypeVar("L", bound=nn.Module)


class Learner(nn.Module):
    """A backbone and its projection head."""

    def __init__(self, backbone: ViT | ResNet, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor], bf16: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [V, B, K] and features [V, B, D] of views [B, 3, h, w], those of one size in one pass through the backbone."""
        features: list[Tensor] = []
        start = 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[-2:] != views[start].shape[-2:]:
                with torch.autocast(views[start].device.type, torch.bfloat16, enabled=bf16):
                    features.append(self.backbone(torch.cat(list(views[start:end]))).float())
                start = end
        features_RD = torch.cat(features)
        shape = (len(views), len(views[0]), -1)
        return self.head(features_RD).view(shape), features_RD.view(shape)


@dataclass(frozen=True)
class Schedule:
    """Values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    freeze_last_layer: bool


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Constants of the step."""

    student_temperature: float = 0.1
    center_momentum: float = 0.9
    clip_norm: float = 3.0
    """Largest L2 norm of the gradient of each parameter tensor; 0 leaves gradients as they are."""
    bf16_backbone: bool = False
    """Multiply in bfloat16 within the backbone: faster where the processor can. The head stays in float32, because a teacher temperature
    of 0.02 would turn the rounding of its logits into noise of the targets."""


@dataclass
class State(Generic[L]):
    """All that a step changes."""

    student: L
    teacher: L
    centers: dict[str, Tensor]
    """Running means [K] of the teacher's logits, by head."""
    optimizer: torch.optim.Optimizer
    guide: Any = None
    """A frozen learner, usually larger, whose targets are learned instead of the teacher's. The teacher then only is the student's moving
    average, and what the run is for (Oquab et al. 2023, section 5)."""


def make_learners(backbone: ViT | ResNet, head: HeadSpec) -> tuple[Learner, Learner]:
    """A student, and a teacher with the same weights that takes no gradients and drops no paths."""
    student = Learner(backbone, ProjectionHead(backbone.embed_dim, head)).train()
    return student, teacher_copy(student)


def teacher_copy(student: L) -> L:
    """The same weights, without gradients and without stochastic depth."""
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, Block):
            module.drop_path = 0.0
    return teacher.requires_grad_(False).train()


def train_step_(
    state: State[Learner], views: Sequence[Tensor], at: Schedule, spec: StepSpec, watch: bool = True
) -> dict[str, float]:
    """One step on views [B, 3, h, w], the two global ones first; returns what was optimised and, if `watch`, what tells of collapse.

    A loss or gradient that is not finite changes nothing; the caller sees it in what is returned.
    """
    set_rates_(state.optimizer, at.lr, at.weight_decay, at.lr)
    go_back = way_back(state)
    with torch.no_grad():
        teacher_logits_TBK, teacher_features_TBD = state.teacher(views[:2], bf16=spec.bf16_backbone)
        targets_TBK = teacher_targets(teacher_logits_TBK, state.centers["dino"], at.teacher_temperature)
    student_logits_VBK, _ = state.student(views, bf16=spec.bf16_backbone)
    loss = dino_cross_entropy(student_logits_VBK, targets_TBK, spec.student_temperature)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parallel.average_gradients_(state.student.parameters())
    grad_norm = clip_each_(state.student.parameters(), spec.clip_norm)
    # One transfer from the device tells all processes whether to go on.
    found = parallel.mean_scalars({"loss": loss, "grad_norm": grad_norm})
    if not all(map(math.isfinite, found.values())):
        go_back()
        return found
    if at.freeze_last_layer:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None
    state.optimizer.step()
    ema_update_(state.teacher, state.student, at.momentum)
    update_center_(state.centers["dino"], teacher_logits_TBK, spec.center_momentum)
    if not watch:
        return found
    watched = collapse_monitors(targets_TBK.flatten(0, 1), teacher_features_TBD.flatten(0, 1), state.centers["dino"])
    return {**found, "kl_nats": found["loss"] - watched["target_entropy_nats"], **watched}


def way_back(state: State[Any]) -> Callable[[], None]:
    """Keeps what a step changes before it knows its loss: centres and running statistics. Calling what is returned puts them back."""
    changing = [*state.centers.values(), *state.student.buffers(), *state.teacher.buffers()]
    kept = [tensor.clone() for tensor in changing]

    def go_back() -> None:
        for tensor, before in zip(changing, kept, strict=True):
            tensor.copy_(before)

    return go_back


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m * teacher + (1 - m) * student, over all parameters, frozen ones too; buffers are left alone."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def update_center_(center_K: Tensor, teacher_logits: Tensor, momentum: float) -> None:
    """centre <- m * centre + (1 - m) * mean of the raw teacher logits of all processes (Caron et al. 2021, eq. 4); nothing without any."""
    rows_RK = teacher_logits.float().flatten(0, -2)
    n_rows = parallel.total(torch.tensor(float(len(rows_RK)), device=rows_RK.device))
    mean_K = parallel.total(rows_RK.sum(dim=0)) / n_rows.clamp_min(1)
    center_K.lerp_(mean_K, (1 - momentum) * (n_rows > 0))
