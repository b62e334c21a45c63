"""Training on a GPU: first whether it is right, then what a step reaches and needs.

    .venv/bin/python -m benchmarks.training_gpu

A step in float32 must give the losses and gradient norms of the same step on the CPU, in bfloat16 and float16 about those, and so must
recomputed and compiled blocks and a batch in parts. Only then DINOv2 steps of ViT-S, B and L are timed in bfloat16, on random views, with
compiled blocks; for the MFU see training/speed.py. Prints a table for docs/performance.md. Exit status 3 where a check fails.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import tyro

from backbones.vit import ViTSpec
from data.errors import CheckFailed, InputError, run_cli
from training.distillation import Schedule
from training.methods import make_state, take_step_
from training.precision import Precision
from training.published import PUBLISHED, vit
from training.recipe import Recipe
from training.recipes import RECIPES
from training.scale import Scale, spread_
from training.speed import peak_flops, step_flops

AT = Schedule(lr=1e-5, weight_decay=0.04, momentum=0.996, teacher_temperature=0.04, freeze_last_layer=False)
WARMUP = 5
CHECKS: dict[str, tuple[Precision, Scale, float]] = {
    "float32": ("fp32", Scale(), 1e-3),
    "a batch in parts": ("fp32", Scale(accumulate=2), 1e-3),
    "recomputed blocks": ("fp32", Scale(checkpoint_blocks=True), 1e-3),
    "compiled blocks": ("fp32", Scale(compile_blocks=True), 1e-3),
    "bfloat16": ("bf16", Scale(), 3e-2),
    "float16": ("fp16", Scale(), 3e-2),
}
"""What must give the CPU's step, and how closely."""


def steps(recipe: Recipe, device: torch.device, scale: Scale) -> Iterator[dict[str, float]]:
    """Steps on the same random views, without end."""
    torch.manual_seed(0)
    state = make_state(recipe, torch.device("cpu"))
    for network in (state.student, state.teacher):
        network.to(device)
    on_device = make_state(recipe, device)
    on_device.student.load_state_dict(state.student.state_dict())
    on_device.teacher.load_state_dict(state.teacher.state_dict())
    spread_(on_device, recipe, scale)
    crops = recipe.crops
    views = [torch.randn(recipe.batch_size, 3, crops.view_px(i), crops.view_px(i)) for i in range(crops.n_views)]
    views = [view.to(device) for view in views]
    while True:
        yield take_step_(on_device, views, AT, recipe, np.random.default_rng(0), True, scale.accumulate)


def check(device: torch.device) -> None:
    """Raise CheckFailed where a step on the device is not the CPU's."""
    for name in ("smoke", "smoke_dinov2"):
        recipe = RECIPES[name]
        assert isinstance(recipe.backbone, ViTSpec)
        recipe = replace(recipe, backbone=replace(recipe.backbone, drop_path=0.0))
        wanted = next(steps(recipe, torch.device("cpu"), Scale()))
        for what, (precision, scale, close) in CHECKS.items():
            found = next(steps(replace(recipe, step=replace(recipe.step, precision=precision)), device, scale))
            for key in ("loss", *(key for key in wanted if key.startswith("grad_norm"))):
                if not abs(found[key] - wanted[key]) <= close * abs(wanted[key]):
                    raise CheckFailed(f"{name}, {what}: {key} is {found[key]}, on the CPU {wanted[key]}")
            print(f"{name}, {what}: as on the CPU")


def measure(size: str, batch: int, rounds: int, device: torch.device) -> None:
    """A line of the table."""
    base = PUBLISHED["dinov2_vitl14"]
    backbone = vit(size, 14, layer_scale=1e-5, mask_token=True, drop_path=0.3, drop_path_uniform=True)
    recipe = replace(base, backbone=backbone, batch_size=batch, step=replace(base.step, precision="bf16"))
    torch.cuda.reset_peak_memory_stats(device)
    going = steps(recipe, device, Scale(compile_blocks=True))
    for _ in range(WARMUP):
        next(going)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(rounds):
        next(going)
    torch.cuda.synchronize(device)
    took = (time.perf_counter() - began) / rounds
    mfu = step_flops(recipe) / took / peak_flops(device, torch.bfloat16)[0]
    memory = torch.cuda.max_memory_allocated(device) / 1e9
    print(f"| ViT-{size[0].upper()}/14 | {batch} | {batch / took:.0f} | {100 * mfu:.0f} % | {memory:.1f} |", flush=True)


def main(batch: tuple[int, int, int] = (128, 96, 48), rounds: int = 20) -> None:
    """Check, then measure ViT-S, B and L.

    Args:
        batch: Images a step of each.
        rounds: Steps that are timed.
    """
    if not torch.cuda.is_available():
        raise InputError("torch sees no GPU here; run `python -m benchmarks.training` for the CPU")
    device = torch.device("cuda")
    check(device)
    torch.set_float32_matmul_precision("high")  # the heads stay in float32: TF32, as a run on a GPU uses it
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, bfloat16, compiled blocks, {rounds} steps")
    print("| network | batch | images/s | MFU | peak GB |\n|---|---|---|---|---|")
    for size, n in zip(("small", "base", "large"), batch, strict=True):
        measure(size, n, rounds, device)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.training_gpu"))
