"""How segmentation is measured: the settings, and those of the published protocols."""

from dataclasses import dataclass
from typing import Any, Literal

from data.errors import InputError
from data.preprocess import check_view_px
from evaluators.presets import check_words, settled_by
from evaluators.segmentation_probe import TrainSpec
from evaluators.splits import FOLDS

Layers = Literal["last", "last4"]
Seen = Literal["whole", "crops"]
Preset = Literal["dino", "dinov2", "dinov2-ms"]


LINEAR: dict[str, Any] = {"lr": (1e-3,), "steps": 40_000, "seen": "crops"}
PRESETS: dict[str, dict[str, Any]] = {
    "dino": {**LINEAR, "size": 512},
    "dinov2": {**LINEAR, "size": 518},
    "dinov2-ms": {
        "lr": (1e-3,),
        "steps": 40_000,
        "seen": "crops",
        "size": 644,
        "enlarge": (1.0, 3.0),
        "stride": 0.5,
        "layers": "last4",
        "scales": (1.0, 1.32, 1.73),
        "mirror": True,
    },
}
"""As the published heads on ADE20K: crops and windows of 512 px (a window every 341) and 640 px (every 320), here in whole patches of
14 px (DINO's networks, which DINOv2's authors measured the same way, need no rounding); three of the five published scales. How much the
first head's images are enlarged is not published; DINOv3's range is taken."""


@settled_by(PRESETS)
@dataclass(frozen=True, kw_only=True)
class SegmentationSpec:
    """The segmentation protocol."""

    preset: Preset | None = None
    """dinov2: crops and a sliding window of 518 px, one layer, 40,000 steps; dino: of 512 px, as DINOv2's authors measured DINO;
    dinov2-ms: of 644 px, four layers, three scales and a mirror. Settings given beside it win."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates tried (AdamW, warm-up, then a straight fall to 0)."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    steps: int = 600
    """Training steps."""
    batch: int = 16
    """Images a step."""
    held_out: int = 1
    """How many fifths of the training images are held out in turn to choose the learning rate (1 to 5)."""
    layers: Layers = "last"
    """What the head reads: the last layer, or the last four side by side (a checkpoint on torch only)."""
    seen: Seen = "whole"
    """whole: images are squashed to a square, for training and test. crops, as published: the head learns from random crops of enlarged
    images, mirrored and recoloured at random, and is tested by a window that slides over the image."""
    size: int | None = None
    """Side in pixels of that square, or of the crops and the window, to the nearest whole patches; None: the manifest's whole view."""
    crops: int = 4
    """Random crops of each training image. They are extracted once, and take crops x patches x width x 4 bytes an image in the cache."""
    enlarge: tuple[float, float] = (0.5, 2.0)
    """Of crops: least and most that the short side of a training image becomes, in multiples of the crop's side."""
    stride: float = 341 / 512
    """Of the window, in multiples of its side."""
    scales: tuple[float, ...] = (1.0,)
    """Multiples of that size at which test images are seen (the square; or the short side, where a window slides); class probabilities
    are averaged."""
    mirror: bool = False
    """Whether test images are seen in a mirror as well."""

    def __post_init__(self) -> None:
        check_words(self)
        if not self.lr or not all(0 < lr < 1e6 for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.steps < 1 or self.batch < 1 or not 0 <= self.weight_decay < 1e6:
            raise InputError("--steps and --batch: wanted at least 1 each; --weight-decay: at least 0")
        if not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training images")
        if not self.scales or not all(0.1 <= scale <= 8 for scale in self.scales):
            raise InputError(f"--scales {' '.join(map(str, self.scales)) or '(empty)'}: wanted multiples from 0.1 to 8")
        if self.crops < 1 or not 0.1 <= self.enlarge[0] <= self.enlarge[1] <= 8 or not 0.05 <= self.stride <= 1:
            raise InputError(
                f"--crops {self.crops} --enlarge {self.enlarge[0]:g} {self.enlarge[1]:g} --stride {self.stride:g}: wanted at least 1 "
                "crop, rising multiples from 0.1 to 8, and 0.05 to 1 of the window"
            )
        if self.size is not None:
            check_view_px(self.size, "--size")

    def training(self, lr: float, seed: int) -> TrainSpec:
        """One training with this learning rate."""
        return TrainSpec(lr=lr, weight_decay=self.weight_decay, steps=self.steps, batch=self.batch, seed=seed)

    def in_words(self) -> str:
        """The protocol for a result file."""
        scales = f"scales {' '.join(f'{scale:g}' for scale in self.scales)}" + (" and mirrored" if self.mirror else "")
        read = "the last layer" if self.layers == "last" else "the last four layers"
        if self.seen == "whole":
            views, tested = "whole views", f"tested at {scales}"
        else:
            views = (
                f"{self.crops} random crops of each image, enlarged {self.enlarge[0]:g} to {self.enlarge[1]:g} times"
            )
            tested = f"tested by a window sliding by {self.stride:.3g} of its side, at {scales}"
        return (
            f"batch norm and a linear layer on patches of {read} of {views}, cross-entropy, AdamW, {self.steps} steps of "
            f"{self.batch}; {tested}, scored at the mask's size"
        )
