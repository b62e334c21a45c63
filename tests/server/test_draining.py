"""A server that leaves: what had come whole is answered, whatever it is, and nothing is done that a client is told was not."""

import asyncio
import json
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from server import grpc_api, http_v2
from server.collections import Collections
from server.run import Running
from tests.server.conftest import config_of
from tests.server.gate import GatedRuntime, Held, ask, gauge, pixels, wait_for
from tests.server.wires import Refused, open_wire


def test_draining_answers_what_was_accepted_and_takes_nothing_new(gated):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(4) as pool, grpc.insecure_channel(running.addresses.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        late = open_wire("grpc", running.addresses)
        late.client.is_server_live()
        accepted = [pool.submit(ask, running, seed, name=name) for seed, name in enumerate(("grpc", "grpc", "http"))]
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 3)
        running.leave()
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Refused) as caught:
            late.infer("backbone", {"pixels": pixels(9)})
        assert caught.value.kind == "StatusCode.UNAVAILABLE"
        late.close()
        runtime.gate.set()
        assert max(one.result() for one in accepted) < 1e-6


def test_readiness_says_no_before_the_server_goes(tmp_path):
    runtime = GatedRuntime()
    with Running(config_of(tmp_path, tmp_path / "state", drain_delay_s=3.0), runtime.load) as running:
        ready = f"{running.addresses.http}/v2/health/ready"
        assert httpx.get(ready).status_code == 200
        running.leave()
        wait_for(lambda: httpx.get(ready).status_code == 503)
        assert httpx.get(f"{running.addresses.http}/v2/health/live").status_code == 200
        assert ask(running, 0) < 1e-6


ITEMS = {"items": [{"id": "a", "embedding": [1.0, 2.0, 3.0]}]}


def file_of_one_item(running: Running) -> bytes:
    httpx.post(f"{running.addresses.http}/v1/collections/first/items", json=ITEMS).raise_for_status()
    return httpx.get(f"{running.addresses.http}/v1/collections/first/export").content


WORK = {
    "add": ("add", "POST", "/v1/collections/second/items", 201),
    "import": ("imported", "POST", "/v1/collections/second/import", 201),
    "export": ("exported", "GET", "/v1/collections/first/export", 200),
    "delete an item": ("delete_item", "DELETE", "/v1/collections/first/items/a", 204),
    "delete": ("delete", "DELETE", "/v1/collections/first", 204),
    "delete with a body": ("delete", "DELETE", "/v1/collections/first", 204),
}
"""What is asked for: the method of Collections that is held meanwhile, the request, and its status."""


@pytest.mark.parametrize("what", WORK)
def test_whatever_was_accepted_is_finished_and_answered(what, gated, monkeypatch):
    running, _ = gated
    name, method, path, status = WORK[what]
    bodies = {
        "add": {"json": ITEMS},
        "import": {"content": file_of_one_item(running)},
        "delete with a body": {"content": b"{}"},
    }
    body = bodies.get(what, {})
    held = Held(getattr(Collections, name))
    monkeypatch.setattr(Collections, name, lambda *args: held(*args))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.request, method, running.addresses.http + path, timeout=60, **body)
        assert held.begun.wait(60)
        running.leave()
        time.sleep(3)  # longer than replies have that are ready
        assert not asked.done()
        held.go.set()
        assert asked.result().status_code == status


@pytest.mark.parametrize("way", ["http", "grpc", "stream"])
def test_a_large_request_is_accepted_once_it_has_come_not_once_it_was_read(way, gated, monkeypatch):
    running, _ = gated
    where, name = (http_v2, "read_request") if way == "http" else (grpc_api, "request_from")
    held = Held(getattr(where, name))
    monkeypatch.setattr(where, name, lambda *args: held(*args))
    ask_so = ask_by_stream if way == "stream" else partial(ask, name=way)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_so, running, 0, 1, 512)
        assert held.begun.wait(60)
        running.leave()
        wait_for(lambda: httpx.delete(f"{running.addresses.http}/v1/collections/nothing").status_code == 503)
        held.go.set()
        assert asked.result() < 1e-5


def ask_by_stream(running, seed, rows, side):
    """As `ask`."""
    answers = queue.Queue()
    sent = pixels(seed, rows, side)
    tensor = grpc_client.InferInput("pixels", sent.shape, "FP32")
    tensor.set_data_from_numpy(sent)
    with grpc_client.InferenceServerClient(running.addresses.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("backbone", [tensor])
        result, error = answers.get(timeout=60)
        client.stop_stream()
    assert error is None
    return float(np.abs(result.as_numpy("embedding") - sent.mean(axis=(2, 3))).max())


def test_what_is_not_done_in_time_is_not_done_afterwards(tmp_path, monkeypatch):
    """A write that waits until the server no longer does: its client is told so, and nothing of it is kept."""
    held = Held(Collections._check_new)
    monkeypatch.setattr(Collections, "_check_new", lambda *args: held(*args))
    config = config_of(tmp_path, tmp_path / "state", grace_s=0.1)
    with Running(config, GatedRuntime().load) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{running.addresses.http}/v1/collections/late/items", json=ITEMS, timeout=60)
        assert held.begun.wait(60)
        running.leave()
        assert asked.result().status_code == 503
        held.go.set()
    with Running(config, GatedRuntime().load) as running:
        assert httpx.get(f"{running.addresses.http}/v1/collections").json() == {"collections": []}


def test_a_load_that_was_accepted_is_finished_and_answered(tmp_path):
    runtime = GatedRuntime()
    held = Held(runtime.load)
    held.go.set()
    with Running(config_of(tmp_path, tmp_path / "state"), held) as running, ThreadPoolExecutor(2) as pool:
        for load in (load_by_http, load_by_grpc):
            held.begun.clear(), held.go.clear()
            asked = pool.submit(load, running)
            assert held.begun.wait(60)
            if load is load_by_grpc:
                running.leave()
                time.sleep(3)
            assert not asked.done()
            held.go.set()
            assert asked.result() is None


def load_by_http(running):
    httpx.post(f"{running.addresses.http}/v2/repository/models/backbone/load", timeout=60).raise_for_status()


def load_by_grpc(running):
    with grpc_client.InferenceServerClient(running.addresses.grpc) as client:
        client.load_model("backbone")


def test_what_comes_too_late_is_refused_and_not_done(gated, tmp_path):
    """One request keeps the server; others come, or come to their end, after it began to leave."""
    running, runtime = gated
    file_of_one_item(running)
    text = json.dumps(ITEMS).encode()
    head = f"POST /v1/collections/late/items HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    host, port = running.addresses.http.removeprefix("http://").split(":")
    runtime.gate.clear()
    with (
        ThreadPoolExecutor(1) as pool,
        socket.create_connection((host, int(port)), 60) as half,
        httpx.Client(base_url=running.addresses.http) as http,
        grpc_client.InferenceServerClient(running.addresses.grpc) as client,
    ):
        half.sendall(head.encode() + text[:-1])
        http.get("/v2/health/live").raise_for_status()
        client.is_server_live()
        kept = pool.submit(ask, running, 0)
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 1)
        running.leave()
        wait_for(lambda: http.delete("/v1/collections/nothing").status_code == 503)
        half.sendall(text[-1:])
        assert half.recv(4096)[9:12] == b"503"
        assert http.delete("/v1/collections/first").status_code == 503
        assert http.post("/v2/repository/models/knn/unload").status_code == 503
        for late in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="shutting down"):
                late("knn")
        assert http.get("/v2/health/live").status_code == 200
        assert [one["name"] for one in http.get("/v1/collections").json()["collections"]] == ["first"]
        runtime.gate.set()
        assert kept.result() < 1e-6


def test_connections_that_do_not_close_do_not_keep_the_server(gated, monkeypatch):
    """As those of clients that take nothing of their replies, which gRPC minds for half a minute and more."""
    running, _ = gated

    async def stop(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr(grpc.aio._server.Server, "stop", stop)
    running.leave()
    wait_for(lambda: not running._thread.is_alive())
