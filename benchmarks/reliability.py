"""What the server stands: hostile requests among good ones, reloads under load, clients that misbehave, a full disk, an end in mid-work.

    .venv/bin/python -m benchmarks.reliability                     every part
    .venv/bin/python -m benchmarks.reliability --part storm        one of storm, openapi, reloads, clients, large, disk, sigterm

A tiny network is served by a process of its own, so that what is tried is the server. Each part prints counts, and ends with status 3 where
one is not as it must be. Read in this order: the parts, main; the requests are in `reliability_requests`.
"""

import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import httpx
import numpy as np
import orjson
import tyro

from benchmarks.reliability_messages import image_request
from benchmarks.reliability_openapi import ask_by_the_page
from benchmarks.reliability_requests import Answers, Clients, save_network
from benchmarks.serving_targets import rss_mb
from data.errors import CheckFailed, run_cli
from exports.to_onnx import export_onnx
from tests.server.http2 import TAKE_NOTHING, call

Part = Literal["storm", "openapi", "reloads", "clients", "large", "disk", "sigterm"]
PROBE_S = 1.0
"""How long Kubernetes waits for a probe unless told otherwise."""
FLAT = 1.1
"""Memory late in a part may be this much of what it was early on."""


@contextmanager
def tiny_server(
    folder: Path, *flags: str, file_bytes: int | None = None, log: TextIO | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`python -m server` on the tiny network; the process, and where it listens. `file_bytes` bounds every file it writes."""
    models = folder / "models"
    if not models.exists():
        save_network(models)
        export_onnx(models / "backbone.safetensors", models / "backbone.onnx", models / "depth.safetensors")
    command = [
        sys.executable,
        "-m",
        "server",
        "--models",
        str(models),
        "--collections",
        str(folder / "state"),
        "--samples",
        "none",
    ]
    command += [
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        "--metrics-port",
        "0",
        "--device",
        "cpu",
        "--log-level",
        "error",
        *flags,
    ]

    def bounded() -> None:
        assert file_bytes is not None
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    # Only where it must be: Python then runs what libraries do after a fork, and gRPC's part of that, where there were clients before, may
    # end the child before it is a server.
    before = None if file_bytes is None else bounded
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=before) as process:
        assert process.stdout is not None
        try:
            lines = process.stdout.readline(), process.stdout.readline()
            said = "" if log is None else Path(log.name).read_text()
            check(
                lines[1] != "",
                f"the server did not start, status {process.wait(60) if not lines[1] else 0}; it said: {said}",
            )
            yield process, json.loads(lines[1])
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def check(holds: bool, what: str) -> None:
    """Raise CheckFailed unless it holds."""
    if not holds:
        raise CheckFailed(what)


def check_flat(series_mb: list[float], what: str) -> None:
    """Print the series, and raise CheckFailed where its end lies well above its second quarter (the first warms caches up)."""
    n = len(series_mb)
    early, late = statistics.median(series_mb[n // 4 : n // 2]), statistics.median(series_mb[-max(1, n // 4) :])
    print(
        f"  memory (MB): {' '.join(f'{one:.0f}' for one in series_mb)}; second quarter {early:.0f}, last quarter {late:.0f}"
    )
    check(late <= FLAT * early, f"{what}: memory grew from {early:.0f} to {late:.0f} MB")


def threads_of(pid: int) -> int:
    """Threads of a process (Linux)."""
    return len(os.listdir(f"/proc/{pid}/task"))


def storm(folder: Path, requests: int) -> None:
    """Requests over all routes, 5 % of them hostile, each good one checked against what the network says by itself."""
    with tiny_server(folder) as (process, at), ThreadPoolExecutor(16) as pool:
        answers, series, per_step = Answers(folder / "models"), [], max(1, requests // 20)
        clients = [Clients(at, answers, seed) for seed in range(16)]
        found: Counter[str] = Counter()
        began = time.monotonic()
        for _ in range(20):
            for counts in pool.map(lambda one: one.run(per_step // len(clients) + 1), clients):
                found += counts
            series.append(rss_mb(process.pid))
        wrong = [line for one in clients for line in one.wrong]
        seconds = time.monotonic() - began
        print(f"storm: {sum(found.values())} requests in {seconds:.0f} s, {threads_of(process.pid)} threads at the end")
        for name, count in sorted(found.items()):
            print(f"  {name:<40}{count:>8}")
        print(f"  wrong or unexpected answers: {len(wrong)} (wanted: 0)")
        check(not wrong, f"{len(wrong)} answers were not as they must be, the first: {wrong[:1]}")
        check(process.poll() is None, "the server ended")
        check_flat(series, "storm")


def openapi(folder: Path, times: int = 4, examples: int = 30) -> None:
    """Requests made from the OpenAPI page; each answer must be what the page says, and models are right afterwards."""
    with tiny_server(folder) as (process, at):
        good = Clients(at, Answers(folder / "models"), 0, hostile=0.0)
        items = {"items": [{"id": "first", "label": "a", "embedding": [1.0] * 48}]}
        httpx.post(f"{at['http']}/v1/collections/photos/items", json=items).raise_for_status()
        began, made, series = time.monotonic(), 0, []
        for seed in range(times):
            made += ask_by_the_page(at["http"], folder, examples, seed)
            series.append(rss_mb(process.pid))
        seconds = time.monotonic() - began
        for model in httpx.post(f"{at['http']}/v2/repository/index").json():  # it learned names, and unloaded some
            httpx.post(f"{at['http']}/v2/repository/models/{model['name']}/load", timeout=60).raise_for_status()
        good.models(50)
        print(f"openapi: {made} requests in {seconds:.0f} s, each answered as the page says")
        check(not good.wrong, f"models failed afterwards: {good.wrong[:1]}")
        check(process.poll() is None, "the server ended")
        check_flat(series, "openapi")


def reloads(folder: Path, times: int = 50) -> None:
    """The network read and swapped again and again while clients ask; every request must be answered."""
    with tiny_server(folder) as (process, at), ThreadPoolExecutor(4) as pool:
        answers, series, over = Answers(folder / "models"), [], threading.Event()
        clients = [Clients(at, answers, seed, hostile=0.0) for seed in range(4)]

        def ask(one: Clients) -> Counter[str]:
            counts: Counter[str] = Counter()
            while not over.is_set():
                counts += one.run(10)
            return counts

        asking = [pool.submit(ask, one) for one in clients]
        try:
            for _ in range(times):
                httpx.post(f"{at['http']}/v2/repository/models/backbone/load", timeout=60).raise_for_status()
                series.append(rss_mb(process.pid))
        finally:
            over.set()
        asked = sum(sum(one.result().values()) for one in asking)
        wrong = [line for one in clients for line in one.wrong]
        print(f"reloads: {times} while {asked} requests were answered; failed or wrong: {len(wrong)} (wanted: 0)")
        check(not wrong, f"{len(wrong)} answers were not as they must be, the first: {wrong[:1]}")
        check_flat(series, "reloads")


def misbehaving(folder: Path, each: int = 300) -> None:
    """Connections that never finish a request or take no reply, clients that vanish, calls cancelled by the hundred; good requests."""
    with tiny_server(folder) as (process, at):
        answers = Answers(folder / "models")
        good = Clients(at, answers, 0, hostile=0.0)
        good.run(50)
        host, port = at["http"].removeprefix("http://").split(":")
        grpc_port = at["grpc"].rpartition(":")[2]
        before, threads = rss_mb(process.pid), threads_of(process.pid)
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
        asked = image_request("overview", answers.images[0]).SerializeToString()
        unread = call("ModelInfer", asked, len(asked), TAKE_NOTHING)
        opened: list[socket.socket] = []
        kinds: tuple[tuple[str, int, bytes], ...] = (
            ("connections that say nothing", int(port), b""),
            ("headers that never end", int(port), head[:30]),
            ("bodies that never come", int(port), head + b"x" * 100),
            ("gRPC connections that say nothing", int(grpc_port), b""),
            ("gRPC prefaces that stop half-way", int(grpc_port), b"PRI * HTTP/2.0"),
            ("gRPC calls whose reply is not taken", int(grpc_port), unread),
        )
        for name, to, data in kinds:
            for _ in range(each):
                one = socket.create_connection((host, to))
                one.sendall(data)
                opened.append(one)
            good.run(20)
            grown, more = rss_mb(process.pid) - before, threads_of(process.pid) - threads
            print(f"  {each} {name}: {grown:+.0f} MB, {more:+d} threads, good requests go on")
        for one in opened[::2]:  # half of them vanish without a word
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            one.close()
        good.cancel_storm(each * 3)
        good.run(50)
        for one in opened[1::2]:
            one.close()
        time.sleep(2)
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        grown, more = rss_mb(process.pid) - before, threads_of(process.pid) - threads
        print(f"clients: then {each * 3} cancelled calls: {grown:+.0f} MB, {more:+d} threads, {files} files open")
        check(not good.wrong, f"good requests failed beside them: {good.wrong[:1]}")
        check(grown < 150 and more < 40 and files < 150, "memory, threads or files did not stay bounded")


def large(folder: Path) -> None:
    """The largest JSON that is taken and sent, while a probe asks whether the server lives."""
    with tiny_server(folder, "--max-batch-rows", "8") as (_, at), ThreadPoolExecutor(1) as pool:
        image = Answers(folder / "models").images[0]
        pixels = np.random.default_rng(0).normal(size=(50, 3, 128, 128))
        tensor = {"name": "pixels", "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.tolist()}
        items = [{"embedding": row.tolist()} for row in np.random.default_rng(1).normal(size=(60_000, 48))]
        bodies: dict[str, tuple[str, dict[str, Any]]] = {
            "maps out": (
                "/v1/depth?size=512",
                {"files": [("file", ("x.png", image, "image/png"))] * 60},
            ),
            "numbers in": (
                "/v2/models/backbone/infer",
                {"content": orjson.dumps({"inputs": [tensor], "outputs": [{"name": "embedding"}]})},
            ),
            "items in": (
                "/v1/collections/large/items",
                {"content": orjson.dumps({"items": items}), "headers": {"content-type": "application/json"}},
            ),
        }
        del tensor, items, pixels
        with httpx.Client(base_url=at["http"], timeout=120) as http, httpx.Client(base_url=at["http"]) as probe:
            for name, (path, sent) in bodies.items():
                waits: list[float] = []
                asked = pool.submit(http.post, path, **sent)
                while not asked.done():
                    began = time.monotonic()
                    probe.get("/v2/health/live", timeout=60).raise_for_status()
                    waits.append(time.monotonic() - began)
                    time.sleep(0.01)
                reply, body = asked.result(), sent.get("content", b"")
                print(
                    f"large: {name}: {len(body) / 1e6:.0f} MB of JSON in, {len(reply.content) / 1e6:.0f} MB out, {reply.status_code}; "
                    f"of {len(waits)} probes beside it the slowest took {max(waits) * 1e3:.0f} ms"
                )
                check(reply.is_success, f"{name}: {reply.status_code} {reply.text[:200]}")
                check(max(waits) < PROBE_S, f"{name}: a probe waited {max(waits):.2f} s")


def full_disk(folder: Path) -> None:
    """No file of the server may grow past 3 MB: writes end in one clear error, reads and models go on."""
    with (
        tiny_server(folder, file_bytes=3 << 20) as (process, at),
        httpx.Client(base_url=at["http"], timeout=60) as http,
    ):
        rng, stored, told = random.Random(0), 0, ""
        for step in range(400):
            vectors = [{"id": f"{step}-{n}", "embedding": [rng.random() for _ in range(48)]} for n in range(50)]
            reply = http.post("/v1/collections/full/items", json={"items": vectors})
            if reply.status_code != 201:
                told = f"{reply.status_code} {reply.json()['error']}"
                break
            stored += len(vectors)
        print(f"disk: after {stored} vectors: {told}")
        check(told.startswith(("507", "503")) and "disk" in told, f"no clear error, but {told!r}")
        listed = http.get("/v1/collections/full/items", params={"limit": 1}).json()
        answers = Answers(folder / "models")
        good = Clients(at, answers, 0, hostile=0.0)
        image = {"content-type": "image/png"}
        found = http.post("/v1/collections/full/search", content=answers.images[0], headers=image)
        check(found.status_code == 200, f"search answered {found.status_code} {found.text[:200]}")
        good.models(20)
        check(not good.wrong, f"models failed: {good.wrong[:1]}")
        print(
            f"  reads go on: {str(listed)[:100]}; search 200; 20 model requests right; alive: {process.poll() is None}"
        )


def terminated(folder: Path, times: int = 10) -> None:
    """SIGTERM with requests in flight: whatever was accepted is answered and arrives, whatever comes later is refused, the status is 0."""
    total: Counter[str] = Counter()
    for seed in range(times):
        said = folder / f"log{seed}"
        with (
            said.open("w") as log,
            tiny_server(folder, "--log-level", "info", log=log) as (process, at),
            ThreadPoolExecutor(16) as pool,
        ):
            answers = Answers(folder / "models")
            clients = [Clients(at, answers, seed * 16 + n, hostile=0.0) for n in range(16)]
            asking = [pool.submit(one.until_refused) for one in clients]
            busy_till_s = time.monotonic() + 60
            while sum(one.answered for one in clients) < 100 + 7 * seed and time.monotonic() < busy_till_s:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            counts: Counter[str] = sum((one.result() for one in asking), Counter())
            status = process.wait(60)
            wrong = [line for one in clients for line in one.wrong]
            lines = read_log(said.read_text())
            codes = Counter(line["code"] for line in lines if line["event"] == "request")
            check(codes["OK"] == counts["answered"], f"the server answered {codes}, of which {counts} arrived; {wrong}")
            check(status == 0 and not wrong, f"status {status}, neither answered nor refused: {wrong} {codes}")
            total += counts
    print(
        f"sigterm: {times} times with 16 clients: {total['answered']} answered, {total['refused']} refused or not connected, none lost"
    )


def read_log(text: str) -> list[dict[str, Any]]:
    """The server's log. Raises CheckFailed where it holds anything but its own lines: a library has complained, or a thread has died."""
    others = [line for line in text.splitlines() if not line.startswith("{")]
    check(not others, f"the log holds {others[:20]}")
    return [json.loads(line) for line in text.splitlines()]


def main(part: Part | None = None, requests: int = 100_000) -> None:
    """Run one part, or all.

    Args:
        part: The part.
        requests: Of the storm.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[Part, Callable[[], None]] = {
            "storm": lambda: storm(folder, requests),
            "openapi": lambda: openapi(folder),
            "reloads": lambda: reloads(folder),
            "clients": lambda: misbehaving(folder),
            "large": lambda: large(folder),
            "disk": lambda: full_disk(folder),
            "sigterm": lambda: terminated(folder),
        }
        for chosen in [part] if part else parts:
            parts[chosen]()


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
