"""Distillation of features: a student learns the CLS and patch features of any frozen backbone, which needs no heads.

The teacher may be whatever `--ckpt` takes; its patch, width and normalisation may be others than the student's. Each of the student's
features goes through a linear projection to the teacher's width; the target is the teacher's feature, normalised over its dimensions
without gain or bias, and the loss is smooth L1 (Wei et al. 2022, "Contrastive learning rivals masked image modeling in fine-tuning via
feature distillation", eq. 2 to 4: the normalisation makes teachers of any scale comparable). Patches are compared on the student's grid.

Axes: B images, D the student's features, E the teacher's, N = h * w patches, row-major.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.checkpoints import load_backbone
from backbones.resnet import ResNet
from backbones.vit import ViT
from data.errors import InputError
from data.preprocess import Preprocess
from runtimes.connection import REMOTE_SCHEMES
from runtimes.open import open_runtime
from runtimes.runtime import Runtime, step_px
from training import parallel
from training.distillation import Schedule, State, teacher_copy
from training.monitors import effective_rank
from training.optimizer import clip_together_, set_rates_
from training.precision import Precision, narrow_products
from training.step import backward_, parts_of, update_, way_back

SMOOTH_L1_BETA = 2.0
"""Where the loss turns from squared to linear (Wei et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Constants of the step."""

    teacher_width: int = 0
    """E. Filled in when the teacher is opened."""
    cls_weight: float = 1.0
    patch_weight: float = 1.0
    clip_norm: float = 3.0
    """Largest L2 norm of all gradients together; 0 leaves gradients as they are."""
    precision: Precision = "fp32"
    """As in DINOv1's step."""


@dataclass(frozen=True)
class Said:
    """What the teacher says of one batch of equally large views, normalised."""

    cls_BE: Tensor
    patches_BEhw: Tensor

    def of(self, part: slice) -> "Said":
        """Of some of the images."""
        return Said(self.cls_BE[part], self.patches_BEhw[part])


class FeatureTeacher:
    """A frozen backbone on the training device, on its own engine, or on a server."""

    def __init__(self, source: str, device: torch.device, views: Preprocess | None = None) -> None:
        """`views`: how the views that it will be shown are normalised; None: by ImageNet's statistics.

        Raises InputError where `source` is nothing that gives embeddings and patches.
        """
        self.source, self.device = source, device
        self.backbone: nn.Module | None = None
        self.runtime: Runtime | None = None
        if source.lower().endswith(".onnx") or source.startswith(REMOTE_SCHEMES):
            self.runtime = open_runtime(source, device=device.type)
            self.manifest = self.runtime.manifest
            if missing := {"embedding", "patches"} - set(self.runtime.outputs):
                raise InputError(f"--teacher {source}: gives no {', '.join(sorted(missing))}; export it anew")
        else:
            loaded = load_backbone(source)
            self.backbone, self.manifest = loaded.model.requires_grad_(False).to(device).eval(), loaded.manifest
        self.patch_px = step_px(self.manifest)
        seen = self.manifest.preprocess
        shape, views = (1, 3, 1, 1), views or Preprocess()
        mean, std = (torch.tensor(v, device=device).view(shape) for v in (seen.mean, seen.std))
        ours_mean, ours_std = (torch.tensor(v, device=device).view(shape) for v in (views.mean, views.std))
        self.gain, self.shift = ours_std / std, (ours_mean - mean) / std
        self._last: tuple[Sequence[Tensor], list[Said]] | None = None
        self.width = self.says([torch.zeros(1, 3, 2 * self.patch_px, 2 * self.patch_px, device=device)])[
            0
        ].cls_BE.shape[1]

    @torch.no_grad()
    def says(self, views: Sequence[Tensor]) -> list[Said]:
        """Of each view [B, 3, H, W]. Several students that ask for the same views share one answer."""
        if self._last is None or self._last[0] is not views:
            self._last = (views, [self._look(view_BCHW) for view_BCHW in views])
        return self._last[1]

    def _look(self, view_BCHW: Tensor) -> Said:
        h, w = (max(round(side / self.patch_px), 1) for side in view_BCHW.shape[2:])
        size = (h * self.patch_px, w * self.patch_px)
        pixels = view_BCHW * self.gain + self.shift
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        if self.backbone is not None:
            found = self.backbone.outputs(pixels)  # type: ignore[operator]
        else:
            assert self.runtime is not None
            arrays = self.runtime.run(pixels.cpu().numpy(), ("embedding", "patches"))
            found = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        cls_BE, patches_BNE = (
            F.layer_norm(found[name].float(), found[name].shape[-1:]) for name in ("embedding", "patches")
        )
        return Said(cls_BE, patches_BNE.transpose(1, 2).unflatten(2, (h, w)))


class FeatureLearner(nn.Module):
    """A backbone and its projections to the teacher's width."""

    def __init__(self, backbone: ViT | ResNet, teacher_width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, teacher_width)
        self.patch_head = nn.Linear(backbone.embed_dim, teacher_width)

    def forward(self, view_BCHW: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        """CLS [B, E] and patches [B, N, E] in the teacher's width, and the features [B, D] themselves."""
        with narrow_products(view_BCHW.device, precision):
            if isinstance(self.backbone, ViT):
                features = self.backbone.features(view_BCHW)
                cls_BD, patches_BND = features.cls, features.patches
            else:
                found = self.backbone.outputs(view_BCHW)
                cls_BD, patches_BND = found["embedding"], found["patches"]
        return self.head(cls_BD.float()), self.patch_head(patches_BND.float()), cls_BD.float()


def make_learners(backbone: ViT | ResNet, spec: FeatureSpec) -> tuple[FeatureLearner, FeatureLearner]:
    """A student, and its moving average. Raises InputError before a teacher was named."""
    if not spec.teacher_width:
        raise InputError("this recipe learns the features of a teacher; name one with --teacher")
    student = FeatureLearner(backbone, spec.teacher_width).train()
    return student, teacher_copy(student)


def feature_losses(cls_BE: Tensor, patches_BNE: Tensor, said: Said) -> tuple[Tensor, Tensor]:
    """Smooth L1 between projected features and the teacher's, for CLS tokens and for patches; scalars.

    The teacher's map is resampled to the student's grid, which for a ResNet is that of its last map.
    """
    n_patches, wanted_BEhw = patches_BNE.shape[1], said.patches_BEhw
    if wanted_BEhw[0, 0].numel() != n_patches:
        side = round(n_patches**0.5)
        wanted_BEhw = F.interpolate(wanted_BEhw, (side, side), mode="bilinear", antialias=True, align_corners=False)
    wanted_BNE = wanted_BEhw.flatten(2).transpose(1, 2)
    return (
        F.smooth_l1_loss(cls_BE, said.cls_BE, beta=SMOOTH_L1_BETA),
        F.smooth_l1_loss(patches_BNE, wanted_BNE, beta=SMOOTH_L1_BETA),
    )


def train_step_(
    state: State[Any],
    views: Sequence[Tensor],
    at: Schedule,
    spec: FeatureSpec,
    watch: bool = True,
    accumulate: int = 1,
) -> dict[str, float]:
    """One step on views [B, 3, h, w]; each is seen by teacher and student alike. Returns each weighted term as it was optimised.

    `accumulate` is the number of parts that the batch is taken in. A loss or gradient that is not finite changes nothing; the caller
    sees it in what is returned.
    """
    set_rates_(state.optimizer, at.lr, at.weight_decay, at.lr)
    go_back = way_back(state)
    said = state.guide.says(views)
    features: list[Tensor] = []

    def losses_of_parts() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in parts_of(len(views[0]), accumulate):
            losses = []
            for view_BCHW, all_said in zip(views, said, strict=True):
                cls_BE, patches_BNE, features_BD = state.student(view_BCHW[part], spec.precision)
                losses.append(feature_losses(cls_BE, patches_BNE, all_said.of(part)))
                features.append(features_BD.detach())
            cls_terms, patch_terms = zip(*losses, strict=True)
            terms = {
                "feature_cls": spec.cls_weight * torch.stack(cls_terms).mean(),
                "feature_patches": spec.patch_weight * torch.stack(patch_terms).mean(),
            }
            yield terms["feature_cls"] + terms["feature_patches"], terms

    found, done = update_(
        state,
        backward_(state, losses_of_parts(), accumulate),
        at.momentum,
        lambda student: {"grad_norm": clip_together_(student.parameters(), spec.clip_norm)},
        spare=[state.student.backbone] if at.freeze_backbone else [],
    )
    if not done:
        go_back()
    elif watch:
        found["effective_rank"] = effective_rank(parallel.all_rows(torch.cat(features))).item()
    return found
