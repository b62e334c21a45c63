"""One step of DINOv2: DINO on CLS tokens, iBOT on masked patches, KoLeo on the student's CLS tokens (Oquab et al. 2023, section 4).

Axes: V views, G global crops of all images (G = 2B, crop-major), B images, N patches, R masked patches of the batch, D features,
K prototypes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.vit import ViT
from data.errors import InputError
from training import parallel
from training.distillation import Schedule, State, ema_update_, teacher_copy, update_center_, way_back
from training.losses import (
    dino_cross_entropy,
    ibot_loss,
    koleo_loss,
    row_cross_entropy,
    sinkhorn_knopp,
    teacher_targets,
)
from training.masking import MaskSpec
from training.monitors import collapse_monitors
from training.optimizer import set_rates_
from training.projection_head import HeadSpec, ProjectionHead


@dataclass(frozen=True, kw_only=True)
class Dinov2Spec:
    """Constants of the step."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_as: Literal["paper", "released"] = "released"
    """`released`: summed over both global crops, as the code does and its weights were trained; `paper`: of the first one only, as the
    text says. The sum pulls twice as hard and sees both distributions of blur."""
    masks: MaskSpec = field(default_factory=MaskSpec)
    guided_as: Literal["paper", "released"] = "paper"
    """With a guide, which patches are compared: `paper`, all of both global crops; `released`, those that `masks` picks, as in the code of
    DINOv3, the only one of this family that was published. It costs a sixth of the head's work, and the picked patches weigh more."""
    ibot_head: HeadSpec | None = None
    """None: patches go through the head of the CLS tokens ("tied"); better for small models, untied for large ones."""
    targets: Literal["centering", "sinkhorn"] = "centering"
    sinkhorn_iterations: int = 3
    student_temperature: float = 0.1
    center_momentum: float = 0.9
    clip_norm: float = 3.0
    """Largest L2 norm of all gradients of the backbone, and of each head; 0 leaves gradients as they are."""
    bf16_backbone: bool = False
    """As in DINOv1's step."""


class Dinov2Learner(nn.Module):
    """A backbone, the head of its CLS tokens and the head of its patches, which may be the same."""

    def __init__(self, backbone: ViT, dino_head: ProjectionHead, ibot_head: ProjectionHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def encode(self, crops: Sequence[Tensor], masks_GN: Tensor | None, bf16: bool) -> tuple[Tensor, Tensor]:
        """CLS tokens [C, D] of all crops, and patches [G, N, D] of the first batch of crops, to which the masks belong; float32.

        All crops [C_i, 3, h_i, w_i] go through the backbone as one packed sequence.
        """
        masks = [masks_GN, *[None] * (len(crops) - 1)]
        with torch.autocast(crops[0].device.type, torch.bfloat16, enabled=bf16):
            found = self.backbone.packed_features(crops, masks)
        return torch.cat([one.cls for one in found]).float(), found[0].patches.float()

    def logits(self, cls_BD: Tensor, patches_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] of CLS tokens and [R, K'] of patches; a shared head takes both in one call."""
        if self.ibot_head is not None:
            return self.dino_head(cls_BD), self.ibot_head(patches_RD)
        both = self.dino_head(torch.cat([cls_BD, patches_RD]))
        return both[: len(cls_BD)], both[len(cls_BD) :]


def make_learners(backbone: ViT, head: HeadSpec, spec: Dinov2Spec) -> tuple[Dinov2Learner, Dinov2Learner]:
    """A student and a teacher with the same weights. Raises InputError for a backbone without a mask token."""
    if backbone.mask_token is None and spec.ibot_weight and spec.masks.crops:
        raise InputError("DINOv2 masks patches, and this backbone has no mask token; make it with mask_token=True")
    untied = None if spec.ibot_head is None else ProjectionHead(backbone.embed_dim, spec.ibot_head)
    student = Dinov2Learner(backbone, ProjectionHead(backbone.embed_dim, head), untied)
    return student.train(), teacher_copy(student)


@dataclass(frozen=True)
class Targets:
    """What the teacher says of the global crops."""

    cls_TBK: Tensor
    patches_RK: Tensor
    cls_TBD: Tensor
    """Its features, for the monitors."""


def train_step_(
    state: State, views: Sequence[Tensor], masks_GN: Tensor, at: Schedule, spec: Dinov2Spec, watch: bool = True
) -> dict[str, float]:
    """One step on views [B, 3, h, w], the two global ones first, and masks of the global crops; returns each term as it was optimised.

    If `watch`, what tells of collapse too. With a guide the student sees every patch, and the masks only say which patches are compared.
    A loss, term or gradient that is not finite changes nothing; the caller sees it in what is returned.
    """
    set_rates_(state.optimizer, at.lr, at.weight_decay, 0.0 if at.freeze_last_layer else at.lr)
    global_crops = torch.cat(list(views[:2]))
    go_back = way_back(state)
    with torch.no_grad():
        targets = teacher_says_(state, global_crops, masks_GN, at.teacher_temperature, spec)
    terms = loss_terms(state.student, views, masks_GN, targets, spec, hide=state.guide is None)
    loss = torch.stack(list(terms.values())).sum()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parallel.average_gradients_(state.student.parameters())
    norms = clip_each_network_(state.student, spec.clip_norm)
    # One transfer from the device tells all processes whether to go on.
    found = parallel.mean_scalars({"loss": loss, **terms, **norms})
    if not all(map(math.isfinite, found.values())):
        go_back()
        return found
    state.optimizer.step()
    ema_update_(state.teacher, state.student, at.momentum)
    if not watch:
        return found
    watched = collapse_monitors(targets.cls_TBK.flatten(0, 1), targets.cls_TBD.flatten(0, 1), state.centers["dino"])
    cross_entropy = (
        (found["dino_local"] + found["dino_global"]) / spec.dino_weight if spec.dino_weight else float("nan")
    )
    return found | {"kl_nats": cross_entropy - watched["target_entropy_nats"], **watched}


def teacher_says_(
    state: State, global_crops: Tensor, masks_GN: Tensor, temperature: float, spec: Dinov2Spec
) -> Targets:
    """The teacher's (or guide's) probabilities for CLS tokens and masked patches; the centres move on, for the next step to use."""
    teacher = state.teacher if state.guide is None else state.guide
    cls_GD, patches_GND = teacher.encode([global_crops], None, spec.bf16_backbone)
    cls_GK, patches_RK = teacher.logits(cls_GD, patches_GND[masks_GN])
    if spec.targets == "sinkhorn":
        everywhere = parallel.column_log_sum
        cls_probs_GK = sinkhorn_knopp(cls_GK, temperature, spec.sinkhorn_iterations, everywhere)
        patch_probs_RK = sinkhorn_knopp(patches_RK, temperature, spec.sinkhorn_iterations, everywhere)
    else:
        cls_probs_GK = teacher_targets(cls_GK, state.centers["dino"], temperature)
        patch_probs_RK = teacher_targets(patches_RK, state.centers["ibot"], temperature)
        update_center_(state.centers["dino"], cls_GK, spec.center_momentum)
        update_center_(state.centers["ibot"], patches_RK, spec.center_momentum)
    return Targets(cls_probs_GK.unflatten(0, (2, -1)), patch_probs_RK, cls_GD.unflatten(0, (2, -1)))


def loss_terms(
    student: Dinov2Learner,
    views: Sequence[Tensor],
    masks_GN: Tensor,
    targets: Targets,
    spec: Dinov2Spec,
    hide: bool = True,
) -> dict[str, Tensor]:
    """Every weighted term of the loss; their sum is what is optimised.

    DINO is the mean over all pairs of different views; `dino_global` holds the two pairs of global crops, `dino_local` the others.
    """
    n_images, n_views = len(views[0]), len(views)
    crops = [torch.cat(list(same)) for same in (views[:2], views[2:]) if same]
    cls_VD, patches_GND = student.encode(crops, masks_GN if hide else None, spec.bf16_backbone)
    logits_VK, patches_RK = student.logits(cls_VD, patches_GND[masks_GN])
    logits_VBK = logits_VK.unflatten(0, (n_views, n_images))
    dino = dino_cross_entropy(logits_VBK, targets.cls_TBK, spec.student_temperature)
    across_2B = row_cross_entropy(logits_VBK[:2], targets.cls_TBK.flip(0), spec.student_temperature)
    dino_global = 2 * across_2B.mean() / (2 * n_views - 2)
    terms = {"dino_local": spec.dino_weight * (dino - dino_global), "dino_global": spec.dino_weight * dino_global}
    if spec.koleo_weight:
        n_koleo = 1 if spec.koleo_as == "paper" else 2
        by_view = [koleo_loss(parallel.all_rows(cls_BD)) for cls_BD in cls_VD[: n_koleo * n_images].chunk(n_koleo)]
        terms["koleo"] = spec.koleo_weight * torch.stack(by_view).sum()
    if spec.ibot_weight:
        weights_R = (1 / masks_GN.sum(dim=1).clamp_min(1))[:, None].expand_as(masks_GN)[masks_GN]
        ibot = ibot_loss(patches_RK, targets.patches_RK, weights_R, len(masks_GN), spec.student_temperature)
        terms["ibot"] = spec.ibot_weight * ibot
    return terms


def clip_each_network_(student: Dinov2Learner, max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of the backbone, and of each head, to a global L2 norm of at most `max_norm`; returns the norms before."""
    norms: dict[str, Tensor] = {}
    for name, network in student.named_children():
        parameters = [p for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        norms[f"grad_norm_{name}"] = norm
    return norms
