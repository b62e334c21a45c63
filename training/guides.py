"""Frozen teachers by name: what `--teacher` may be, and what a recipe becomes that learns from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.checkpoints import weights_sha256
from backbones.vit import ViTSpec
from training.feature_distillation import FeatureSpec, FeatureTeacher
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.warm_start import frozen_teacher


def learn_from(source: str, recipe: Recipe, device: torch.device) -> tuple[Recipe, Any]:
    """The recipe as it learns from this teacher, and the teacher. Raises InputError where the two do not fit.

    A run folder gives a teacher with heads, whose predictions a DINOv2 recipe learns. Any other backbone has only features: the recipe
    keeps its backbone, its crops (the global ones) and its optimiser, and learns those.
    """
    if RunFolder(Path(source)).recipe.is_file() and not isinstance(recipe.step, FeatureSpec):
        return recipe, frozen_teacher(source, recipe, device)
    teacher = FeatureTeacher(source, device)
    return as_feature_student(recipe, teacher.width), teacher


def as_feature_student(recipe: Recipe, teacher_width: int) -> Recipe:
    """The recipe with feature distillation for its method: no masks, stochastic depth or local views, one learning rate for all layers."""
    step = recipe.step if isinstance(recipe.step, FeatureSpec) else FeatureSpec(precision=recipe.step.precision)
    backbone = recipe.backbone
    return replace(
        recipe,
        backbone=replace(backbone, drop_path=0.0) if isinstance(backbone, ViTSpec) else backbone,
        crops=replace(recipe.crops, n_local=0),
        optim=replace(recipe.optim, layer_decay=1.0, patch_embed_lr=1.0, freeze_last_layer_epochs=0),
        step=replace(step, teacher_width=teacher_width),
        expected={},
    )


def fingerprint(guide: Any) -> str:
    """Content hash of a teacher's weights, by which a run that is resumed knows it again."""
    if isinstance(guide, FeatureTeacher):
        return guide.manifest.weights_sha256
    return weights_sha256(guide.state_dict())
