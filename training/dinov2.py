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
from training.distillation import Schedule, State, move_center_, teacher_copy
from training.losses import koleo_loss
from training.masking import MaskSpec
from training.monitors import collapse_monitors, predictions
from training.optimizer import clip_together_, set_rates_
from training.precision import Precision, narrow_products
from training.projection_head import HeadSpec, ProjectionHead
from training.prototypes import Scores, Targets, copied_rows, one_after_the_other, pair_weights, targets_of_pairs
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


MAX_WATCHED_PATCHES = 256
"""Masked patches whose targets the monitors see; those of all would be as large as the rest of a step."""


class Dinov2Learner(nn.Module):
    """A backbone, the head of its CLS tokens and the head of its patches, which may be the same."""

    def __init__(self, backbone: ViT, dino_head: ProjectionHead, ibot_head: ProjectionHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def encode(
        self, crops: Sequence[Tensor], masks_GN: Tensor | None, read_GN: Tensor, precision: Precision
    ) -> tuple[Tensor, Tensor]:
        """CLS tokens [C, D] of all crops, and the patches [R, D] of the first batch of crops that are True in `read_GN`; float32.

        All crops [C_i, 3, h_i, w_i] go through the backbone as one packed sequence; `masks_GN` hides patches of the first batch.
        """
        none = [None] * (len(crops) - 1)
        with narrow_products(crops[0].device, precision):
            cls_CD, patches_RD = self.backbone.packed_read(crops, [masks_GN, *none], [read_GN, *none])
        return cls_CD.float(), patches_RD.float()

    def scores(self, cls_BD: Tensor, patches_RD: Tensor) -> tuple[Scores, Scores]:
        """Logits of CLS tokens and of patches, not multiplied out."""
        if self.ibot_head is not None:
            return self.dino_head.scores(cls_BD), self.ibot_head.scores(patches_RD)
        both = self.dino_head.scores(torch.cat([cls_BD, patches_RD]))
        n_cls, z_RE = len(cls_BD), both.bottleneck_RE
        return Scores(z_RE[:n_cls], both.weight_KE), Scores(z_RE[n_cls:], both.weight_KE)

    def cross_entropy(
        self,
        cls_BD: Tensor,
        patches_RD: Tensor,
        targets: tuple[Targets, Targets],
        weights: tuple[Tensor, Tensor],
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum over all rows of CLS tokens and patches, and (without gradients) each row's own, [B] and [R].

        A shared head takes both in one call.
        """
        if self.ibot_head is not None:
            of_cls, rows_B = self.dino_head.cross_entropy(cls_BD, targets[0], weights[0], temperature)
            of_patches, rows_R = self.ibot_head.cross_entropy(patches_RD, targets[1], weights[1], temperature)
            return of_cls + of_patches, rows_B, rows_R
        rows = torch.cat([cls_BD, patches_RD])
        loss, losses = self.dino_head.cross_entropy(
            rows, one_after_the_other(len(cls_BD), *targets), torch.cat(weights), temperature
        )
        return loss, losses[: len(cls_BD)], losses[len(cls_BD) :]


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
class Said:
    """What the teacher says of the global crops of a part."""

    cls_TBK: Tensor
    """Its probabilities for CLS tokens."""
    patches: Targets
    """And for masked patches, a few rows at a time."""
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
        said, means = teacher_says(state, parts, at.teacher_temperature, spec)
    seeds = torch.randint(2**62, (accumulate,)).tolist()
    koleo: list[Koleo] = [partial(koleo_of_views, spec=spec)] * accumulate
    if accumulate > 1 and spec.koleo_weight:
        koleo = koleo_across(state.student, parts, spec, hide, seeds)

    guesses: list[Tensor] = []  # the student's logits of the global crops, for the monitors

    def losses() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part, of_part, of_cls, seed in zip(parts, said, koleo, seeds, strict=True):
            torch.manual_seed(seed)
            yield loss_of(state.student, part, of_part, spec, hide, of_cls, guesses if watch else None)

    sums = backward_(state, losses(), accumulate)
    frozen = [state.student.backbone] if at.freeze_backbone else []
    found, done = update_(state, sums, at.momentum, lambda student: clip_each_network_(student, spec.clip_norm), frozen)
    if not done:
        go_back()
        return found
    for name, (mean_K, count) in means.items():
        move_center_(state.centers[name], mean_K, count, spec.center_momentum)
    if not watch:
        return found
    watched = watched_of(said, guesses, state, spec)
    if not spec.dino_weight:  # no loss is a cross-entropy of CLS tokens then
        return found | watched
    cross_entropy = (found["dino_local"] + found["dino_global"]) / spec.dino_weight
    return found | {"kl_nats": cross_entropy - watched["target_entropy_nats"], **watched}


def watched_of(said: Sequence[Said], guesses: Sequence[Tensor], state: State, spec: Dinov2Spec) -> dict[str, float]:
    """What tells of collapse, of CLS tokens and, where they are compared, of (some) masked patches."""
    patches = {}
    if spec.ibot_weight:
        some = MAX_WATCHED_PATCHES // len(said)
        patches = {
            "patch_targets_RK": torch.cat([one.patches(slice(0, min(some, len(one.patches_RD)))) for one in said]),
            "patch_features_RD": torch.cat([one.patches_RD for one in said]),
            "patch_center_K": state.centers["ibot"],
        }
    return collapse_monitors(
        torch.cat([one.cls_TBK for one in said], dim=1).flatten(0, 1),
        torch.cat([one.cls_TBD for one in said], dim=1).flatten(0, 1),
        state.centers["dino"],
        student_RK=predictions(torch.cat(list(guesses))[None], spec.student_temperature),
        **patches,
    )


def teacher_says(
    state: State, parts: Sequence[Part], temperature: float, spec: Dinov2Spec
) -> tuple[list[Said], dict[str, tuple[Tensor, Tensor]]]:
    """What the teacher (or guide) says of CLS tokens and masked patches of each part, taken over the whole batch.

    With centring also what the centres move by afterwards: the mean [K] of the logits by head, and how many there are.
    """
    teacher = state.teacher if state.guide is None else state.guide
    cls, masked, scores = [], [], []
    for part in parts:
        cls_GD, patches_RD = teacher.encode(part.crops[:1], None, part.masks_GN, spec.precision)
        cls.append(cls_GD)
        masked.append(patches_RD)
        scores.append(teacher.scores(cls_GD, patches_RD))
    # The weights are the same tensor for all parts, or at least have the same values.
    dino, ibot = (
        Scores(torch.cat([one.bottleneck_RE for one in ones]), ones[0].weight_KE) for ones in zip(*scores, strict=True)
    )
    n_rows = [(len(of_cls.bottleneck_RE), len(of_patches.bottleneck_RE)) for of_cls, of_patches in scores]
    if spec.targets == "sinkhorn":
        means = {}
        probs_GK, patch_probs_RK = (one.sinkhorn(temperature, spec.sinkhorn_iterations) for one in (dino, ibot))
        patches = [copied_rows(rows_RK) for rows_RK in patch_probs_RK.split([n for _, n in n_rows])]
    else:
        means = {"dino": dino.batch_mean(), "ibot": ibot.batch_mean()}
        probs_GK = dino.probs(slice(None), temperature, state.centers["dino"])
        patches = [
            partial(of_patches.probs, temperature=temperature, center_K=state.centers["ibot"])
            for _, of_patches in scores
        ]
    cls_probs = probs_GK.split([n for n, _ in n_rows])
    found = zip(cls_probs, patches, cls, masked, strict=True)
    return [Said(probs.unflatten(0, (2, -1)), p, x.unflatten(0, (2, -1)), y) for probs, p, x, y in found], means


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
            cls_VD, _ = student.encode(
                crops, part.masks_GN if hide else None, torch.zeros_like(part.masks_GN), spec.precision
            )
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


def loss_of(
    student: Dinov2Learner,
    part: Part,
    said: Said,
    spec: Dinov2Spec,
    hide: bool,
    koleo: Koleo,
    guesses: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a part, and the weighted terms that it is the sum of. `guesses` takes the student's logits of the global crops.

    DINO is the mean over all pairs of different views; `dino_global` holds the two pairs of global crops, `dino_local` the others.
    """
    n_images, masks_GN = len(part.views[0]), part.masks_GN
    cls_VD, patches_RD = student.encode(part.crops, masks_GN if hide else None, masks_GN, spec.precision)
    if guesses is not None:
        with torch.no_grad():
            guesses.append(student.dino_head(cls_VD[: 2 * n_images].detach()))
    weights_V = spec.dino_weight * pair_weights(len(part.views), said.cls_TBK)
    # As released, the mean of iBOT is over all crops, also those without a mask, and each crop's patches weigh one together.
    weights_G = spec.ibot_weight / (len(masks_GN) * masks_GN.sum(dim=1).clamp_min(1))
    loss, dino_V, ibot_R = student.cross_entropy(
        cls_VD,
        patches_RD,
        (targets_of_pairs(said.cls_TBK), said.patches),
        (weights_V, weights_G[:, None].expand_as(masks_GN)[masks_GN]),
        spec.student_temperature,
    )
    dino_global, dino_local = (rows.sum() for rows in dino_V.split([2 * n_images, len(dino_V) - 2 * n_images]))
    terms = {"dino_local": dino_local, "dino_global": dino_global}
    if spec.koleo_weight:
        terms["koleo"] = spec.koleo_weight * koleo(cls_VD[: len(masks_GN)])
        loss = loss + terms["koleo"]
    if spec.ibot_weight:
        terms["ibot"] = ibot_R.sum()
    return loss, terms


def clip_each_network_(student: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of the backbone, and of each head, to a global L2 norm of at most `max_norm`; returns the norms before."""
    return {
        f"grad_norm_{name}": clip_together_(network.parameters(), max_norm)
        for name, network in student.named_children()
    }
