"""Micro twins: a published recipe's method, whole, on a network, head and images so small that a step takes a fraction of a second."""

from dataclasses import replace

from backbones.vit import ViTSpec
from training.dinov2 import Dinov2Spec
from training.projection_head import HeadSpec
from training.recipe import Recipe


def micro_twin(recipe: Recipe) -> Recipe:
    """`recipe` with nothing changed but sizes, batch, and the lengths of warm-ups, which would outlast the test.

    A patch is 8 px instead of 14 or 16, and crops keep the recipe's number of patches in proportion.
    """
    side = 48 if recipe.crops.global_px > 224 else 32
    backbone = recipe.backbone
    if isinstance(backbone, ViTSpec):
        backbone = replace(backbone, patch_px=8, width=24, depth=2, heads=3, img_px=side)
    step = recipe.step
    if isinstance(step, Dinov2Spec) and step.ibot_head is not None:
        step = replace(step, ibot_head=micro_head(step.ibot_head))
    crops = replace(recipe.crops, global_px=side, local_px=16, n_local=min(recipe.crops.n_local, 2))
    return replace(
        recipe,
        backbone=backbone,
        crops=crops,
        head=micro_head(recipe.head),
        step=step,
        optim=replace(recipe.optim, warmup_epochs=0, freeze_last_layer_epochs=0.5),
        preprocess=replace(recipe.preprocess, size_px=side, resize_px=side, whole_px=side),
        epochs=1,
        epoch_steps=2,
        batch_size=4,
    )


def micro_head(head: HeadSpec) -> HeadSpec:
    """The same kind of head with few prototypes."""
    return replace(head, prototypes=24, hidden=16, bottleneck=8)
