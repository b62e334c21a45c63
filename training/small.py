"""Recipes for little data: published methods, scaled to the number of images and the batch by one rule.

The published values are those of a million images and batches of a thousand. docs/small-data.md gives the rule in words, its reasons,
and what was measured. Each quantity moves evenly with the logarithm of what it depends on, from the published value to that of a small set.
"""

import math
from dataclasses import replace
from typing import Any

from backbones.vit import ViTSpec
from data.crops import CropSpec
from data.errors import InputError
from data.preprocess import Preprocess
from training.dinov2 import Dinov2Spec
from training.distillation import StepSpec
from training.projection_head import HeadSpec
from training.published import vit
from training.recipe import OptimSpec, Recipe

IMAGES_A_PROTOTYPE = 20
"""Of ImageNet-1k and the published 65,536 prototypes."""
PROTOTYPES = (1024, 65_536)
TEMPERATURE = (0.03, 0.07)
"""The teacher's after its warm-up, at the least and the most prototypes: few classes need sharp targets to tell anything."""
STEPS = (10_000, 250_000)
"""From a short run to a hundred epochs of ImageNet in batches of 512."""
MOMENTUM = (0.99, 0.996)
"""The teacher's at the start, for `STEPS`: it must have followed the student some hundred times before the run ends."""
EPOCHS = (20, 1000)

_HEAD = HeadSpec(freeze_magnitude=False)
_OPTIM = OptimSpec(lr=4e-3, lr_batch=1024, lr_rule="sqrt", weight_decay=(0.04, 0.2))
_CPU_CROPS = CropSpec(global_px=96, local_px=48, n_local=6, global_scale=(0.3, 1.0), local_scale=(0.08, 0.35))
_CPU_BACKBONE = ViTSpec(patch_px=16, width=192, depth=6, heads=3, img_px=96)
_V2: dict[str, Any] = {"layer_scale": 1e-5, "mask_token": True}

SMALL: dict[str, tuple[Recipe, int]] = {
    "dino_small": (Recipe(backbone=vit("small", 16, drop_path=0.1), head=_HEAD, optim=_OPTIM, batch_size=256), 40_000),
    "dinov2_small": (
        Recipe(
            backbone=vit("small", 14, drop_path=0.1, drop_path_uniform=True, **_V2),
            crops=CropSpec(local_px=98, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)),
            head=_HEAD,
            optim=_OPTIM,
            step=Dinov2Spec(),
            batch_size=256,
        ),
        40_000,
    ),
    "dino_small_cpu": (
        Recipe(
            backbone=_CPU_BACKBONE,
            crops=_CPU_CROPS,
            head=replace(_HEAD, hidden=768, bottleneck=128),
            optim=_OPTIM,
            step=StepSpec(),
            preprocess=Preprocess(size_px=128, resize_px=128, whole_px=224),
            batch_size=32,
        ),
        10_000,
    ),
    "dinov2_small_cpu": (
        Recipe(
            backbone=replace(_CPU_BACKBONE, **_V2),
            crops=_CPU_CROPS,
            head=replace(_HEAD, hidden=768, bottleneck=128),
            optim=_OPTIM,
            step=Dinov2Spec(),
            preprocess=Preprocess(size_px=128, resize_px=128, whole_px=224),
            batch_size=32,
        ),
        10_000,
    ),
}
"""What is scaled, and about how many steps it takes. The first two want a GPU; the others an hour or two of a CPU."""


def fit_to_data(name: str, n_images: int, batch_size: int | None = None, epochs: int | None = None) -> Recipe:
    """The recipe of this name for a set of `n_images`; batch and length are the rule's too where they are not given.

    Raises InputError for sets too small to train on.
    """
    base, wanted_steps = SMALL[name]
    if n_images < 2:
        raise InputError(f"{n_images} image; recipe {name} needs at least 2")
    batch = batch_size
    if batch is None:
        batch = min(base.batch_size, max(2 ** int(math.log2(n_images / 4)), 2))
    if batch < 1 or (epochs is not None and epochs < 1):
        raise InputError(f"{epochs} epochs of batches of {batch}: want at least 1 of each")
    passes = epochs
    if passes is None:
        passes = round(min(max(wanted_steps * batch / n_images, EPOCHS[0]), EPOCHS[1]))
    prototypes = prototypes_for(n_images)
    temperature = on_log_scale(prototypes, PROTOTYPES, TEMPERATURE)
    return replace(
        base,
        head=replace(base.head, prototypes=prototypes),
        optim=replace(
            base.optim,
            warmup_epochs=min(10.0, passes / 10),
            momentum=(on_log_scale(passes * max(n_images // batch, 1), STEPS, MOMENTUM), 1.0),
            teacher_temperature=(min(0.04, temperature * 2 / 3), temperature),
            teacher_warmup_epochs=min(30.0, passes / 8),
            freeze_last_layer_epochs=min(1.0, passes / 100),
        ),
        epochs=passes,
        batch_size=batch,
        source=f"the rule of docs/small-data.md for {n_images} images in batches of {batch}",
    )


def prototypes_for(n_images: int) -> int:
    """A power of two near one for 20 images, within the published range, and never more than images."""
    near = 2 ** round(math.log2(max(n_images / IMAGES_A_PROTOTYPE, 1)))
    return min(max(near, PROTOTYPES[0]), PROTOTYPES[1], 2 ** int(math.log2(n_images)))


def on_log_scale(x: float, xs: tuple[float, float], ys: tuple[float, float]) -> float:
    """From the first of `ys` at the first of `xs` to the second at the second, evenly in log x; constant outside."""
    share = math.log(x / xs[0]) / math.log(xs[1] / xs[0])
    return ys[0] + (ys[1] - ys[0]) * min(max(share, 0.0), 1.0)
