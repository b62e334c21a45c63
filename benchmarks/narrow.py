"""What training in bfloat16 costs on a CPU: attention and patches beside torch's own, and whole steps beside float32.

    .venv/bin/python -m benchmarks.narrow

Needs a processor with bfloat16 instructions (AVX-512 or AMX), else every figure is of an emulation. Forward and backward pass together,
each pair in turns; medians.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from backbones.attention import attend
from backbones.vit import ViT, ViTSpec
from benchmarks.training import RECIPES as PUBLISHED
from data.errors import run_cli
from training.distillation import Schedule
from training.memory import keep_freed_memory
from training.methods import make_state, take_step_
from training.precision import Precision, slow_here
from training.recipe import Recipe
from training.recipes import RECIPES

CPU = torch.device("cpu")
CROPS = ((16, 6, 257), (64, 6, 50), (64, 3, 145), (64, 3, 37), (192, 3, 10))
"""Crops of a step, heads, and tokens: DINOv2 ViT-S/14 with 8 images, and the small recipes with 32."""
STEPS: dict[str, tuple[Recipe, int]] = {
    "DINOv2, ViT-S/14": (PUBLISHED["dinov2"], 8),
    "dino_tiny_small_data": (RECIPES["dino_tiny_small_data"], 32),
    "dinov2_tiny_small_data": (RECIPES["dinov2_tiny_small_data"], 32),
}


def seconds_of(work: Callable[[], None]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(rounds: int, *works: Callable[[], None]) -> list[float]:
    """Median seconds of each, after two uncounted calls."""
    found = [[seconds_of(work) for work in works] for _ in range(rounds + 2)][2:]
    return [statistics.median(column) for column in zip(*found, strict=True)]


def attention_work(
    mix: Callable[[Tensor, Tensor, Tensor, float], Tensor], crops: int, heads: int, tokens: int
) -> Callable[[], None]:
    """Attention and its gradients on views of one tensor, as a block makes them."""
    qkv = torch.randn(crops, tokens, 3, heads, 64).bfloat16().requires_grad_()

    def work() -> None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = mix(q, k, v, 64**-0.5)
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    return work


def torchs_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def patches_work(as_convolution: bool, crops: int, px: int) -> Callable[[], None]:
    """Patches of 16 px and the gradients of their weights."""
    embed = ViT(ViTSpec(patch_px=16, width=384, depth=1, heads=6)).patch_embed
    pixels = torch.randn(crops, 3, px, px)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = embed.proj(pixels) if as_convolution else embed(pixels)
        torch.autograd.grad(out, list(embed.parameters()), torch.ones_like(out))

    return work


def step_work(recipe: Recipe, batch: int, precision: Precision) -> Callable[[], None]:
    """A training step on random views."""
    recipe = replace(recipe, batch_size=batch, step=replace(recipe.step, precision=precision))
    torch.manual_seed(0)
    state, crops = make_state(recipe, CPU), recipe.crops
    views = [torch.randn(batch, 3, crops.view_px(i), crops.view_px(i)) for i in range(crops.n_views)]
    at = Schedule(lr=1e-5, weight_decay=0.04, momentum=0.996, teacher_temperature=0.04, freeze_last_layer=False)

    def work() -> None:
        take_step_(state, views, at, recipe, np.random.default_rng(0), watch=False)

    return work


def main(rounds: int = 5, threads: int | None = None) -> None:
    """Print each as a ratio.

    Args:
        rounds: Timed turns.
        threads: Threads of torch; all cores if not given.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    if said := slow_here(CPU, "bf16"):
        print(said)
    print(f"{torch.get_num_threads()} threads, medians of {rounds} turns, forward and back")
    for crops, heads, tokens in CROPS:
        theirs, ours = in_turns(rounds, *(attention_work(mix, crops, heads, tokens) for mix in (torchs_own, attend)))
        print(
            f"attention, {crops} crops of {tokens} tokens: {ours * 1e3:.1f} ms, torch's own {theirs / ours:.1f} times that",
            flush=True,
        )
    for crops, px in ((16, 224), (64, 96)):
        theirs, ours = in_turns(rounds, *(patches_work(convolution, crops, px) for convolution in (True, False)))
        print(
            f"patches of {crops} crops of {px} px: {ours * 1e3:.1f} ms, a convolution {theirs / ours:.1f} times that",
            flush=True,
        )
    for name, (recipe, batch) in STEPS.items():
        wide, narrow = in_turns(rounds, *(step_work(recipe, batch, precision) for precision in ("fp32", "bf16")))
        print(
            f"{name}: {batch / narrow:.1f} images/s in bfloat16, {wide / narrow:.2f} times those in float32", flush=True
        )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.narrow"))
