"""How depth is measured: the settings, those of published protocols, and what each kind of head reads."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from backbones.heads import DepthDecoder, DepthHeadSpec
from data.errors import InputError
from data.preprocess import check_view_px
from evaluators.depth_probe import TrainSpec
from evaluators.presets import check_words, settled_by, was_given
from evaluators.splits import FOLDS

Head = Literal["linear1", "linear4", "dpt"]
Preset = Literal["dino", "dinov2", "dinov2-nyu", "dinov2-kitti"]
LINEAR_LR = (1e-3, 3e-3, 1e-2, 3e-2)
"""Tried for a linear head."""
DPT_LR = (1e-4, 5e-4)
"""Tried for the DPT head, whose convolutions want smaller steps than a linear layer."""
PUBLISHED: dict[str, Any] = {"lr": (1e-4,), "steps": 38_400, "mirror": True}
PRESETS: dict[str, dict[str, Any]] = {
    "dino": PUBLISHED,
    "dinov2": PUBLISHED,
    "dinov2-nyu": {**PUBLISHED, "max_depth": 10.0},
    "dinov2-kitti": {**PUBLISHED, "max_depth": 80.0},
}
"""Learning rate, steps, batch, range and mirrored test of the published heads (ViT-S/14, RMSE with linear1, linear4, dpt: NYUd 0.449
0.417 0.356, KITTI 3.10 2.86 2.34); DINO was measured the same way by
DINOv2's authors; images are squashed to squares here and not rotated or recoloured in training."""


@settled_by(PRESETS, lambda given: {"lr": DPT_LR} if given.get("head") == "dpt" else {})
@dataclass(frozen=True, kw_only=True)
class DepthSpec:
    """The depth protocol."""

    preset: Preset | None = None
    """dinov2: learning rate, steps and mirrored test of the published heads (choose one with --head), the range following from
    the set; dino: the same, by which DINOv2's authors measured DINO; dinov2-nyu and dinov2-kitti: with the range of that set, on
    any. Settings given beside it win."""
    head: Head = "linear1"
    """linear1: the last layer; linear4: four layers; dpt: four layers through convolutions (both on torch only)."""
    lr: tuple[float, ...] = LINEAR_LR
    """Learning rates tried (AdamW, one cosine); left out, dpt tries 0.0001 and 0.0005."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    steps: int = 1000
    """Training steps."""
    batch: int = 16
    """Images a step."""
    held_out: int = 1
    """How many fifths of the training scenes are held out in turn to choose the learning rate (1 to 5)."""
    max_depth: float = 10.0
    """Far end of the head's range in metres (10: indoors; 80: streets); measurements beyond it do not count. Left out, and
    not set by a preset: 80 on KITTI."""
    size: int | None = None
    """Side in pixels that images are squashed to, to the nearest whole patches; None: the manifest's whole view."""
    mirror: bool = False
    """Whether test images are seen in a mirror as well; the two maps are averaged."""
    align: bool = False
    """Whether each predicted map is brought to the measured one by a scale and a shift (least squares) before it is scored. Left out:
    only where the set's values are no distances."""
    dpt_channels: int = 256
    """Width of the DPT head's maps."""

    def __post_init__(self) -> None:
        check_words(self)
        if not self.lr or not all(0 < lr < math.inf for lr in self.lr):
            raise InputError(f"--lr {' '.join(map(str, self.lr)) or '(empty)'}: wanted learning rates above 0")
        if self.steps < 1 or self.batch < 1 or not 0 <= self.weight_decay < math.inf:
            raise InputError("--steps and --batch: wanted at least 1 each; --weight-decay: at least 0")
        if not 1 <= self.held_out <= FOLDS:
            raise InputError(f"--held-out {self.held_out}: wanted 1 to {FOLDS} fifths of the training scenes")
        if not 0.1 <= self.max_depth < math.inf:
            raise InputError(f"--max-depth {self.max_depth}: wanted at least 0.1 metres")
        if self.size is not None:
            check_view_px(self.size, "--size")

    def head_spec(self, width_in: int, layers: tuple[int, ...] = (), unit: str = "metre") -> DepthHeadSpec:
        """The head for `width_in` features (patches and CLS of all `layers`)."""
        decoder: DepthDecoder = "dpt" if self.head == "dpt" else "linear"
        return DepthHeadSpec(
            width_in=width_in,
            max_depth=self.max_depth,
            layers=layers,
            decoder=decoder,
            channels=self.dpt_channels,
            unit=unit,
        )

    def training(self, lr: float, seed: int) -> TrainSpec:
        """One training with this learning rate."""
        return TrainSpec(lr=lr, weight_decay=self.weight_decay, steps=self.steps, batch=self.batch, seed=seed)

    def in_words(self, bins: int, unit: str) -> str:
        """The protocol for a result file."""
        read = {
            "linear1": "linear probe on last-layer patches with CLS of whole views",
            "linear4": "linear probe on patches with CLS of four layers of whole views",
            "dpt": "DPT decoder on patches with CLS of four layers of whole views",
        }[self.head]
        into = (
            f"range to {self.max_depth:g} {unit}"
            if self.head == "dpt"
            else f"{bins} uniform bins to {self.max_depth:g} {unit}"
        )
        loss = "scale-invariant and gradient loss" if self.head == "dpt" else "scale-invariant loss"
        seen = ", plain and mirrored" * self.mirror + ", aligned by scale and shift" * self.align
        return f"{read}, {into}, {loss}, AdamW, {self.steps} steps of {self.batch} images{seen}"


def for_data(spec: DepthSpec, unit: str, max_depth: float | None) -> DepthSpec:
    """The settings for a set whose range is known (a benchmark's), or whose values are no distances and must be aligned.

    What was given stays, and so does a preset's range, where the set is in metres as well.
    """
    changes: dict[str, Any] = {}
    by_preset = unit == "metre" and spec.preset is not None and "max_depth" in PRESETS[spec.preset]
    if max_depth is not None and not (by_preset or was_given(spec, "max_depth")):
        changes["max_depth"] = max_depth
    if unit != "metre" and not was_given(spec, "align"):
        changes["align"] = True
    return replace(spec, **changes)
