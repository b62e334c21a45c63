"""What the views of an image cost a core: with Pillow, as the published code makes them; in our workers; in workers that only decode.

    .venv/bin/python -m benchmarks.views

Real photographs of 500 x 375 pixels (those in `samples/`, enlarged or reduced to that) as JPEG; ten views each, as DINO cuts them. All
three carry out the same plans. CPU time of one process with one thread; the ways take turns, and the fastest round of each counts, which
other work on the machine disturbs least.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from PIL import Image

from data.crops import CropSpec, plan_views, view_rng
from data.datasets import open_dataset
from data.errors import run_cli
from data.views import carry_out, decode_and_plan, to_batch
from tests.oracles.pillow_views import normalised, pillow_view
from training.memory import keep_freed_memory

WIDTH, HEIGHT = 500, 375
JPEG_QUALITY = 90
SPEC = CropSpec(local_px=98)
"""DINO's crops, of DINOv2's size."""
SAMPLES = Path(__file__).resolve().parents[1] / "samples"


def photographs(n: int) -> list[bytes]:
    """Encoded images."""
    found = open_dataset(SAMPLES / "images").examples(n)
    resized = [cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for image in found]
    encoded = [
        cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        for image in resized
    ]
    return [data.tobytes() for data in encoded]


def with_pillow(data: bytes, rng: np.random.Generator) -> None:
    """Decode, crop and resize, jitter and gray, blur, to normalised floats: one call of Pillow after the other."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    plan = plan_views(image.height, image.width, SPEC, rng)
    for view, step in enumerate(plan):
        normalised(pillow_view(image, step, SPEC.view_px(view), SPEC.blur_kernel))


def with_workers(data: bytes, rng: np.random.Generator) -> None:
    """Our workers' way, and the normalisation, which the main process does for them."""
    image, plan = decode_and_plan(data, SPEC, rng)
    views = carry_out(image, plan, SPEC)
    to_batch(views[:2])
    to_batch(views[2:])


def decode_only(data: bytes, rng: np.random.Generator) -> None:
    """What is left to the workers where the device makes the views."""
    image, _ = decode_and_plan(data, SPEC, rng)
    torch.from_numpy(image).flatten().clone()  # into the batch


WAYS: dict[str, Callable[[bytes, np.random.Generator], None]] = {
    "pillow": with_pillow,
    "workers": with_workers,
    "device": decode_only,
}


def main(images: int = 12, rounds: int = 15) -> None:
    """Print CPU milliseconds an image, images a second and core, and how many times fewer seconds than with Pillow.

    Args:
        images: Photographs a round.
        rounds: Turns of each way; one more comes before, uncounted.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()  # as training does, for itself and its workers
    files = photographs(images)
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name, way in WAYS.items():
            began = time.process_time()
            for index, data in enumerate(files):
                way(data, view_rng(0, turn, index))
            if turn:
                spent[name].append((time.process_time() - began) / len(files))
    print(f"{len(files)} JPEGs of {WIDTH}x{HEIGHT}, {SPEC.n_views} views each, one thread, best of {rounds} rounds")
    print(f"{'views made by':<15}{'CPU ms/image':>14}{'images/s and core':>19}{'x fewer than pillow':>21}")
    for name, seconds in spent.items():
        best = min(seconds)
        print(f"{name:<15}{1e3 * best:>14.1f}{1 / best:>19.1f}{min(spent['pillow']) / best:>21.1f}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m benchmarks.views"))
