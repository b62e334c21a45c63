"""Published configurations as recipes.

The batch is that of all their devices together; `--batch-size` makes it smaller, and the learning rate follows.
"""

from dataclasses import replace
from typing import Any

from backbones.resnet import ResNetSpec
from backbones.vit import VIT_SIZES, ViTSpec
from data.crops import CropSpec
from training.dinov2 import Dinov2Spec
from training.distillation import StepSpec
from training.projection_head import HeadSpec
from training.recipe import OptimSpec, Recipe


def vit(size: str, patch_px: int, **fields: Any) -> ViTSpec:
    """A named size."""
    width, depth, heads = VIT_SIZES[size]
    return ViTSpec(patch_px=patch_px, width=width, depth=depth, heads=heads, **fields)


def scores(knn: float, linear: float) -> dict[str, float]:
    """k-NN and linear top-1 on ImageNet-1k."""
    return {"imagenet_knn_top1": knn, "imagenet_linear_top1": linear}


# DINOv1. Caron et al. 2021; defaults of the authors' script and the commands of their README.
_DINO_HEAD = HeadSpec(prototypes=65_536, freeze_magnitude=False)
_DINO_S16 = Recipe(
    backbone=vit("small", 16, drop_path=0.1),
    head=_DINO_HEAD,
    epochs=100,
    batch_size=512,
    source="defaults of the authors' script, without norm_last_layer; 8 devices of 64 images",
    expected=scores(69.3, 74.0),
)
_DINO_BOOST = OptimSpec(teacher_temperature=(0.04, 0.07), teacher_warmup_epochs=30)
_DINO_LONG_CROPS = CropSpec(n_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))
_DINO_BASE = Recipe(
    backbone=vit("base", 16, drop_path=0.1),
    head=HeadSpec(prototypes=65_536),
    crops=_DINO_LONG_CROPS,
    optim=OptimSpec(teacher_temperature=(0.04, 0.07), teacher_warmup_epochs=50, freeze_last_layer_epochs=3),
    step=StepSpec(clip_norm=0.3),
    epochs=400,
    batch_size=1024,
    source="settings reported for the released weights, not checked against their argument files",
    expected=scores(76.1, 78.2),
)
# DINOv2. Oquab et al. 2023, tables 16 and 17, and the authors' configuration files. They count 1250 steps as an epoch.
_V2_CROPS = CropSpec(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur_as="released")
_V2_L16_SHORT = Recipe(
    backbone=vit("large", 16, layer_scale=1e-5, mask_token=True, drop_path=0.3, drop_path_uniform=True),
    crops=_V2_CROPS,
    head=HeadSpec(prototypes=65_536, freeze_magnitude=False),
    optim=OptimSpec(
        lr=4e-3,
        lr_batch=1024,
        lr_rule="sqrt",
        momentum=(0.992, 1.0),
        teacher_temperature=(0.04, 0.07),
        teacher_warmup_epochs=30,
        layer_decay=0.9,
        patch_embed_lr=0.2,
    ),
    step=Dinov2Spec(),
    epochs=100,
    epoch_steps=1250,
    batch_size=2048,
    source="ssl_default_config.yaml and vitl16_short.yaml, on ImageNet-1k",
    expected=scores(81.6, 82.9),
)
_V2_LONG = {"ffn": "swiglu", "layer_scale": 1e-5, "mask_token": True, "drop_path": 0.4, "drop_path_uniform": True}
_V2_L14 = Recipe(
    backbone=vit("large", 14, **_V2_LONG),
    crops=replace(_V2_CROPS, local_px=98),
    head=HeadSpec(prototypes=131_072, bottleneck=384, freeze_magnitude=False),
    optim=OptimSpec(
        lr=2e-4,
        lr_batch=1024,
        lr_rule="sqrt",
        warmup_epochs=80,
        weight_decay=(0.04, 0.2),
        momentum=(0.994, 1.0),
        teacher_temperature=(0.04, 0.07),
        teacher_warmup_epochs=30,
        patch_embed_lr=0.2,
    ),
    step=Dinov2Spec(ibot_head=HeadSpec(prototypes=131_072, bottleneck=256, freeze_magnitude=False), targets="sinkhorn"),
    epochs=500,
    epoch_steps=1250,
    batch_size=3072,
    source="vitl14.yaml, on ImageNet-22k",
    expected=scores(82.0, 84.5),
)
_V2_G14 = replace(
    _V2_L14,
    backbone=vit("giant2", 14, **_V2_LONG),
    source="vitg14.yaml; the scores are those on LVD-142M",
    expected=scores(83.5, 86.5),
)


def distilled(size: str, knn: float, linear: float) -> Recipe:
    """DINOv2's small models: the loop of the giant, learning from it; name it with `--teacher`."""
    return replace(
        _V2_G14,
        backbone=vit(size, 14, layer_scale=1e-5, mask_token=True),
        optim=replace(_V2_L14.optim, lr=1e-3),
        batch_size=2048,
        source="Oquab et al. 2023, tables 16 and 17, on LVD-142M; heads as in vitg14.yaml, since theirs were not released",
        expected=scores(knn, linear),
    )


PUBLISHED: dict[str, Recipe] = {
    "dino_vits16": _DINO_S16,
    "dino_vits16_300": replace(
        _DINO_S16,
        optim=_DINO_BOOST,
        epochs=300,
        batch_size=1024,
        source="the authors' README, longer and warmer; 16 devices of 64 images",
        expected=scores(73.3, 76.0),
    ),
    "dino_vits8": replace(
        _DINO_S16,
        backbone=vit("small", 8, drop_path=0.1),
        crops=_DINO_LONG_CROPS,
        optim=_DINO_BOOST,
        epochs=800,
        batch_size=1024,
        source="settings reported for the released weights, not checked against their argument files",
        expected=scores(78.3, 79.7),
    ),
    "dino_vitb16": _DINO_BASE,
    "dino_vitb8": replace(
        _DINO_BASE,
        backbone=vit("base", 8, drop_path=0.1),
        step=StepSpec(clip_norm=3.0),
        epochs=300,
        expected=scores(77.4, 80.1),
    ),
    "dino_resnet50": Recipe(
        backbone=ResNetSpec(),
        crops=CropSpec(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        head=HeadSpec(prototypes=65_536),
        optim=OptimSpec(optimizer="sgd", lr=0.03, weight_decay=(1e-4, 1e-4)),
        epochs=100,
        batch_size=512,
        source="the authors' README; the released weights (k-NN 67.5, linear 75.3) were trained longer, with other settings",
    ),
    "dinov2_vitl16_short": _V2_L16_SHORT,
    "dinov2_vitl14": _V2_L14,
    "dinov2_vitl14_reg4": replace(
        _V2_L14,
        backbone=vit("large", 14, registers=4, **_V2_LONG),
        source="vitl14.yaml with four registers (Darcet et al. 2023)",
        expected={},
    ),
    # Begins with another run's weights: name it with --init. The paper's phase has 10,000 steps; its code was never released.
    "dinov2_vitl14_518": replace(
        _V2_L14.at_high_resolution(518, 8), source="Oquab et al. 2023, section 4; learning rate as in Franca's"
    ),
    "dinov2_vits14_distilled": distilled("small", 79.0, 81.1),
    "dinov2_vitb14_distilled": distilled("base", 82.1, 84.5),
    "dinov2_vitl14_distilled": distilled("large", 83.5, 86.3),
    "dinov2_vitg14": _V2_G14,
    "dinov2_vitg14_reg4": replace(
        _V2_G14,
        backbone=vit("giant2", 14, registers=4, **_V2_LONG),
        source="vitg14.yaml with four registers (Darcet et al. 2023); the scores are those on LVD-142M",
        expected=scores(83.7, 87.1),
    ),
}
