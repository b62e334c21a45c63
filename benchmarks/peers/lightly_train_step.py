"""What lightly-train's DINOv2 step reaches on this machine; run by `python -m benchmarks.training` in the peer's own environment.

Its own training command trains ViT-S/14 from scratch (2 x 224 + 8 x 98 px, 65,536 prototypes, its defaults) on random pictures. A step is
the time from one to the next, so it holds what its loader makes the step wait for. A bare matrix product is timed between steps and
taken off. Prints JSON.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PRODUCT = 2048


def product_rate(seconds: float = 1.0) -> float:
    """FLOP/s of float32 matrix products, kept up for so long; as in benchmarks/training.py."""
    a, out = torch.randn(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, a, out=out)
        n += 1
    return n * 2 * PRODUCT**3 / (time.perf_counter() - began)


def main() -> None:
    """Time the steps after the first."""
    parser = argparse.ArgumentParser()
    for name in ("batch", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    torch.set_num_threads(asked.threads)
    import lightly_train
    from lightly_train._methods.dinov2.dinov2 import DINOv2

    starts: list[float] = []
    ends: list[float] = []
    rates: list[float] = []
    step = DINOv2.training_step_impl

    def timed(self: DINOv2, batch: object, batch_idx: int) -> object:
        ends.append(time.perf_counter())
        rates.append(product_rate())
        starts.append(time.perf_counter())
        return step(self, batch, batch_idx)

    DINOv2.training_step_impl = timed
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        images.mkdir()
        for i in range(asked.batch * (asked.rounds + 2)):
            small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(images / f"{i}.jpg")
        lightly_train.pretrain(
            out=Path(scratch) / "out",
            data=images,
            model="dinov2/vits14-notpretrained",
            method="dinov2",
            epochs=1,
            batch_size=asked.batch,
            num_workers=1,
            accelerator="cpu",
            devices=1,
            precision="32-true",
        )
    seconds = [after - before for before, after in zip(starts[1:], ends[2:], strict=False)]
    # Products before and after each step.
    shares = [
        1 / took / ((before + after) / 2) for took, before, after in zip(seconds, rates[1:], rates[2:], strict=False)
    ]
    print(
        json.dumps(
            {
                "images_per_s": asked.batch / statistics.median(seconds),
                "images_per_bare_tflop": asked.batch * statistics.median(shares) * 1e12,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            }
        )
    )


if __name__ == "__main__":
    main()
