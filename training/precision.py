"""In which numbers a backbone multiplies. Heads, losses and targets stay in float32, as do weights, gradients and optimiser."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def narrow_products(device: torch.device, precision: Precision) -> torch.autocast:
    """A context in which matrix products and attention are computed in `precision`; float32 leaves everything as it is."""
    return torch.autocast(device.type, NARROW.get(precision, torch.bfloat16), enabled=precision in NARROW)


def slow_here(device: torch.device, precision: Precision) -> str | None:
    """What to say to whoever trains in a precision that this processor has no instructions for; None where all is well.

    Without AVX-512 bfloat16 or AMX a bfloat16 product runs at about a fiftieth of a float32 one.
    """
    if device.type != "cpu" or precision != "bf16" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "this processor has no bfloat16 instructions, so the recipe's bf16 is many times slower than float32; use --precision fp32"


def make_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """For float16 what keeps small gradients from vanishing: the loss times a factor that is halved when gradients overflow."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
