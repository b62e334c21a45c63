"""How fast a run goes and what that is of the machine: images a second, waiting for data, MFU, peak memory.

MFU is the model FLOPs of a step over its time and the peak FLOP/s of the devices (Chowdhery et al. 2022, appendix B). Model FLOPs are the
matrix products and attention that the method asks for, two for each multiply-add; recomputed ones do not count, and neither do those of
the last block for tokens that no loss reads.
"""

import re
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.resnet import ResNet, ResNetSpec
from backbones.vit import SUBSET_ABOVE, Block, ViT, ViTSpec
from training.dinov2 import Dinov2Spec
from training.feature_distillation import FeatureSpec
from training.precision import NARROW
from training.projection_head import HeadSpec, ProjectionHead
from training.recipe import Recipe

PEAK_TFLOP_PER_S = {
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60),
    "GH200": (989, 494, 67),
    "H100": (989, 494, 67),
    "H200": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "V100": (125, 15.7, 15.7),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "A10G": (70, 35, 31.2),
    "A10": (125, 62.5, 31.2),
    "T4": (65, 8.1, 8.1),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}
"""Dense peaks by words of the device's name, the more specific names first: 16-bit floats, TF32, float32. From NVIDIA's data sheets."""
PRODUCT = 1024
"""Side of the matrices whose product measures a device that is not in the table."""
MEASURED = "measured product"


def step_flops(recipe: Recipe, guide: Any = None, as_published: bool = False) -> float:
    """Model FLOPs of one step on the whole batch: teacher forward, student forward and backward, heads.

    The backward pass counts twice the forward. Stochastic depth that leaves samples out counts for less, masks as many patches as
    they have on average. `guide` is the frozen learner that stands in for the teacher, if any. `as_published` counts the last block of
    all tokens, as the published code computes it.
    """
    crops, spec = recipe.crops, recipe.step
    packed = isinstance(spec, Dinov2Spec)
    read: list[float | None] = [None] * crops.n_views
    masked = spec.masks.crops * sum(spec.masks.ratio) / 2 if isinstance(spec, Dinov2Spec) else 0.0
    if guide is not None:
        masked = 1.0
    if not as_published and not isinstance(spec, FeatureSpec):
        read = [masked if packed and i < 2 else 0.0 for i in range(crops.n_views)]
    student = sum(
        view_flops(recipe.backbone, crops.view_px(i), packed=packed, drops=True, read=read[i])
        for i in range(crops.n_views)
    )
    teaching: ViTSpec | ResNetSpec | None = recipe.backbone
    if guide is not None:
        # A teacher on an engine of its own is not counted.
        teaching = guide.backbone.spec if isinstance(guide.backbone, ViT | ResNet) else None
    image = 3 * student + (2 * view_flops(teaching, crops.global_px, read=read[0]) if teaching else 0.0)
    if isinstance(spec, FeatureSpec):
        return image * recipe.batch_size
    # A guide's head is counted as the student's: they have as many prototypes, and the prototypes are most of a head.
    image += (3 * crops.n_views + 2) * head_flops(recipe.backbone, recipe.head)
    if isinstance(spec, Dinov2Spec) and isinstance(recipe.backbone, ViTSpec):
        n_patches = (crops.global_px // recipe.backbone.patch_px) ** 2
        image += 2 * masked * n_patches * 4 * head_flops(recipe.backbone, spec.ibot_head or recipe.head)
    return image * recipe.batch_size


def view_flops(
    spec: ViTSpec | ResNetSpec, px: int, *, packed: bool = False, drops: bool = False, read: float | None = None
) -> float:
    """Forward FLOPs of one square view. With `drops` the samples that stochastic depth leaves out cost nothing, where they are left out.

    `read` is the share of patches that are read beside CLS, for which the last block is computed; None: all tokens are. For CLS alone (0)
    its queries are that one.
    """
    if isinstance(spec, ResNetSpec):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ResNet(spec).eval()(torch.empty(1, 3, px, px))
        return float(counter.get_total_flops())
    with torch.device("meta"):
        vit = ViT(spec)
    n_patches = (px // spec.patch_px) ** 2
    tokens = n_patches + 1 + spec.registers
    flops = 2.0 * n_patches * sum(p.numel() for p in vit.patch_embed.parameters() if p.ndim > 1)
    for i, block in enumerate(vit.blocks):
        assert isinstance(block, Block)
        kept = 1 - block.drop_path if drops and (packed or block.drop_path > SUBSET_ABOVE) else 1.0
        linears = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
        asking, ending = float(tokens), float(tokens)  # tokens with a query, and tokens that end the block
        if read is not None and i == spec.depth - 1:
            asking, ending = (1.0 if read == 0 else tokens), 1 + read * n_patches
        keys = 2 * spec.width**2
        rest = linears - 3 * spec.width**2
        flops += (
            kept * 2.0 * (tokens * keys + asking * spec.width**2 + ending * rest + 2 * asking * tokens * spec.width)
        )
    return flops


def head_flops(backbone: ViTSpec | ResNetSpec, spec: HeadSpec) -> float:
    """Forward FLOPs of the projection head for one row."""
    with torch.device("meta"):
        width = backbone.width if isinstance(backbone, ViTSpec) else ResNet(backbone).embed_dim
        return 2.0 * sum(p.numel() for p in ProjectionHead(width, spec).parameters() if p.shape[-1] > 1 and p.ndim > 1)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that the device can reach at most in this type, and where the figure is from: a table, or a product measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        column = 0 if dtype.itemsize == 2 else 1 if torch.backends.cuda.matmul.allow_tf32 else 2
        for part, rates in PEAK_TFLOP_PER_S.items():
            if re.search(rf"\b{part}\b", name):  # whole words: an L4 is not an L40
                return rates[column] * 1e12, f"data sheet of {part}"
    return product_rate(device, dtype), MEASURED


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the best of a few square products, measured for about `seconds`."""
    a = torch.ones(PRODUCT, PRODUCT, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * PRODUCT**3 / best


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 1e9 bytes: of the GPU by torch, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass
class Speed:
    """What the numbers of a step's time are taken over."""

    device: torch.device
    batch_size: int
    flops: float
    """Of a step, all processes together."""
    peak: float
    """FLOP/s, all processes together."""
    peak_from: str

    def describe(self) -> dict[str, Any]:
        """For the head of the log: what MFU is taken over."""
        return {"model_flops_per_step": self.flops, "peak_flops_per_s": self.peak, "peak_from": self.peak_from}

    def of_step(self, took_s: float, waited_s: float) -> dict[str, float]:
        """For the log: a step that took so long, of which so much was waiting for views.

        A product that was measured while other programs had the machine is no peak: a step that is faster shows that, and takes its place.
        """
        if self.peak_from == MEASURED:
            self.peak = max(self.peak, self.flops / took_s)
        return {
            "images_per_s": round(self.batch_size / took_s, 2),
            "data_wait": round(waited_s / took_s, 4),
            "mfu": round(self.flops / (took_s * self.peak), 4),
            "peak_memory_gb": round(peak_memory_gb(self.device), 3),
        }


def measure_speed(recipe: Recipe, device: torch.device, processes: int, guide: Any = None) -> Speed:
    """Get ready to tell the speed of a run; measures a product for a moment where the device's peak is not known."""
    dtype = NARROW.get(recipe.step.precision, torch.float32)
    peak, peak_from = peak_flops(device, dtype)
    return Speed(device, recipe.batch_size, step_flops(recipe, guide), peak * processes, peak_from)
