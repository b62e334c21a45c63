"""Frozen teachers by name: what `--teacher` may be, and what a recipe becomes that learns from it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.checkpoints import weights_sha256
from backbones.vit import ViTSpec
from training.feature_distillation import FeatureSpec, FeatureTeacher
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.warm_start import frozen_teacher


def learn_from(
    source: str, recipes: Sequence[Recipe], device: torch.device, n_parts: int = 1
) -> tuple[list[Recipe], Any]:
    """The recipes as they learn from this teacher, and the teacher. Raises InputError where it does not fit one of them.

    A run folder gives a teacher with heads, whose predictions DINOv2 recipes learn, without stochastic depth. Any other backbone has only
    features: a recipe keeps its backbone, its crops (the global ones) and its optimiser, and learns those. Several students share what it
    says of a batch, which may be taken in `n_parts`.
    """
    features = any(isinstance(recipe.step, FeatureSpec) for recipe in recipes)
    if RunFolder(Path(source)).recipe.is_file() and not features:
        guide = frozen_teacher(source, recipes[0], device, recipes[1:])
        return [without_dropping(one) for one in recipes], guide if len(recipes) == 1 else Shared(guide, n_parts)
    teacher = FeatureTeacher(source, device, recipes[0].preprocess)
    return [as_feature_student(recipe, teacher.width) for recipe in recipes], teacher


def without_dropping(recipe: Recipe) -> Recipe:
    """The recipe without stochastic depth, which no student of a frozen teacher has (Oquab et al. 2023, section 5)."""
    backbone = recipe.backbone
    return replace(recipe, backbone=replace(backbone, drop_path=0.0)) if isinstance(backbone, ViTSpec) else recipe


class Shared(nn.Module):
    """A frozen learner that answers the same question once: the students of one batch ask one after the other."""

    def __init__(self, learner: Any, n_parts: int) -> None:
        super().__init__()
        self.learner = learner
        self.backbone, self.dino_head, self.ibot_head = learner.backbone, learner.dino_head, learner.ibot_head
        self.answers: dict[str, deque[tuple[tuple[Any, ...], Any]]] = {
            name: deque(maxlen=n_parts) for name in ("encode", "scores")
        }

    def encode(self, crops: Sequence[Tensor], masks_GN: Tensor | None, read_GN: Tensor, precision: Any) -> Any:
        """As the learner's. It is asked for all patches, of which each student reads its own."""
        every_GN = torch.ones_like(read_GN)
        cls_CD, patches_XD = self._once(
            "encode", (*crops, precision), lambda: self.learner.encode(crops, masks_GN, every_GN, precision)
        )
        return cls_CD, patches_XD[read_GN.flatten()]

    def scores(self, cls_BD: Tensor, patches_RD: Tensor) -> Any:
        """As the learner's."""
        return self._once("scores", (cls_BD, patches_RD), lambda: self.learner.scores(cls_BD, patches_RD))

    def _once(self, name: str, question: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
        for asked, answer in self.answers[name]:
            if len(asked) == len(question) and all(map(same, asked, question)):
                return answer
        self.answers[name].append((question, ask()))
        return self.answers[name][-1][1]


def same(one: Any, other: Any) -> bool:
    """Whether two parts of a question are equal, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is other or one == other


def as_feature_student(recipe: Recipe, teacher_width: int) -> Recipe:
    """The recipe with feature distillation for its method: no masks, stochastic depth or local views, one learning rate for all layers."""
    step = recipe.step if isinstance(recipe.step, FeatureSpec) else FeatureSpec(precision=recipe.step.precision)
    return replace(
        without_dropping(recipe),
        crops=replace(recipe.crops, n_local=0),
        optim=replace(recipe.optim, layer_decay=1.0, patch_embed_lr=1.0, freeze_last_layer_epochs=0),
        step=replace(step, teacher_width=teacher_width),
        expected={},
    )


def fingerprint(guide: Any) -> str:
    """Content hash of a teacher's weights, by which a run that is resumed knows it again."""
    if isinstance(guide, FeatureTeacher):
        return guide.manifest.weights_sha256
    return weights_sha256((guide.learner if isinstance(guide, Shared) else guide).state_dict())
