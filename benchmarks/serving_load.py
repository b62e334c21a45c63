"""Clients in a process of their own: one prepared request sent again and again, and how it was answered, as JSON on stdout.

    .venv/bin/python -m benchmarks.serving_load 127.0.0.1:8001 request.bin --concurrency 16 --count 200
    .venv/bin/python -m benchmarks.serving_load 127.0.0.1:8001 request.bin --rate 12 --seconds 20

A request is a file of bytes that are sent as they are: a ModelInfer message, or with --http PATH the body of a POST. Nothing is built or
read per request, so that the clients take as little as they can of the cores that the server needs as well; what they take is reported.
`--count` sends so many, of which `--concurrency` are under way at a time (closed loop); `--rate` sends them at random moments, whether
earlier ones were answered or not (open loop, Poisson arrivals).
"""

import asyncio
import http.client
import json
import random
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import tyro

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNELS = 4
CONNECT_S = 20
Call = Callable[[], Awaitable[str]]
"""Sends one request; returns OK or the name of the error."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent."""

    concurrency: int = 16
    """Requests under way at a time (closed loop)."""
    count: int = 0
    """Requests in all (closed loop)."""
    rate: float = 0.0
    """Requests a second (open loop)."""
    seconds: float = 10.0
    """How long they go on (open loop)."""
    http: str | None = None
    """Path to POST the request to, instead of gRPC."""
    content_type: str = "application/octet-stream"
    """Of the POST."""
    header_length: int = 0
    """Inference-Header-Content-Length of the POST; 0: none."""
    seed: int = 0


@dataclass
class Report:
    """What came of it."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """CPU time of the clients."""
    codes: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When a request was due and when its answer came, of those that were answered."""


def grpc_calls(address: str, body: bytes) -> tuple[list[grpc.aio.Channel], Call]:
    """Calls that take turns over a few connections."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CHANNELS)]
    methods = [channel.unary_unary(METHOD) for channel in channels]
    turn = 0

    async def call() -> str:
        nonlocal turn
        turn += 1
        try:
            await methods[turn % CHANNELS](body)
            return "OK"
        except grpc.aio.AioRpcError as error:
            return error.code().name

    return channels, call


async def closed(call: Call, load: Load, report: Report) -> None:
    """`concurrency` clients that each wait for their answer before they ask again."""
    left = iter(range(load.count))

    async def one() -> None:
        for _ in left:
            began = time.perf_counter()
            code = await call()
            note(report, code, began)

    await asyncio.gather(*(one() for _ in range(load.concurrency)))


async def opened(call: Call, load: Load, report: Report) -> None:
    """Requests at the moments of a Poisson process; latency counts from the moment, so that a late client is no excuse."""
    rng, loop, tasks = random.Random(load.seed), asyncio.get_running_loop(), set()
    due = began = time.perf_counter()

    async def one(due: float) -> None:
        note(report, await call(), due)

    while (due := due + rng.expovariate(load.rate)) < began + load.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = loop.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def note(report: Report, code: str, began: float) -> None:
    report.codes[code] += 1
    if code == "OK":
        report.spans.append((began, time.perf_counter()))


def sum_up(report: Report) -> dict[str, Any]:
    """The report as JSON: `ok_s`, seconds from the moment a request was due to its answer, sorted; `answers`, how many answers came in
    that time, its own among them, sorted: how long it waited, whatever the machine's speed."""
    answers = sorted(done for _, done in report.spans)
    ok_s = sorted(done - began for began, done in report.spans)
    among = sorted(bisect_right(answers, done) - bisect_right(answers, began) for began, done in report.spans)
    return {
        "wall_s": report.wall_s,
        "cpu_s": report.cpu_s,
        "codes": report.codes,
        "ok_s": ok_s,
        "answers": among,
    }


async def over_grpc(address: str, body: bytes, load: Load, report: Report) -> None:
    """Warm the connections up with nothing but themselves, then send."""
    channels, call = grpc_calls(address, body)
    await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_S)
    await timed((opened if load.rate else closed)(call, load, report), report)
    for channel in channels:
        await channel.close()


async def timed(work: Awaitable[None], report: Report) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    report.wall_s, report.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def over_http(address: str, body: bytes, load: Load, report: Report) -> None:
    """Closed loop over kept connections, a thread each."""
    headers = {"Content-Type": load.content_type}
    if load.header_length:
        headers["Inference-Header-Content-Length"] = str(load.header_length)
    left = iter(range(load.count))

    def one(_: int) -> None:
        connection = http.client.HTTPConnection(address)
        for _ in left:
            began = time.perf_counter()
            connection.request("POST", load.http or "/", body, headers)
            answer = connection.getresponse()
            answer.read()
            note(report, "OK" if answer.status == 200 else str(answer.status), began)

    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(load.concurrency) as pool:
        list(pool.map(one, range(load.concurrency)))
    report.wall_s, report.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def main(
    address: tyro.conf.Positional[str], request: tyro.conf.Positional[Path], load: tyro.conf.OmitArgPrefixes[Load]
) -> None:
    """Send, and report."""
    report, body = Report(), request.read_bytes()
    if load.http is not None:
        over_http(address, body, load, report)
    else:
        asyncio.run(over_grpc(address, body, load, report))
    json.dump(sum_up(report), sys.stdout)


if __name__ == "__main__":
    tyro.cli(main)
