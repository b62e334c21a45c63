"""Self-distillation: the pair of networks, what a run remembers, how the teacher and its centre follow.

Axes: V views, T teacher views (the two global ones), B images, D features, K prototypes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from backbones.resnet import ResNet
from backbones.vit import Block, ViT
from training import parallel
from training.precision import Precision, narrow_products
from training.projection_head import HeadSpec, ProjectionHead
from training.prototypes import Targets

L = TypeVar("L", bound=nn.Module)


class Learner(nn.Module):
    """A backbone and its projection head."""

    def __init__(self, backbone: ViT | ResNet, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor], precision: Precision = "fp32") -> tuple[Tensor, Tensor]:
        """Logits [V, B, K] and features [V, B, D] of views [B, 3, h, w], those of one size in one pass through the backbone."""
        features_RD = self.features(views, precision)
        shape = (len(views), len(views[0]), -1)
        return self.head(features_RD).view(shape), features_RD.view(shape)

    def features(self, views: Sequence[Tensor], precision: Precision) -> Tensor:
        """[V * B, D], view-major, float32."""
        features: list[Tensor] = []
        start = 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[-2:] != views[start].shape[-2:]:
                with narrow_products(views[start].device, precision):
                    features.append(self.backbone(torch.cat(list(views[start:end]))).float())
                start = end
        return torch.cat(features)

    def loss(
        self, views: Sequence[Tensor], targets: Targets, weights_R: Tensor, spec: "StepSpec", watch: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of cross-entropies of the views' rows [V * B] against their targets.

        If `watch`, also the logits of the two global views, [2 * B, K], without gradients; else none, [0, K].
        """
        features_RD = self.features(views, spec.precision)
        loss, _ = self.head.cross_entropy(features_RD, targets, weights_R, spec.student_temperature)
        with torch.no_grad():
            return loss, self.head(features_RD[: 2 * len(views[0]) if watch else 0].detach())


@dataclass(frozen=True)
class Schedule:
    """Values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    freeze_last_layer: bool
    freeze_backbone: bool = False


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Constants of the step."""

    student_temperature: float = 0.1
    center_momentum: float = 0.9
    clip_norm: float = 3.0
    """Largest L2 norm of the gradient of each parameter tensor; 0 leaves gradients as they are."""
    precision: Precision = "fp32"
    """Of the products within the backbone: narrower is faster where the processor can. The head stays in float32, because a teacher
    temperature of 0.02 would turn the rounding of its logits into noise of the targets."""


@dataclass
class State(Generic[L]):
    """All that a step changes."""

    student: L
    teacher: L
    centers: dict[str, Tensor]
    """Running means [K] of the teacher's logits, by head."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    averager: parallel.GradientAverage | None = None
    """Of several processes that hold whole weights each."""
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


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m * teacher + (1 - m) * student, over all parameters, frozen ones too; buffers are left alone.

    Where weights are sharded each process moves its own shards.
    """
    followed, followers = ([parallel.shard_of(p) for p in network.parameters()] for network in (student, teacher))
    torch._foreach_lerp_(followers, followed, 1 - momentum)


@torch.no_grad()
def batch_mean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [K] of raw logits [..., K] over the rows of all processes, and the number of rows."""
    rows_RK = logits.float().flatten(0, -2)
    n_rows = parallel.total(torch.tensor(float(len(rows_RK)), device=rows_RK.device))
    return parallel.total(rows_RK.sum(dim=0)) / n_rows.clamp_min(1), n_rows


@torch.no_grad()
def move_center_(center_K: Tensor, mean_K: Tensor, n_rows: Tensor, momentum: float) -> None:
    """centre <- m * centre + (1 - m) * mean (Caron et al. 2021, eq. 4); it stays where there was no row."""
    center_K.lerp_(mean_K, (1 - momentum) * (n_rows > 0))


def update_center_(center_K: Tensor, teacher_logits: Tensor, momentum: float) -> None:
    """Move the centre by the raw teacher logits of all processes."""
    move_center_(center_K, *batch_mean(teacher_logits), momentum)
