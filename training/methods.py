"""The methods a recipe may name by its step: DINOv1, DINOv2, and distillation of features.

The training loop knows no other difference between them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.resnet import ResNet
from backbones.vit import ViT, ViTSpec
from training import dinov1, dinov2, distillation, feature_distillation, parallel
from training.dinov2 import Dinov2Spec
from training.distillation import Schedule, State
from training.feature_distillation import FeatureSpec
from training.masking import batch_masks
from training.optimizer import dino_multipliers, dinov2_multipliers, make_optimizer
from training.precision import make_scaler
from training.recipe import Recipe


def make_state(recipe: Recipe, device: torch.device) -> State[Any]:
    """Freshly initialised student, teacher, centres and optimiser."""
    spec = recipe.step
    backbone = ViT(recipe.backbone) if isinstance(recipe.backbone, ViTSpec) else ResNet(recipe.backbone)
    sizes = {"dino": recipe.head.prototypes}
    if isinstance(spec, Dinov2Spec):
        assert isinstance(backbone, ViT)
        student, teacher = (one.to(device) for one in dinov2.make_learners(backbone, recipe.head, spec))
        sizes["ibot"] = (spec.ibot_head or recipe.head).prototypes
    elif isinstance(spec, FeatureSpec):
        student, teacher = (one.to(device) for one in feature_distillation.make_learners(backbone, spec))  # type: ignore[assignment]
        sizes = {"dino": 0}
    else:
        student, teacher = (one.to(device) for one in distillation.make_learners(backbone, recipe.head))  # type: ignore[assignment]
    centers = {name: torch.zeros(size, device=device) for name, size in sizes.items()}
    return State(student, teacher, centers, optimizer_of(student, recipe), make_scaler(device, spec.precision))


def optimizer_of(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of a student's parameters, in groups of equal rates."""
    rates, named = recipe.optim, list(student.named_parameters())
    if isinstance(recipe.step, Dinov2Spec):
        assert isinstance(recipe.backbone, ViTSpec)
        depth = recipe.backbone.depth
        rated = [(p, dinov2_multipliers(name, depth, rates.layer_decay, rates.patch_embed_lr)) for name, p in named]
    else:
        rated = [(p, dino_multipliers(name, p)) for name, p in named]
    return make_optimizer(rated, rates.optimizer)


def take_step_(
    state: State[Any],
    views: Sequence[Tensor],
    at: Schedule,
    recipe: Recipe,
    rng: np.random.Generator,
    watch: bool = True,
    accumulate: int = 1,
) -> dict[str, float]:
    """One step of the recipe's method on views [B, 3, h, w], the two global ones first, taken in `accumulate` parts.

    `rng` draws what is random beyond the views. Returns the loss, its terms and gradient norms and, if `watch`, what tells of collapse;
    where one of them is not finite the step has changed nothing.
    """
    spec = recipe.step
    if isinstance(spec, FeatureSpec):
        return feature_distillation.train_step_(state, views, at, spec, watch, accumulate)
    if not isinstance(spec, Dinov2Spec):
        return dinov1.train_step_(state, views, at, spec, watch, accumulate)
    n_images = len(views[0])
    h, w = (side // state.student.backbone.patch_px for side in views[0].shape[2:])
    if state.guide is None or spec.guided_as == "released":
        # Masks are spread over the whole batch; this process takes those of its images.
        everywhere = batch_masks(2 * n_images * parallel.world_size(), h, w, spec.masks, rng)
        first = n_images * parallel.rank()
        mine = everywhere.reshape(2, -1, h * w)[:, first : first + n_images]
        masks_GN = torch.from_numpy(np.ascontiguousarray(mine)).flatten(0, 1)
    else:
        masks_GN = torch.ones(2 * n_images, h * w, dtype=torch.bool)
    return dinov2.train_step_(state, views, masks_GN.to(views[0].device), at, spec, watch, accumulate)
