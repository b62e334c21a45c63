"""How fast the exported file is beside torch: images per second on one thread, same weights, same run.

    .venv/bin/python -m benchmarks.runtimes --ckpt models/dinoscope_tiny.safetensors

The two runtimes take turns, so that a noisy machine disturbs both alike; the median over the rounds is printed, and the ratio.
CPU milliseconds stand beside the wall time because they hold on a shared machine.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data.errors import run_cli
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from runtimes.runtime import Runtime


@dataclass(frozen=True)
class Timing:
    """Median cost of one image."""

    wall_ms: float
    cpu_ms: float


def time_image(runtime: Runtime, pixels_NCHW: np.ndarray, outputs: tuple[str, ...]) -> Timing:
    """Cost of one image of a batch, in milliseconds of wall and of process CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    runtime.run(pixels_NCHW, outputs)
    n = len(pixels_NCHW)
    return Timing((time.perf_counter() - wall) * 1e3 / n, (time.process_time() - cpu) * 1e3 / n)


def compare(
    runtimes: dict[str, Runtime], pixels_NCHW: np.ndarray, outputs: tuple[str, ...], rounds: int
) -> dict[str, Timing]:
    """Median timing of each runtime over `rounds` interleaved calls; one call each goes uncounted before."""
    seen: dict[str, list[Timing]] = {name: [] for name in runtimes}
    for i in range(rounds + 1):
        for name, runtime in runtimes.items():
            timing = time_image(runtime, pixels_NCHW, outputs)
            if i:
                seen[name].append(timing)
    return {
        name: Timing(statistics.median(t.wall_ms for t in times), statistics.median(t.cpu_ms for t in times))
        for name, times in seen.items()
    }


def main(ckpt: Path = Path("models/dinoscope_tiny.safetensors"), size_px: int = 224, rounds: int = 15) -> None:
    """Compare torch with ONNX Runtime on one thread.

    Args:
        ckpt: Any checkpoint that torch can load.
        size_px: Side of the square images, in pixels; a multiple of the patch.
        rounds: Interleaved calls a case.
    """
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "backbone.onnx"
        export_onnx(ckpt, onnx)
        runtimes = {
            "torch": open_runtime(ckpt, device="cpu", threads=1),
            "onnx": open_runtime(onnx, device="cpu", threads=1),
        }
        print(f"{ckpt}, {size_px} px, 1 thread, median of {rounds} rounds, milliseconds an image (wall / CPU)")
        print(f"{'batch':>5}  {'outputs':<22}{'torch':>16}{'onnx':>16}{'torch / onnx (CPU)':>20}")
        rng = np.random.default_rng(0)
        for batch in (1, 8):
            pixels = rng.standard_normal((batch, 3, size_px, size_px), dtype=np.float32)
            for outputs in (("embedding",), ("embedding", "attention")):
                found = compare(runtimes, pixels, outputs, rounds)
                torch_ms, onnx_ms = found["torch"], found["onnx"]
                cells = [f"{t.wall_ms:.1f} / {t.cpu_ms:.1f}" for t in (torch_ms, onnx_ms)]
                ratio = torch_ms.cpu_ms / onnx_ms.cpu_ms
                print(f"{batch:>5}  {'+'.join(outputs):<22}{cells[0]:>16}{cells[1]:>16}{ratio:>20.2f}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
