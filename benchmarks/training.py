"""What a training step reaches of the machine: its FLOP/s beside those of a bare matrix product in the same run, and its peak memory.

    .venv/bin/python -m benchmarks.training

Beside them stands lightly-train's DINOv2 step, if `make bench-training-peer` has made its environment. Each runs in a process of its
own, so that its peak memory is its own. FLOPs are those of `training.speed.step_flops` (teacher, student forward and backward, heads:
matrix products, patch convolutions and attention); the rest of the step counts as time only. They are counted twice: as the published code
computes the step, and without what is left out here because no loss reads it. Views are random: what is measured is the
step, not the decoding. A second of products comes before and after each step, and the step is set against the mean of the two, because a
machine shared with others does not run at one speed; medians over steps are printed. The monitors of collapse, which in a run look at
every tenth step, are left out.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

from data.errors import InputError, run_cli
from training.dinov2 import Dinov2Spec
from training.distillation import Schedule
from training.memory import keep_freed_memory
from training.methods import make_state, take_step_
from training.published import PUBLISHED, vit
from training.recipe import Recipe
from training.speed import step_flops

PEERS = Path(__file__).parent / "peers"
PEER_PYTHON = PEERS / ".venv" / "bin" / "python"
PRODUCT = 2048
"""Side of the square matrices of the bare product."""
_V2 = PUBLISHED["dinov2_vitl14"]
RECIPES: dict[str, Recipe] = {
    "dino": PUBLISHED["dino_vits16"],
    "dinov2": replace(
        _V2,
        backbone=vit("small", 14, layer_scale=1e-5, mask_token=True, drop_path=0.3, drop_path_uniform=True),
        head=replace(_V2.head, prototypes=65_536, bottleneck=256),
        step=Dinov2Spec(),
    ),
}
"""ViT-S/16 by DINOv1 (2 x 224 + 8 x 96 px) and ViT-S/14 by DINOv2 (2 x 224 + 8 x 98 px), 65,536 prototypes each."""


def product_rate(seconds: float = 1.0) -> float:
    """FLOP/s of float32 matrix products, kept up for so long."""
    a, out = torch.randn(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, a, out=out)
        n += 1
    return n * 2 * PRODUCT**3 / (time.perf_counter() - began)


def measure(method: str, batch: int, rounds: int) -> dict[str, float]:
    """One method in this process: images a second, the share of the bare product's rate, and peak memory."""
    recipe = replace(RECIPES[method], batch_size=batch)
    torch.manual_seed(0)
    state = make_state(recipe, torch.device("cpu"))
    crops = recipe.crops
    views = [torch.randn(batch, 3, crops.view_px(i), crops.view_px(i)) for i in range(crops.n_views)]
    at = Schedule(lr=1e-5, weight_decay=0.04, momentum=0.996, teacher_temperature=0.04, freeze_last_layer=False)

    def step() -> float:
        began = time.perf_counter()
        take_step_(state, views, at, recipe, np.random.default_rng(0), watch=False)
        return time.perf_counter() - began

    # The first two take memory from the system, which later ones use again.
    step(), step()
    flops, published = step_flops(recipe), step_flops(recipe, as_published=True)
    shares, seconds, before = [], [], product_rate()
    for _ in range(rounds):
        seconds.append(step())
        after = product_rate()
        shares.append(flops / seconds[-1] / ((before + after) / 2))
        before = after
    return {
        "images_per_s": batch / statistics.median(seconds),
        "images_per_bare_tflop": batch * statistics.median(shares) / flops * 1e12,
        "share": statistics.median(shares),
        "gflop_per_image": flops / batch / 1e9,
        "published_share": statistics.median(shares) * published / flops,
        "published_gflop_per_image": published / batch / 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main(batch: int = 8, rounds: int = 5, threads: int | None = None, method: str | None = None) -> None:
    """Measure both methods, float32 on the CPU.

    Args:
        batch: Images a step.
        rounds: Steps that are timed.
        threads: Threads of torch; all cores if not given.
        method: Measure this one here and print JSON; for the processes that this command starts.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if method is not None:
        if method not in RECIPES:
            raise InputError(f"--method {method}: want one of {', '.join(RECIPES)}")
        keep_freed_memory()
        print(json.dumps(measure(method, batch, rounds)))
        return
    print(f"batch {batch}, float32, {torch.get_num_threads()} threads, median of {rounds} steps")
    print(f"{'':<32}{'FLOPs of the published step':>34}{'FLOPs computed':>34}")
    columns = f"{'an image':>12}{'share of matmul rate':>22}"
    print(f"{'step':<22}{'images/s':>10}{columns}{columns}{'peak GB':>10}")
    words = ["--batch", str(batch), "--rounds", str(rounds), "--threads", str(torch.get_num_threads())]
    found = {}
    for name in RECIPES:
        found[name] = run_json([sys.executable, "-m", "benchmarks.training", *words, "--method", name])
        one = found[name]
        print(
            f"{name:<22}{one['images_per_s']:>10.2f}"
            f"{one['published_gflop_per_image']:>11.0f}G{one['published_share']:>22.2f}"
            f"{one['gflop_per_image']:>11.0f}G{one['share']:>22.2f}{one['peak_gb']:>10.1f}",
            flush=True,
        )
    if not PEER_PYTHON.exists():
        print("lightly-train is not installed; make bench-training-peer does it")
        return
    peer = run_json([str(PEER_PYTHON), str(PEERS / "lightly_train_step.py"), *words])
    print(f"{'lightly-train dinov2':<22}{peer['images_per_s']:>10.2f}{'':>68}{peer['peak_gb']:>10.1f}")
    ours = found["dinov2"]
    print(
        f"dinov2 over lightly-train: {ours['images_per_s'] / peer['images_per_s']:.2f} times the images/s "
        f"({ours['images_per_bare_tflop'] / peer['images_per_bare_tflop']:.2f} times those a bare FLOP), "
        f"{ours['peak_gb'] / peer['peak_gb']:.2f} times the peak memory"
    )


def run_json(command: list[str]) -> dict[str, float]:
    """The JSON object on the last line that a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.training"))
