"""The recipes by name: published configurations, those that fit themselves to little data, and ours for little time."""

from dataclasses import replace

from backbones.vit import ViTSpec
from data.crops import CropSpec
from data.errors import InputError
from data.preprocess import Preprocess
from training.dinov2 import Dinov2Spec
from training.distillation import StepSpec
from training.projection_head import HeadSpec
from training.published import PUBLISHED
from training.recipe import OptimSpec, Recipe
from training.small import SMALL, fit_to_data

RECIPES: dict[str, Recipe] = PUBLISHED | {
    # For some thousand small images and an hour or two of a CPU; first of the bundled checkpoint's, see docs/bundled-checkpoint.md.
    # Half the depth of a ViT-Ti/16 and small crops, because steps are what a short run lacks. Fewer prototypes than images; a lower
    # teacher momentum and a higher learning rate because the steps are few; a colder teacher because at the published temperature the
    # targets of a run this short stay near uniform and teach little.
    "dino_tiny_small_data": Recipe(
        backbone=ViTSpec(patch_px=16, width=192, depth=6, heads=3, img_px=96),
        crops=CropSpec(global_px=96, local_px=48, n_local=6, global_scale=(0.3, 1.0), local_scale=(0.08, 0.35)),
        head=HeadSpec(prototypes=1024, hidden=768, bottleneck=128),
        optim=OptimSpec(
            lr=8e-3,
            warmup_epochs=1,
            weight_decay=(0.04, 0.1),
            momentum=(0.99, 1.0),
            teacher_temperature=(0.02, 0.03),
            teacher_warmup_epochs=6,
            freeze_last_layer_epochs=0.1,
        ),
        step=StepSpec(precision="bf16"),
        preprocess=Preprocess(size_px=128, resize_px=128, whole_px=224),
        epochs=48,
        batch_size=32,
    ),
    # The same backbone and crops, taught by DINOv2: goes on from such a run with --init, see docs/bundled-checkpoint.md.
    # Sinkhorn-Knopp keeps the prototypes in use at batches as small as these, at the temperature that the first phase ended with.
    "dinov2_tiny_small_data": Recipe(
        backbone=ViTSpec(patch_px=16, width=192, depth=6, heads=3, img_px=96, mask_token=True),
        crops=CropSpec(global_px=96, local_px=48, n_local=6, global_scale=(0.3, 1.0), local_scale=(0.08, 0.35)),
        head=HeadSpec(prototypes=1024, hidden=768, bottleneck=128, freeze_magnitude=False),
        optim=OptimSpec(
            lr=4e-3,
            warmup_epochs=1,
            weight_decay=(0.04, 0.1),
            momentum=(0.992, 1.0),
            teacher_temperature=(0.03, 0.03),
            teacher_warmup_epochs=0,
            freeze_last_layer_epochs=0.1,
            layer_decay=0.9,
        ),
        step=Dinov2Spec(targets="sinkhorn", ibot_weight=0.5),
        preprocess=Preprocess(size_px=128, resize_px=128, whole_px=224),
        epochs=20,
        batch_size=32,
    ),
    # Seconds on one core; shows that everything runs, learns next to nothing.
    "smoke": Recipe(
        backbone=ViTSpec(patch_px=8, width=48, depth=2, heads=3, img_px=32),
        crops=CropSpec(global_px=32, local_px=16, n_local=2),
        head=HeadSpec(prototypes=64, hidden=64, bottleneck=16),
        optim=OptimSpec(warmup_epochs=1, momentum=(0.9, 1.0)),
        preprocess=Preprocess(size_px=32, resize_px=36, whole_px=64),
        epochs=2,
        batch_size=8,
    ),
    # The same with every part of DINOv2.
    "smoke_dinov2": Recipe(
        backbone=ViTSpec(
            patch_px=8,
            width=48,
            depth=2,
            heads=3,
            img_px=32,
            registers=2,
            layer_scale=1e-5,
            mask_token=True,
            drop_path=0.3,
            drop_path_uniform=True,
        ),
        crops=CropSpec(global_px=32, local_px=16, n_local=2),
        head=HeadSpec(prototypes=64, hidden=64, bottleneck=16, freeze_magnitude=False),
        optim=OptimSpec(
            lr=4e-3,
            lr_batch=1024,
            lr_rule="sqrt",
            warmup_epochs=1,
            momentum=(0.9, 1.0),
            layer_decay=0.9,
            patch_embed_lr=0.2,
        ),
        step=Dinov2Spec(targets="sinkhorn"),
        preprocess=Preprocess(size_px=32, resize_px=36, whole_px=64),
        epochs=2,
        batch_size=8,
    ),
}


def check_name(name: str) -> None:
    """Raise InputError, with the known names, for a recipe that is none."""
    if name not in RECIPES and name not in SMALL:
        raise InputError(f"recipe {name!r} is unknown; want one of {', '.join([*SMALL, *RECIPES])}")


def find_recipe(name: str, n_images: int, batch_size: int | None = None, epochs: int | None = None) -> Recipe:
    """The recipe of this name, with another batch and length where they are given; a shorter one's warm-ups are shortened with it.

    One for little data is fitted to `n_images`. Raises InputError for an unknown name.
    """
    check_name(name)
    if name in SMALL:
        return fit_to_data(name, n_images, batch_size, epochs)
    recipe = RECIPES[name]
    if batch_size is not None:
        recipe = replace(recipe, batch_size=batch_size)
    if epochs is not None and 0 < epochs < recipe.epochs:
        return recipe.shortened(epochs)
    return recipe if epochs is None else replace(recipe, epochs=epochs)
