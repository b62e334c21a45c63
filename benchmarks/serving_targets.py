"""What is measured: this server, a real Triton, other servers, each in processes of its own; and the bare runtime.

Read in this order: Target (a server that listens), `ours`, `triton`; Bare (no server).
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from runtimes.onnx_runtime import OnnxRuntime
from tests.exports.real_triton import RealTriton

SIDE_PX = 224
IDENTITY_WIDTH = 384
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Target:
    """A server under load."""

    name: str
    address: str
    """host:port of the wire that is used."""
    pid: int
    http: str | None = None
    """Path to POST to; None: gRPC."""
    metrics: str = ""


def send(address: str, request: Path, *flags: str) -> dict[str, Any]:
    """What the clients' process reports."""
    command = [sys.executable, "-m", "benchmarks.serving_load", address, str(request), *flags]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


@contextmanager
def process(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A server process that prints a JSON line when it is ready; ended at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as started:  # type: ignore[call-overload]
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()


@contextmanager
def ours(artifact: Path | None, folder: Path, *flags: str, name: str = "this server") -> Iterator[Target]:
    """`python -m server` on an artifact; without one, on a network that computes nothing. Raises InputError where it does not start."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "server" if artifact else "benchmarks.serving_identity"]
    command += [
        "--models",
        str(artifact or folder),
        "--collections",
        str(folder / "state"),
        "--samples",
        "none",
        *ports,
    ]
    with process([*command, "--device", "cpu", "--log-level", "warning", *flags]) as started:
        assert started.stdout is not None
        lines = [started.stdout.readline(), started.stdout.readline()]
        if not lines[1]:
            raise InputError(f"the server of {artifact} did not start; its own message is above")
        said = json.loads(lines[1])
        yield Target(name, said["grpc"], started.pid, metrics=said["metrics"])


_PYTHON_MODEL = """
import json
import math
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        given = json.loads(args["model_config"])["parameters"]
        file, self.reads = given["file"]["string_value"], given["reads"]["string_value"] == "True"
        self.session = None
        if file:
            import onnxruntime
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.session = onnxruntime.InferenceSession(file, options)

    def execute(self, requests):
        rows = [pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        if self.session is not None or self.reads:
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
        if self.session is not None:
            (found,) = self.session.run(["embedding"], {"pixels": joined})
        else:
            found = np.zeros((sum(map(len, rows)), WIDTH), np.float32)
            if self.reads and not math.isfinite(np.einsum("i->", joined.reshape(-1))):
                found[:] = np.nan
        replies, at = [], 0
        for part in rows:
            tensor = pb_utils.Tensor("embedding", np.ascontiguousarray(found[at : at + len(part)]))
            replies.append(pb_utils.InferenceResponse([tensor]))
            at += len(part)
        return replies
""".replace("WIDTH", str(IDENTITY_WIDTH))

_CONFIG = """name: "backbone"
backend: "python"
max_batch_size: 4
input [{{ name: "pixels" data_type: TYPE_FP32 dims: [3, 224, 224] }}]
output [{{ name: "embedding" data_type: TYPE_FP32 dims: [384] }}]
instance_group [{{ kind: KIND_CPU count: {instances} }}]
dynamic_batching {{ }}
parameters {{ key: "file" value: {{ string_value: "{file}" }} }}
parameters {{ key: "reads" value: {{ string_value: "{reads}" }} }}
"""


@contextmanager
def triton(artifact: Path | None, folder: Path, instances: int, reads: bool = False) -> Iterator[Target]:
    """A real Triton's Python backend with ONNX Runtime on one thread an instance, or without an artifact one that computes nothing.

    With `reads` the latter puts the rows of a batch side by side and looks for values that are not finite, as this server's runtimes do.
    """
    model = folder / "triton" / "repository" / "backbone"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(_PYTHON_MODEL)
    (model / "config.pbtxt").write_text(_CONFIG.format(instances=instances, file=artifact or "", reads=reads))
    with RealTriton(model.parent, folder / "triton") as running:
        yield Target("Triton, Python backend", f"127.0.0.1:{running.grpc}", running.process.pid)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its descendants have used (Linux)."""
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) * TICK_S
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        total += used.get(one, 0.0)
        waiting += parents.get(one, [])
    return total


def rss_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Bare:
    """ONNX Runtime with no server around it."""

    runtimes: tuple[OnnxRuntime, ...]
    batch: int
    name: str

    @staticmethod
    def open(artifact: Path, sessions: int, threads: int, batch: int) -> "Bare":
        """Sessions that run side by side, each on its own threads."""
        runtimes = tuple(OnnxRuntime(artifact, device="cpu", threads=threads, max_batch=batch) for _ in range(sessions))
        return Bare(runtimes, batch, f"bare, {sessions} x {threads} threads, batch {batch}")

    def run(self, images: int) -> tuple[float, float]:
        """Wall and CPU seconds of at least so many images."""
        runs = max(1, images // (self.batch * len(self.runtimes)))
        pixels = np.random.default_rng(0).standard_normal((self.batch, 3, SIDE_PX, SIDE_PX), dtype=np.float32)

        def work(runtime: OnnxRuntime) -> None:
            for _ in range(runs):
                runtime.run(pixels)

        threads = [threading.Thread(target=work, args=(runtime,)) for runtime in self.runtimes]
        wall, cpu = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        share = images / (runs * self.batch * len(self.runtimes))
        return (time.perf_counter() - wall) * share, (time.process_time() - cpu) * share
