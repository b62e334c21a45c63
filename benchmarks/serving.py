"""What serving costs: embeddings per second through gRPC beside the bare runtime, same network, same images, same run.

    .venv/bin/python -m benchmarks.serving --ckpt models/dinoscope_tiny.safetensors

The server is a process of its own and serves the exported file on one thread, which the bare runtime uses too. Bare: decode,
preprocess and run one image after another in this process. Served: clients that send the same JPEG files as BYTES to `embedding`,
each waiting for its answer. The cases take turns, so that a noisy machine disturbs all alike; medians over the rounds are printed.
CPU milliseconds (the server's, or this process's) stand beside the rate because they hold on a shared machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tritonclient.grpc as grpc_client
import tyro

from data.decode import decode_image
from data.errors import InputError, run_cli
from data.preprocess import center_view
from exports.to_onnx import export_onnx
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

IMAGE_HW = (375, 500)
"""Height and width of the JPEG files, px."""
Case = Callable[[list[bytes]], None]


@dataclass(frozen=True)
class Rate:
    """One round of a case."""

    per_s: float
    cpu_ms: float
    """CPU time of one image."""


def make_images(n: int) -> list[bytes]:
    """JPEG files of soft noise, each another one."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (n, 30, 40, 3), dtype=np.uint8)
    files = [cv2.imencode(".jpg", cv2.resize(one, IMAGE_HW[::-1], interpolation=cv2.INTER_CUBIC))[1] for one in small]
    return [file.tobytes() for file in files]


def bare(runtime: Runtime) -> Case:
    """The runtime without a server around it."""

    def run(files: list[bytes]) -> None:
        for file in files:
            pixels = center_view(decode_image(file), runtime.manifest.preprocess)
            runtime.run(pixels[None], ("embedding",))

    return run


def served(address: str, concurrency: int) -> Case:
    """Clients that share the images and each wait for one answer at a time."""
    clients = [grpc_client.InferenceServerClient(address) for _ in range(concurrency)]
    pool = ThreadPoolExecutor(concurrency)

    def ask(number: int, files: list[bytes]) -> None:
        for file in files:
            tensor = grpc_client.InferInput("image", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([file], object))
            clients[number].infer("embedding", [tensor])

    def run(files: list[bytes]) -> None:
        parts = [files[number::concurrency] for number in range(concurrency)]
        list(pool.map(ask, range(concurrency), parts))

    return run


@contextmanager
def server(artifact: Path, folder: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`python -m server` on one artifact; yields its gRPC address and process id. Raises InputError when it does not start."""
    flags = {"--models": artifact, "--collections": folder / "state", "--samples": "none", "--threads": threads}
    flags |= {"--device": "cpu", "--log-level": "warning", "--http-port": 0, "--grpc-port": 0, "--metrics-port": 0}
    command = [sys.executable, "-m", "server", *(str(part) for pair in flags.items() for part in pair)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            if not lines[1]:
                raise InputError(f"the server of {artifact} did not start; its own message is above")
            yield json.loads(lines[1])["grpc"], process.pid
        finally:
            process.terminate()


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(cases: dict[str, tuple[Case, int]], files: list[bytes], rounds: int) -> dict[str, Rate]:
    """Median rate of each case over `rounds` interleaved rounds; one round each goes uncounted before."""
    seen: dict[str, list[Rate]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (run, pid) in cases.items():
            wall, cpu = time.perf_counter(), cpu_s(pid)
            run(files)
            if number:
                n = len(files)
                seen[name].append(Rate(n / (time.perf_counter() - wall), (cpu_s(pid) - cpu) * 1e3 / n))
    return {
        name: Rate(statistics.median(one.per_s for one in all_of), statistics.median(one.cpu_ms for one in all_of))
        for name, all_of in seen.items()
    }


def main(ckpt: Path = Path("models/dinoscope_tiny.safetensors"), images: int = 64, rounds: int = 7) -> None:
    """Compare a served network with the bare one on one thread.

    Args:
        ckpt: A checkpoint; it is exported to ONNX first.
        images: JPEG files in a round.
        rounds: Interleaved rounds.
    """
    files = make_images(images)
    with tempfile.TemporaryDirectory() as name:
        artifact = Path(name) / "backbone.onnx"
        export_onnx(ckpt, artifact)
        runtime = open_runtime(artifact, device="cpu", threads=1)
        with server(artifact, Path(name), threads=1) as (address, pid):
            cases = {"bare runtime": (bare(runtime), os.getpid())}
            cases |= {f"gRPC, {n} at a time": (served(address, n), pid) for n in (1, 8)}
            found = compare(cases, files, rounds)
    size = "x".join(map(str, IMAGE_HW[::-1]))
    print(f"{ckpt}, JPEG files of {size} px to embeddings, 1 thread, median of {rounds} rounds of {images}")
    print(f"{'':<20}{'images/s':>10}{'ratio':>8}{'CPU ms/image':>15}{'ratio':>8}")
    base = found["bare runtime"]
    for case, rate in found.items():
        ratios = (rate.per_s / base.per_s, rate.cpu_ms / base.cpu_ms)
        print(f"{case:<20}{rate.per_s:>10.1f}{ratios[0]:>8.2f}{rate.cpu_ms:>15.1f}{ratios[1]:>8.2f}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
