"""One step of DINOv2: DINO on CLS tokens, iBOT on masked patches, KoLeo on the student's CLS tokens (Oquab et al. 2023, section 4).

Axes: V views, G global crops of all images (G = 2B, crop-major), B images, N patches, R masked patches of the batch, D features,
K prototypes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.vit import Block, ViT
from data.errors import InputError
from training import parallel
from training.distillation import Schedule, State, batch_mean, move_center_, teacher_copy
from training.losses import (
    dino_cross_entropy,
    ibot_loss,
    koleo_loss,
    row_cross_entropy,
    sinkhorn_knopp,
    teacher_targets,
)
from training.masking import MaskSpec
from training.monitors import collapse_monitors, predictions
from training.optimizer import clip_together_, set_rates_
from training.precision import Precision, narrow_products
from training.projection_head import HeadSpec, ProjectionHead
from training.step import backward_, parts_of, update_, way_back


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
    precision: Precision = "fp32"
    """As in DINOv1's step."""


class Dinov2Learner(nn.Module):
    """A backbone, the head of its CLS tokens and the head of its patches, which may be the same."""

    def __init__(self, backbone: ViT, dino_head: ProjectionHead, ibot_head: ProjectionHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def encode(self, crops: Sequence[Tensor], masks_GN: Tensor | None, precision: Precision) -> tuple[Tensor, Tensor]:
        """CLS tokens [C, D] of all crops, and patches [G, N, D] of the first batch of crops, to which the masks belong; float32.

        All crops [C_i, 3, h_i, w_i] go through the backbone as one packed sequence.
        """
        masks = [masks_GN, *[None] * (len(crops) - 1)]
        with narrow_products(crops[0].device, precision):
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
class Part:
    """Some images of a batch: their views [B, 3, h, w], the two global ones first, and the masks [G, N] of their global crops."""

    views: Sequence[Tensor]
    masks_GN: Tensor

    @property
    def crops(self) -> list[Tensor]:
        """The global views, and the local ones, as one tensor each."""
        return [torch.cat(list(same)) for same in (self.views[:2], self.views[2:]) if same]


@dataclass(frozen=True)
class Targets:
    """What the teacher says of the global crops of a part."""

    cls_TBK: Tensor
    patches_RK: Tensor
    cls_TBD: Tensor
    """Its features, for the monitors; also of the masked patches."""
    patches_RD: Tensor


def train_step_(
    state: State,
    views: Sequence[Tensor],
    masks_GN: Tensor,
    at: Schedule,
    spec: Dinov2Spec,
    watch: bool = True,
    accumulate: int = 1,
) -> dict[str, float]:
    """One step on views [B, 3, h, w], the two global ones first, and masks of the global crops; returns each term as it was optimised.

    If `watch`, what tells of collapse too. With a guide the student sees every patch, and the masks only say which patches are compared.
    `accumulate` is the number of parts that the batch is taken in. A loss, term or gradient that is not finite changes nothing; the
    caller sees it in what is returned.
    """
    set_rates_(state.optimizer, at.lr, at.weight_decay, 0.0 if at.freeze_last_layer else at.lr)
    masks_2BN = masks_GN.unflatten(0, (2, -1))
    parts = [
        Part([view[images] for view in views], masks_2BN[:, images].flatten(0, 1))
        for images in parts_of(len(views[0]), accumulate)
    ]
    hide, go_back = state.guide is None, way_back(state)
    with torch.no_grad():
        targets, means = teacher_says(state, parts, at.teacher_temperature, spec)
    seeds = torch.randint(2**62, (accumulate,)).tolist()
    koleo: list[Koleo] = [partial(koleo_of_views, spec=spec)] * accumulate
    if accumulate > 1 and spec.koleo_weight:
        koleo = koleo_across(state.student, parts, spec, hide, seeds)

    guesses: list[Tensor] = []

    def terms() -> Iterator[dict[str, Tensor]]:
        for part, said, of_cls, seed in zip(parts, targets, koleo, seeds, strict=True):
            torch.manual_seed(seed)
            yield loss_terms(state.student, part, said, spec, hide, of_cls, guesses if watch else None)

    sums = backward_(state, terms(), accumulate)
    frozen = [state.student.backbone] if at.freeze_backbone else []
    found, done = update_(state, sums, at.momentum, lambda student: clip_each_network_(student, spec.clip_norm), frozen)
    if not done:
        go_back()
        return found
    for name, (mean_K, count) in means.items():
        move_center_(state.centers[name], mean_K, count, spec.center_momentum)
    if not watch:
        return found
    watched = watched_of(targets, guesses, state, spec)
    cross_entropy = (
        (found["dino_local"] + found["dino_global"]) / spec.dino_weight if spec.dino_weight else float("nan")
    )
    return found | {"kl_nats": cross_entropy - watched["target_entropy_nats"], **watched}


def watched_of(
    targets: Sequence[Targets], guesses: Sequence[Tensor], state: State, spec: Dinov2Spec
) -> dict[str, float]:
    """What tells of collapse, of CLS tokens and, where they are compared, of masked patches."""
    patches = {}
    if spec.ibot_weight:
        patches = {
            "patch_targets_RK": torch.cat([said.patches_RK for said in targets]),
            "patch_features_RD": torch.cat([said.patches_RD for said in targets]),
            "patch_center_K": state.centers["ibot"],
        }
    return collapse_monitors(
        torch.cat([said.cls_TBK for said in targets], dim=1).flatten(0, 1),
        torch.cat([said.cls_TBD for said in targets], dim=1).flatten(0, 1),
        state.centers["dino"],
        student_RK=torch.cat(list(guesses)),
        **patches,
    )


def teacher_says(
    state: State, parts: Sequence[Part], temperature: float, spec: Dinov2Spec
) -> tuple[list[Targets], dict[str, tuple[Tensor, Tensor]]]:
    """The teacher's (or guide's) probabilities for CLS tokens and masked patches of each part, taken over the whole batch.

    With centring also what the centres move by afterwards: the mean [K] of the logits by head, and how many there are.
    """
    teacher = state.teacher if state.guide is None else state.guide
    cls, patches, logits, patch_logits = [], [], [], []
    for part in parts:
        cls_GD, patches_GND = teacher.encode(part.crops[:1], None, spec.precision)
        patches.append(patches_GND[part.masks_GN])
        cls_GK, patches_RK = teacher.logits(cls_GD, patches[-1])
        cls.append(cls_GD)
        logits.append(cls_GK)
        patch_logits.append(patches_RK)
    heads = {"dino": torch.cat(logits), "ibot": torch.cat(patch_logits)}
    if spec.targets == "sinkhorn":
        everywhere, means = parallel.column_log_sum, {}
        probs = {
            name: sinkhorn_knopp(rows_RK, temperature, spec.sinkhorn_iterations, everywhere)
            for name, rows_RK in heads.items()
        }
    else:
        means = {name: batch_mean(rows_RK) for name, rows_RK in heads.items()}
        probs = {name: teacher_targets(rows_RK, state.centers[name], temperature) for name, rows_RK in heads.items()}
    cls_probs = probs["dino"].split([len(rows) for rows in logits])
    patch_probs = probs["ibot"].split([len(rows) for rows in patch_logits])
    found = zip(cls_probs, patch_probs, cls, patches, strict=True)
    return [Targets(c.unflatten(0, (2, -1)), p, x.unflatten(0, (2, -1)), y) for c, p, x, y in found], means


Koleo = Callable[[Tensor], Tensor]
"""The term of the student's CLS tokens [G, D]."""


def koleo_of_views(cls_GD: Tensor, spec: Dinov2Spec) -> Tensor:
    """KoLeo of the CLS tokens of all processes, summed over the global views that the spec counts."""
    counted = cls_GD.chunk(2)[: 1 if spec.koleo_as == "paper" else 2]
    return torch.stack([koleo_loss(parallel.all_rows(cls_BD)) for cls_BD in counted]).sum()


def koleo_across(
    student: Dinov2Learner, parts: Sequence[Part], spec: Dinov2Spec, hide: bool, seeds: Sequence[int]
) -> list[Koleo]:
    """KoLeo over the images of all parts, as a function of the CLS tokens [G, D] of each part.

    The tokens of all parts are computed once without gradients, which costs one more forward pass of the student. What KoLeo's gradient
    is at each of them is then handed to the part that computes it again (as Gao et al. 2021 do for contrastive losses). `seeds` make
    stochastic depth drop the same paths both times; without it the global crops are enough.
    """
    drops = any(isinstance(module, Block) and module.drop_path for module in student.modules())
    found = []
    for part, seed in zip(parts, seeds, strict=True):
        torch.manual_seed(seed)
        crops = part.crops if drops else part.crops[:1]
        with torch.no_grad():
            cls_VD, _ = student.encode(crops, part.masks_GN if hide else None, spec.precision)
        found.append(cls_VD[: len(part.masks_GN)].unflatten(0, (2, -1)))
    cls_2BD = torch.cat(found, dim=1).requires_grad_()
    value = koleo_of_views(cls_2BD.flatten(0, 1), spec)
    (gradient_2BD,) = torch.autograd.grad(value, cls_2BD)
    value = value.detach()

    def handed_back(gradient_2bD: Tensor) -> Koleo:
        def term(cls_GD: Tensor) -> Tensor:
            along = (gradient_2bD.flatten(0, 1) * cls_GD).sum() * len(parts)  # `backward_` takes the mean over parts
            return value + along - along.detach()

        return term

    return [handed_back(g) for g in gradient_2BD.split([one.shape[1] for one in found], dim=1)]


def loss_terms(
    student: Dinov2Learner,
    part: Part,
    targets: Targets,
    spec: Dinov2Spec,
    hide: bool,
    koleo: Koleo,
    guesses: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every weighted term of the loss; their sum is what is optimised. `guesses` takes the student's probabilities of the global crops.

    DINO is the mean over all pairs of different views; `dino_global` holds the two pairs of global crops, `dino_local` the others.
    """
    n_images, n_views, masks_GN = len(part.views[0]), len(part.views), part.masks_GN
    cls_VD, patches_GND = student.encode(part.crops, masks_GN if hide else None, spec.precision)
    logits_VK, patches_RK = student.logits(cls_VD, patches_GND[masks_GN])
    logits_VBK = logits_VK.unflatten(0, (n_views, n_images))
    if guesses is not None:
        guesses.append(predictions(logits_VBK[:2], spec.student_temperature))
    dino = dino_cross_entropy(logits_VBK, targets.cls_TBK, spec.student_temperature)
    across_2B = row_cross_entropy(logits_VBK[:2], targets.cls_TBK.flip(0), spec.student_temperature)
    dino_global = 2 * across_2B.mean() / (2 * n_views - 2)
    terms = {"dino_local": spec.dino_weight * (dino - dino_global), "dino_global": spec.dino_weight * dino_global}
    if spec.koleo_weight:
        terms["koleo"] = spec.koleo_weight * koleo(cls_VD[: len(masks_GN)])
    if spec.ibot_weight:
        weights_R = (1 / masks_GN.sum(dim=1).clamp_min(1))[:, None].expand_as(masks_GN)[masks_GN]
        ibot = ibot_loss(patches_RK, targets.patches_RK, weights_R, len(masks_GN), spec.student_temperature)
        terms["ibot"] = spec.ibot_weight * ibot
    return terms


def clip_each_network_(student: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of the backbone, and of each head, to a global L2 norm of at most `max_norm`; returns the norms before."""
    return {
        f"grad_norm_{name}": clip_together_(network.parameters(), max_norm)
        for name, network in student.named_children()
    }
