"""Recipes: everything that decides what a run computes, as typed values with their sources."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from backbones.resnet import ResNetSpec
from backbones.vit import ViTSpec
from data.crops import CropSpec
from data.errors import InputError
from data.preprocess import Preprocess
from training.dinov2 import Dinov2Spec
from training.distillation import StepSpec
from training.feature_distillation import FeatureSpec
from training.projection_head import HeadSpec

HIGH_RESOLUTION_LR = 0.35
"""Peak learning rate of the high-resolution phase over the first one's. DINOv2's paper says only "lower"; this is Franca's 7.05e-5 over
DINOv2's 2e-4."""


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """The optimiser and its schedules."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
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
    teacher_warmup_epochs: float = 0
    freeze_last_layer_epochs: float = 1
    """While it lasts the prototypes keep their first values, which steadies the start."""
    freeze_backbone_steps: int = 0
    """Steps before all schedules begin, in which only heads learn: fresh heads would spoil a backbone that was loaded."""
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

    backbone: ViTSpec | ResNetSpec
    crops: CropSpec = field(default_factory=CropSpec)
    head: HeadSpec = field(default_factory=HeadSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    step: StepSpec | Dinov2Spec | FeatureSpec = field(default_factory=StepSpec)
    """Decides the method: DINOv1, DINOv2, or the features of a teacher."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    """Stored with the checkpoint: how evaluators and servers shall feed it."""
    epochs: int = 100
    epoch_steps: int | None = None
    """Steps that the schedules count as an epoch; None: a pass over the data. DINOv2 counts 1250, whatever the data."""
    batch_size: int = 64
    """Images a step, over all devices."""
    needs: Literal["nothing", "teacher", "weights"] = "nothing"
    """What it cannot be run without: the frozen teacher that it learns from (`--teacher`), or weights to begin with (`--init`)."""

    source: str = ""
    """Where the values come from."""
    expected: dict[str, float] = field(default_factory=dict)
    """Published scores of what it trains, by name, top-1 in percent."""

    def __post_init__(self) -> None:
        if isinstance(self.step, Dinov2Spec) and not isinstance(self.backbone, ViTSpec):
            raise InputError("DINOv2 masks patches, which a ResNet has not; use DINOv1's step")
        if isinstance(self.step, Dinov2Spec) and self.step.koleo_weight and self.batch_size == 1:
            raise InputError(
                "KoLeo needs at least 2 images in a batch, got 1; raise batch_size or set koleo_weight to 0"
            )
        patch = self.backbone.patch_px if isinstance(self.backbone, ViTSpec) else 1
        for name in ("global_px", "local_px"):
            side = getattr(self.crops, name)
            if side % patch:
                near = max(round(side / patch), 1) * patch
                raise InputError(f"crops.{name} is {side}, no multiple of the patch of {patch} px; {near} would be")
        if min(self.epochs, self.batch_size, 1 if self.epoch_steps is None else self.epoch_steps) < 1:
            raise InputError(f"{self.epochs} epochs of batches of {self.batch_size}: want at least 1 of each")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def shortened(self, epochs: int) -> "Recipe":
        """The recipe with this length, and all its warm-ups compressed with it: as they are, they would take up most of a short run."""
        share, optim = epochs / self.epochs, self.optim
        return dataclasses.replace(
            self,
            optim=dataclasses.replace(
                optim,
                warmup_epochs=optim.warmup_epochs * share,
                teacher_warmup_epochs=optim.teacher_warmup_epochs * share,
                freeze_last_layer_epochs=optim.freeze_last_layer_epochs * share,
            ),
            epochs=epochs,
        )

    def check_start(self, name: str, init: str | None, teacher: str | None) -> None:
        """Raise InputError where what the recipe needs was not named."""
        if self.needs == "teacher" and not teacher:
            raise InputError(
                f"recipe {name} learns from a frozen teacher; name a finished run, or a backbone, with --teacher"
            )
        if self.needs == "weights" and not init:
            raise InputError(
                f"recipe {name} goes on with weights that exist; name a finished run, or a backbone, with --init"
            )

    def at_high_resolution(self, px: int, epochs: int, lr_share: float = HIGH_RESOLUTION_LR) -> "Recipe":
        """The recipe of a short phase on global crops of `px` pixels, all durations compressed to `epochs` (Oquab et al. 2023, section 4).

        Raises InputError for what cannot be made larger.
        """
        if not isinstance(self.backbone, ViTSpec):
            raise InputError("a ResNet has no position encodings to resize; train it with larger crops from the start")
        if px <= self.crops.global_px:
            raise InputError(f"--px {px}: want more than the {self.crops.global_px} px of the run's global crops")
        if not 0 < lr_share < math.inf:
            raise InputError(f"--lr-share {lr_share}: want a number above 0, such as {HIGH_RESOLUTION_LR}")
        larger, patch = px / self.crops.global_px, self.backbone.patch_px
        replace, seen, short = dataclasses.replace, self.preprocess, self.shortened(epochs)
        return replace(
            short,
            backbone=replace(self.backbone, img_px=px),
            crops=replace(self.crops, global_px=px),
            preprocess=replace(
                seen,
                size_px=round(seen.size_px * larger / patch) * patch,
                resize_px=round(seen.resize_px * larger / patch) * patch,
                whole_px=round(seen.whole_px * larger / patch) * patch,
            ),
            optim=replace(short.optim, lr=short.optim.lr * lr_share, freeze_backbone_steps=0),
            expected={},
        )

    @staticmethod
    def from_json(values: Any) -> "Recipe":
        """The recipe whose `to_json` this is. Raises InputError for anything else."""
        if not isinstance(values, dict):
            raise InputError("this run's recipe.json holds no recipe; train the run anew")
        try:
            return _decoded(Recipe, values)
        except TypeError as error:
            raise InputError(f"this run's recipe is not of this version ({error}); train the run anew") from error


def _decoded(kind: Any, value: Any) -> Any:
    """`value` as `kind`: objects become the smallest dataclass that has their fields, lists tuples.

    Fields that an older version did not know take their defaults, which are what it did.
    """
    options = [
        option for option in get_args(kind) or (kind,) if isinstance(option, type) and dataclasses.is_dataclass(option)
    ]
    if not options or value is None:
        return tuple(value) if isinstance(value, list) else value
    fitting = [
        option for option in options if isinstance(value, dict) and get_type_hints(option).keys() >= value.keys()
    ]
    if fitting and value:
        option = min(fitting, key=lambda option: len(get_type_hints(option)))
        hints = get_type_hints(option)
        return option(**{name: _decoded(hints[name], inner) for name, inner in value.items()})
    raise TypeError(f"{' or '.join(option.__name__ for option in options)} has other fields")
