"""The server beyond its capacity: what is answered, how late, and whether anything is computed for nobody.

`overload` runs servers and clients as processes and measures time; `departures` and `one_pass` count, on a server in this process whose
network writes down what it is given.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from benchmarks.serving_targets import SIDE_PX, ours, send
from runtimes.onnx_runtime import OnnxRuntime
from server.artifacts import Loaded
from server.config import ServerConfig
from server.run import Running

QUEUE_ROWS = 64
SHARES = (0.5, 0.8, 0.95, 1.2, 2.0)
"""Offered load, of capacity."""
HANDED_OUT = 8
"""Rows whose answers may be on their way when their places are given away: a batch of 4 from each of two instances."""
ON_THE_WAY_S = 0.05
"""How long word of a departure may take from the client to the server."""


def overload(artifact: Path, request: Path, folder: Path, seconds: float = 15.0, rounds: int = 2) -> None:
    """Random arrivals below and above capacity; capacity is measured before and after by clients that wait."""
    closed: list[float] = []
    found: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
    with ours(artifact, folder, "--queue-rows", str(QUEUE_ROWS)) as target:

        def measure_capacity() -> None:
            report = send(target.address, request, "--count", "400", "--concurrency", "16")
            closed.append(report["codes"]["OK"] / report["wall_s"])

        measure_capacity()
        for number in range(rounds):
            measure_capacity()
            for share in SHARES:
                flags = ("--rate", str(share * closed[-1]), "--seconds", str(seconds), "--seed", str(number))
                found[share].append(send(target.address, request, *flags) | {"capacity": closed[-1]})
    print(
        f"\nopen loop: Poisson arrivals for {seconds:g} s, {rounds} rounds, --queue-rows {QUEUE_ROWS}; 2 blocks, 602 KB a request"
    )
    print(
        f"{'offered':>8}{'arrived/s':>11}{'answered/s':>12}{'of capacity':>13}{'refused':>9}{'p50 ms':>8}{'p99 ms':>8}{'full ms':>9}"
        f"{'p99 answers':>13}{'most':>6}"
    )
    for share, reports in found.items():
        show_share(share, reports)
    print(
        f"full: {QUEUE_ROWS} rows at the capacity of the round, the mean of a queue that is always full. answers: how many came from "
        f"the moment a request was due to its own. Wanted at 120 %: answered at least 0.95 of capacity; p99 of the answers at most "
        f"{QUEUE_ROWS} and the {HANDED_OUT} that were on their way back when it was let in; no answers other than OK and RESOURCE_EXHAUSTED"
    )


def show_share(share: float, reports: Sequence[dict[str, Any]]) -> None:
    """One line: means over the rounds."""
    lines = []
    for one in reports:
        ok_s, codes = one["ok_s"], one["codes"]
        if set(codes) - {"OK", "RESOURCE_EXHAUSTED"}:
            raise RuntimeError(f"at {share:.0%} the server answered {codes}")
        good, bad = codes.get("OK", 0), codes.get("RESOURCE_EXHAUSTED", 0)
        p50, p99 = (1e3 * quantile(ok_s, q) for q in (0.5, 0.99))
        full = 1e3 * QUEUE_ROWS / one["capacity"]
        rate = good / one["wall_s"]
        lines.append(((good + bad) / one["wall_s"], rate, rate / one["capacity"], bad / (good + bad), p50, p99, full))
    arrived, rate, part, refused, p50, p99, full = np.mean(lines, axis=0)
    answers = [quantile(one["answers"], 0.99) for one in reports]
    most = max(one["answers"][-1] for one in reports)
    print(
        f"{share:>8.0%}{arrived:>11.1f}{rate:>12.1f}{part:>13.2f}{refused:>9.1%}{p50:>8.0f}{p99:>8.0f}{full:>9.0f}"
        f"{max(answers):>13}{most:>6}"
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Watched(OnnxRuntime):
    """Writes down when each image was begun; an image's first number is its name."""

    def __init__(self, artifact: Path) -> None:
        super().__init__(artifact, device="cpu", threads=1)
        self.begun: list[tuple[int, float]] = []
        self.passes = 0

    def run(self, pixels_NCHW: np.ndarray, outputs: Sequence[str] = ("embedding",)) -> dict[str, np.ndarray]:
        now = time.perf_counter()
        self.begun += [(round(float(image[0, 0, 0])), now) for image in pixels_NCHW]
        self.passes += 1
        return super().run(pixels_NCHW, outputs)


def watched_server(runtime: Watched, folder: str, **settings: Any) -> Running:
    """A server of it on free ports, two copies."""
    config = ServerConfig(
        models=Path(folder),
        collections=Path(folder),
        samples="none",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        **settings,
    )
    return Running(config, lambda _: Loaded((runtime, runtime)))


def departures(artifact: Path, requests: int = 600, leaving: float = 0.5) -> None:
    """Clients of whom half leave while they wait: images begun after their caller had left."""
    runtime = Watched(artifact)
    with tempfile.TemporaryDirectory() as folder, watched_server(runtime, folder) as running:
        runtime.begun.clear()
        left, answered = asyncio.run(_ask_and_leave(running.addresses.grpc, requests, leaving))
    late = [n for n, began in runtime.begun if n in left and began > left[n] + ON_THE_WAY_S]
    begun = {n for n, _ in runtime.begun}
    print(
        f"\ndepartures: {requests} requests, 64 at a time; {len(left)} callers left while they waited, {answered} were answered"
    )
    print(
        f"images computed {len(runtime.begun)}: {answered} for callers who stayed, {len(begun & left.keys())} that ran when their caller "
        f"left; begun for callers who had left: {len(late)} (wanted: 0); never computed: {requests - len(begun)}"
    )


async def _ask_and_leave(address: str, requests: int, leaving: float) -> tuple[dict[int, float], int]:
    """When each of the callers who left did so, and how many were answered."""
    rng, left, answered = random.Random(0), {}, 0
    pixels = np.zeros((1, 3, SIDE_PX, SIDE_PX), np.float32)
    names = iter(range(1, requests + 1))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def caller() -> None:
            nonlocal answered
            for name in names:
                pixels[0, 0, 0, 0] = name
                request = pb.ModelInferRequest(model_name="backbone")
                request.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape)
                request.outputs.add(name="embedding")
                request.raw_input_contents.append(pixels.tobytes())
                call = stub.ModelInfer(request)
                if rng.random() < leaving:
                    done, _ = await asyncio.wait([asyncio.ensure_future(_answer(call))], timeout=rng.uniform(0.01, 1.0))
                    if not done:
                        call.cancel()
                        left[name] = time.perf_counter()
                        continue
                else:
                    await call
                answered += 1

        await asyncio.gather(*(caller() for _ in range(64)))
    return left, answered


async def _answer(call: Any) -> None:
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call
