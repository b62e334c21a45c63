"""Weights that are there: to begin with (a run's student, teacher and heads, or any backbone), or to learn from (a run's frozen teacher).

The position table is fitted to the recipe's. This is how a high-resolution phase begins (Oquab et al. 2023, section 4), and how
published backbones are trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.checkpoints import load_backbone
from backbones.position import resample_table
from backbones.vit import ViTSpec
from data.errors import InputError
from training.dinov2 import Dinov2Spec
from training.distillation import State
from training.methods import make_state
from training.recipe import Recipe
from training.run_folder import RunFolder, read_object

TABLE = "pos_embed"
MOST_HEAD_STEPS = 1000
"""Fresh heads have settled by then: their loss falls no faster than the backbone's would."""


def warm_start_(state: State[Any], source: str) -> None:
    """Load `source` into student and teacher. Raises InputError where its weights do not fit the recipe.

    A run folder gives student, teacher, heads and centres. A backbone (whatever `--ckpt` takes) gives both backbones; heads start fresh.
    """
    folder = RunFolder(Path(source))
    if folder.has_state:
        saved = folder.load_state()
        try:
            parts = [(state.student, saved["student"]), (state.teacher, saved["teacher"])]
            centers = {name: saved["centers"][name] for name in state.centers}
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{folder.states.folder}: is no state of a run of this method; name a backbone instead"
            ) from error
        for network, weights in parts:
            fit_(network, weights, source)
        for name, center_K in state.centers.items():
            if centers[name].shape != center_K.shape:
                raise InputError(f"{source}: has {len(centers[name])} prototypes, the recipe {len(center_K)}")
            center_K.copy_(centers[name])
        return
    weights = load_backbone(source).model.state_dict()
    for network in (state.student, state.teacher):
        fit_(network.backbone, weights, source)


def warming_heads(recipe: Recipe, init: str, steps: int, wanted: int | None) -> Recipe:
    """`recipe` of a run of so many `steps` that begins with `init`, with a while in which fresh heads learn alone.

    A run brings its heads, and needs none. For a backbone it is a tenth of the run, at most `MOST_HEAD_STEPS`; `wanted` overrules both.
    """
    if wanted is None:
        wanted = 0 if RunFolder(Path(init)).recipe.is_file() else min(steps // 10, MOST_HEAD_STEPS)
    return replace(recipe, optim=replace(recipe.optim, freeze_backbone_steps=wanted))


def frozen_teacher(source: str, recipe: Recipe, device: torch.device, beside: Sequence[Recipe] = ()) -> nn.Module:
    """The teacher of a finished DINOv2 run, with its heads, as a guide for `recipe` and others. Raises InputError where they do not fit."""
    folder = RunFolder(Path(source))
    if not folder.has_state:
        raise InputError(f"--teacher {source}: is no run folder; a backbone alone has no heads to learn from")
    found = Recipe.from_json(read_object(folder.recipe).get("recipe"))
    if not isinstance(found.step, Dinov2Spec):
        raise InputError(
            f"--teacher {source}: the teacher is a DINOv1 run, or has no heads; "
            "name its checkpoints/latest.safetensors to learn its features"
        )
    for student in (recipe, *beside):
        if not isinstance(student.step, Dinov2Spec):
            raise InputError(f"--teacher {source}: the recipe is a DINOv1 run; both must be DINOv2")
        wanted, given = (describe_targets(one) for one in (student, found))
        for name, value in wanted.items():
            if given[name] != value:
                raise InputError(
                    f"--teacher {source}: has {name} {given[name]}, the recipe {value}; they must be equal"
                )
    guide = make_state(found, device).teacher
    fit_(guide, folder.load_state()["teacher"], source)
    return guide.eval()


def describe_targets(recipe: Recipe) -> dict[str, Any]:
    """What teacher and student must agree on for their targets to be comparable."""
    assert isinstance(recipe.step, Dinov2Spec)
    assert isinstance(recipe.backbone, ViTSpec)
    return {
        "patches of px": recipe.backbone.patch_px,
        "prototypes": recipe.head.prototypes,
        "prototypes for patches": (recipe.step.ibot_head or recipe.head).prototypes,
        "the mean of images": recipe.preprocess.mean,
        "the deviation of images": recipe.preprocess.std,
    }


def fit_(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all weights, the position table resampled where its grid differs; only a mask token may be missing, or too many."""
    own, given = network.state_dict(), dict(weights)
    for name in own:
        if name.split(".")[-1] == TABLE and name in given and given[name].shape != own[name].shape:
            given[name] = resize_table(given[name], own[name].shape[1])
        if name.split(".")[-1] == "mask_token":
            given.setdefault(name, own[name])
    for name in given.keys() - own.keys():
        if name.split(".")[-1] == "mask_token":  # of no use without masks
            del given[name]
    for name in own.keys() | given.keys():
        if name not in given:
            raise InputError(
                f"{source}: has no weight {name}, which the recipe wants; choose a recipe of its architecture"
            )
        if name not in own:
            raise InputError(
                f"{source}: has a weight {name}, which the recipe has not; choose a recipe of its architecture"
            )
        if given[name].shape != own[name].shape:
            raise InputError(
                f"{source}: weight {name} has shape {list(given[name].shape)}, the recipe's {list(own[name].shape)}; "
                "choose a recipe of its architecture"
            )
    network.load_state_dict(given)


def resize_table(table_1ND: Tensor, n_rows: int) -> Tensor:
    """Position encodings [1, 1 + M * M, D] for another square grid, bicubic by size; the CLS row stays. `n_rows` = 1 + wanted M * M."""
    side, wanted = (round((n - 1) ** 0.5) for n in (table_1ND.shape[1], n_rows))
    table_MMD = table_1ND[0, 1:].unflatten(0, (side, side))
    patches_ND = resample_table(table_MMD, wanted, wanted, square=True, offset=0.0, antialias=False)
    return torch.cat([table_1ND[:, :1], patches_ND[None]], dim=1)
