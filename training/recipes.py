"""Recipes: everything that decides what a run computes, as typed values with their sources."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from backbones.vit import ViTSpec
from data.crops import CropSpec
from data.errors import InputError
from data.preprocess import Preprocess
from training.dinov2 import Dinov2Spec
from training.distillation import StepSpec
from training.projection_head import HeadSpec


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW and its schedules."""

    lr: float = 5e-4
    """Peak learning rate for a batch of `lr_batch` images."""
    lr_batch: int = 256
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """How the rate grows with the batch: DINOv1 linearly (Goyal et al. 2017), DINOv2 with its root."""
    min_lr: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and last value of a cosine."""
    momentum: tuple[float, float] = (0.996, 1.0)
    """The teacher's moving average, first and last value of a cosine; lower it for small batches and short runs."""
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    """First and last value of a linear warm-up."""
    teacher_warmup_epochs: int = 0
    freeze_last_layer_epochs: float = 1
    """While it lasts the prototypes keep their first values, which steadies the start."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above it (DINOv2 only)."""
    patch_embed_lr: float = 1.0
    """Multiplies the learning rate of the patch embedding (DINOv2 only)."""

    def peak_lr(self, batch_size: int) -> float:
        """Peak learning rate for this batch."""
        share = batch_size / self.lr_batch
        return self.lr * (share if self.lr_rule == "linear" else share**0.5)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run."""

    backbone: ViTSpec
    crops: CropSpec = field(default_factory=CropSpec)
    head: HeadSpec = field(default_factory=HeadSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    step: StepSpec | Dinov2Spec = field(default_factory=StepSpec)
    """Decides the method: DINOv1 or DINOv2."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    """Stored with the checkpoint: how evaluators and servers shall feed it."""
    epochs: int = 100
    batch_size: int = 64

    def __post_init__(self) -> None:
        patch = self.backbone.patch_px
        for name in ("global_px", "local_px"):
            side = getattr(self.crops, name)
            if side % patch:
                near = max(round(side / patch), 1) * patch
                raise InputError(f"crops.{name} is {side}, no multiple of the patch of {patch} px; {near} would be")
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(f"{self.epochs} epochs of batches of {self.batch_size}: want at least 1 of each")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


RECIPES: dict[str, Recipe] = {
    # Caron et al. 2021; defaults of the authors' script, batch 64 on each of 8 devices in their runs.
    # Their ViT-S/16 after 100 epochs on ImageNet: k-NN 69.3, linear 74.0.
    "dino_vits16": Recipe(
        backbone=ViTSpec(patch_px=16, width=384, depth=12, heads=6, drop_path=0.1),
        head=HeadSpec(prototypes=65_536, freeze_magnitude=False),
        epochs=100,
        batch_size=64,
    ),
    # Caron et al. 2021, the same on ViT-B/16.
    "dino_vitb16": Recipe(
        backbone=ViTSpec(patch_px=16, width=768, depth=12, heads=12, drop_path=0.1),
        head=HeadSpec(prototypes=65_536),
        epochs=100,
        batch_size=64,
    ),
    # For some thousand small images and an hour or two of a CPU; the bundled checkpoint's recipe, see docs/bundled-checkpoint.md.
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
        step=StepSpec(bf16_backbone=True),
        preprocess=Preprocess(size_px=128, resize_px=128, whole_px=224),
        epochs=48,
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


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises InputError that lists the known ones."""
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; want one of {', '.join(RECIPES)}")
    return RECIPES[name]
