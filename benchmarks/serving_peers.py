"""Other servers, each in a virtual environment of its own (`make bench-serving-peers`), with a model that computes nothing.

Each speaks the protocol that is cheapest for its tensors: gRPC with raw contents where it has KServe v2, else HTTP with the tensor's bytes.
"""

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb

from benchmarks.serving_load import METHOD
from benchmarks.serving_targets import IDENTITY_WIDTH, Target
from data.errors import InputError
from tests.exports.real_triton import VENV, free_ports

START_TIMEOUT_S = 60
ANSWER = bytes(4 * IDENTITY_WIDTH)
"""What each must answer: zeros [1,384] of float32."""


@dataclass(frozen=True)
class Peer:
    """A server of somebody else's."""

    name: str
    key: str
    """Of its environment, its requirements and its model file."""
    http: str | None = None
    """Path to POST the tensor's bytes to; None: gRPC."""


PEERS = (
    Peer("KServe SDK, gRPC", "kserve"),
    Peer("MLServer, gRPC", "mlserver"),
    Peer("LitServe, HTTP", "litserve", "/predict"),
)


@contextmanager
def peer(which: Peer, folder: Path, request: Path) -> Iterator[Target]:
    """The server under way, after it gave the right answer to the request. Raises InputError where it is not installed, or does not."""
    python = VENV.parent / which.key / "bin" / "python"
    if not python.exists():
        raise InputError(f"{python}: is not there; `make bench-serving-peers` installs it")
    ports = free_ports(3)
    file, log = Path(__file__).parent / "peers" / f"{which.key}_server.py", folder / f"{which.key}.log"
    with log.open("w") as out:  # a group of its own: some have workers that outlive them
        started = subprocess.Popen(
            [str(python), str(file), *map(str, ports)], cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
        try:
            target = Target(which.name, f"127.0.0.1:{ports[0]}", started.pid, which.http)
            _await_answer(started, target, request, log)
            yield target
        finally:
            with suppress(ProcessLookupError):  # it ended by itself, and said why
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _await_answer(started: subprocess.Popen[bytes], target: Target, request: Path, log: Path) -> None:
    body, end_s, came = request.read_bytes(), time.monotonic() + START_TIMEOUT_S, b""
    while time.monotonic() < end_s and started.poll() is None:
        try:
            came = _ask_http(target, body) if target.http else _ask_grpc(target, body)
        except (OSError, http.client.HTTPException, grpc.RpcError):
            time.sleep(0.5)
            continue
        if came != ANSWER:
            raise InputError(f"{target.name} answered {len(came)} bytes: {came[:60]!r}; wanted {len(ANSWER)} zeros")
        return
    raise InputError(f"{target.name} did not answer within {START_TIMEOUT_S} s; it said:\n{log.read_text()[-2000:]}")


def _ask_grpc(target: Target, body: bytes) -> bytes:
    with grpc.insecure_channel(target.address) as channel:
        reply = pb.ModelInferResponse.FromString(channel.unary_unary(METHOD)(body, timeout=10))
    return bytes(reply.raw_output_contents[0]) if reply.raw_output_contents else b""


def _ask_http(target: Target, body: bytes) -> bytes:
    connection = http.client.HTTPConnection(target.address, timeout=10)
    connection.request("POST", target.http or "", body, {"Content-Type": "application/octet-stream"})
    answer = connection.getresponse()
    came = answer.read()
    if answer.status != 200:
        raise http.client.HTTPException(f"{answer.status} {came[:200]!r}")
    return came
