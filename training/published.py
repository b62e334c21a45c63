"""Published configurations as recipes.

The batch is that of all their devices together; `--batch-size` makes it smaller, and the learning rate follows. Where the released code
differs from its paper the recipes do as the code did, since their scores come from it: `blur_as`, `koleo_as`. What no source states, or
only a recollection, is said in `source`. docs/recipes.md lists them all.
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
_RECALLED = "settings reported for the released weights, not checked against their argument files"
_DINO_S16 = Recipe(
    backbone=vit("small", 16, drop_path=0.1),
    head=HeadSpec(prototypes=65_536),
    epochs=100,
    batch_size=512,
    source="defaults of the authors' script; 8 devices of 64 images",
    expected=scores(69.3, 74.0),
)
# Warmer targets and free prototype norms (no norm_last_layer); "boosting" in the authors' README.
_DINO_BOOST = OptimSpec(teacher_temperature=(0.04, 0.07), teacher_warmup_epochs=30)
_DINO_BOOST_HEAD = HeadSpec(prototypes=65_536, freeze_magnitude=False)
_DINO_LONG_CROPS = CropSpec(n_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))
_DINO_BASE = Recipe(
    backbone=vit("base", 16, drop_path=0.1),
    head=HeadSpec(prototypes=65_536),
    crops=_DINO_LONG_CROPS,
    optim=OptimSpec(teacher_temperature=(0.04, 0.07), teacher_warmup_epochs=50, freeze_last_layer_epochs=3),
    step=StepSpec(clip_norm=0.3),
    epochs=400,
    batch_size=1024,
    source=_RECALLED,
    expected=scores(76.1, 78.2),
)
# DINOv2. Oquab et al. 2023, tables 16 and 17, and the authors' configuration files. They count 1250 steps as an epoch.
_V2_CROPS = CropSpec(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur_as="released", blur_kernel="nine")
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
    source="vitg14.yaml; the scores are those on LVD-142M, after the phase at 518",
    expected=scores(83.5, 86.5),
)
_REGISTERS = {"registers": 4, "pos_antialias": True, "pos_offset": 0.0}
"""Darcet et al. 2023; the released networks with registers also resample their position encodings another way."""


def from_scratch(size: str) -> Recipe:
    """The small networks of DINOv2 without a teacher: published ones were distilled, so no score is known.

    The short run's method (tied heads, centring) and the long runs' patch; plain MLPs as in the released weights; less stochastic depth,
    as the authors advise where a loss diverges.
    """
    return replace(
        _V2_L16_SHORT,
        backbone=vit(size, 14, layer_scale=1e-5, mask_token=True, drop_path=0.1, drop_path_uniform=True),
        crops=replace(_V2_CROPS, local_px=98),
        source="vitl16_short.yaml with the published small backbone; no run of it was published",
        expected={},
    )


def distilled(size: str, knn: float, linear: float, **registers: Any) -> Recipe:
    """DINOv2's small models: the loop of the giant, learning from it; name it with `--teacher`. No masks, no stochastic depth.

    Table 17 prints 18 blocks for ViT-B; code and weights have 12.
    """
    return replace(
        _V2_G14,
        backbone=vit(size, 14, layer_scale=1e-5, mask_token=True, **registers),
        optim=replace(_V2_L14.optim, lr=1e-3, lr_batch=2048),  # the paper prints the rate of this batch
        batch_size=2048,
        needs="teacher",
        source="Oquab et al. 2023, tables 16 and 17, on LVD-142M; heads as in vitg14.yaml, since theirs were not released",
        expected=scores(knn, linear),
    )


def enlarged(recipe: Recipe, px: int, expected: dict[str, float] | None = None) -> Recipe:
    """The high-resolution phase: 10,000 steps (8 epochs of 1250); it begins with a run's weights, named with `--init`."""
    source = f"Oquab et al. 2023, section 4, after: {recipe.source}; learning rate as in Franca's, since the paper's is not stated"
    return replace(recipe.at_high_resolution(px, 8), source=source, expected=expected or {}, needs="weights")


PUBLISHED: dict[str, Recipe] = {
    "dino_vits16": _DINO_S16,
    "dino_vits16_300": replace(
        _DINO_S16,
        head=_DINO_BOOST_HEAD,
        optim=_DINO_BOOST,
        epochs=300,
        batch_size=1024,
        source="the authors' README, longer and warmer; 16 devices of 64 images",
        expected=scores(73.3, 76.0),
    ),
    "dino_vits16_800": replace(
        _DINO_S16,
        head=_DINO_BOOST_HEAD,
        crops=_DINO_LONG_CROPS,
        optim=_DINO_BOOST,
        epochs=800,
        batch_size=1024,
        source=_RECALLED,
        expected=scores(74.5, 77.0),
    ),
    "dino_vits8": replace(
        _DINO_S16,
        backbone=vit("small", 8, drop_path=0.1),
        head=_DINO_BOOST_HEAD,
        crops=_DINO_LONG_CROPS,
        optim=_DINO_BOOST,
        epochs=800,
        batch_size=1024,
        source=_RECALLED,
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
        source="the authors' README, whose score is not stated; the released weights (k-NN 67.5, linear 75.3) took batches of 4080, "
        "another optimiser and another decay",
    ),
    "dinov2_vitl16_short": _V2_L16_SHORT,
    "dinov2_vitl16_short_416": enlarged(_V2_L16_SHORT, 416),
    "dinov2_vits14": from_scratch("small"),
    "dinov2_vitb14": from_scratch("base"),
    "dinov2_vitl14": _V2_L14,
    "dinov2_vitg14": _V2_G14,
    "dinov2_vitl14_reg4": replace(
        _V2_L14,
        backbone=vit("large", 14, **_V2_LONG, **_REGISTERS),
        source="vitl14.yaml with four registers (Darcet et al. 2023); no score on ImageNet-22k was published",
        expected={},
    ),
    "dinov2_vitg14_reg4": replace(
        _V2_G14,
        backbone=vit("giant2", 14, **_V2_LONG, **_REGISTERS),
        source="vitg14.yaml with four registers (Darcet et al. 2023); the scores are those on LVD-142M, after the phase at 518",
        expected=scores(83.7, 87.1),
    ),
    "dinov2_vitl14_518": enlarged(_V2_L14, 518),
    "dinov2_vitg14_518": enlarged(_V2_G14, 518, _V2_G14.expected),
    "dinov2_vits14_distilled": distilled("small", 79.0, 81.1),
    "dinov2_vitb14_distilled": distilled("base", 82.1, 84.5),
    "dinov2_vitl14_distilled": distilled("large", 83.5, 86.3),
    "dinov2_vits14_reg4_distilled": distilled("small", 79.1, 80.9, **_REGISTERS),
    "dinov2_vitb14_reg4_distilled": distilled("base", 82.0, 84.6, **_REGISTERS),
    "dinov2_vitl14_reg4_distilled": distilled("large", 83.8, 86.7, **_REGISTERS),
}
