"""What requests and replies may hold: bodies, what they unpack to, gRPC's messages, replies that nobody takes; clients that stall."""

import contextlib
import gzip
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2_grpc

from server import grpc_calls, http_body
from server.grpc_calls import Messages
from server.http_body import Guard
from server.patience import PatientProtocol
from server.run import Running
from tests.server.conftest import config_of
from tests.server.gate import GatedRuntime, ask, gauge, one_image, wait_for
from tests.server.http2 import TAKE_NOTHING, frame, send_call
from tests.server.images import png


def test_a_client_that_stalls_is_let_go_of_and_one_that_waits_for_its_answer_is_not(gated, monkeypatch):
    running, runtime = gated
    monkeypatch.setattr(PatientProtocol, "head_s", 0.5)
    monkeypatch.setattr(Guard, "body_s", 0.5)
    host, port = running.addresses.http.removeprefix("http://").split(":")
    whole = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /v2/models/backbone/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    runtime.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, running, 0, name="http")
        for data, status in ((b"", b""), (head[:20], b""), (whole + head[:20], b"200"), (head, b"408")):
            with socket.create_connection((host, int(port)), 30) as one:
                one.sendall(data)
                said = b"".join(iter(lambda one=one: one.recv(4096), b""))
                assert said[9:12] == status
        assert not waits.done()
        runtime.gate.set()
        assert waits.result() < 1e-6


def test_a_body_that_comes_by_a_trickle_is_given_up_and_a_slow_one_is_not(gated, monkeypatch):
    running, _ = gated
    monkeypatch.setattr(Guard, "body_s", 1.0)
    monkeypatch.setattr(http_body, "LEAST_BYTES", 1 << 10)
    host, port = running.addresses.http.removeprefix("http://").split(":")
    head = b"POST /v2/models/backbone/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n"
    for nbytes, status, told in ((500, b"400", b"not JSON"), (20, b"408", b"less than 1 KB of the body came in 1 s")):
        with socket.create_connection((host, int(port)), 30) as one:
            one.sendall(head)
            for _ in range(10_000 // nbytes):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    one.sendall(b"{" * nbytes)
                if select.select([one], [], [], 0.05)[0]:
                    break
            said = one.recv(4096)
            assert (said[9:12], told in said) == (status, True), said


def test_the_rest_of_a_request_that_is_answered_already_is_not_waited_for_without_end(gated, monkeypatch):
    """Whoever is refused at once, even for want of a token, could otherwise keep a connection for as long as it likes."""
    running, _ = gated
    monkeypatch.setattr(PatientProtocol, "head_s", 0.5)
    host, port = running.addresses.http.removeprefix("http://").split(":")
    head = b"POST /v2/models/nothing/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection((host, int(port)), 5) as one:
        one.sendall(head + b"{")
        assert one.recv(4096)[9:12] == b"404"
        one.sendall(b"{")
        assert one.recv(4096) == b"", "it sent a little more, and was silent"
    with socket.create_connection((host, int(port)), 5) as one:
        one.sendall(head + b"{")
        assert one.recv(4096)[9:12] == b"404"
        one.sendall(b"{" * 8 + head.replace(b": 9", b": 0"))
        assert one.recv(4096)[9:12] == b"404", "what comes whole leaves its connection open"


def test_bodies_that_are_being_read_are_bounded_together_and_one_alone_is_not(tmp_path):
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", queue_mb=1, max_message_mb=4)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 3000000\r\n\r\n"
    with Running(config, runtime.load) as running:
        host, port = running.addresses.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as first:
            first.sendall(head + bytes(2_500_000))
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 2_500_000)
            busy = httpx.post(
                f"{running.addresses.http}/v1/embeddings", content=b"x", headers={"content-type": "image/png"}
            )
            assert (busy.status_code, busy.headers["retry-after"], "are being read" in busy.text) == (429, "1", True)
            first.sendall(bytes(500_000))
            assert first.recv(4096)[9:12] == b"413", "it was read whole, and only then found too large for the queue"
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
        with socket.create_connection((host, int(port)), 30) as vanishing:
            vanishing.sendall(head + bytes(2_500_000))
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 2_500_000)
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)


def test_what_a_body_unpacks_to_counts_among_the_bytes_while_it_is_unpacked(tmp_path):
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", queue_mb=1, max_message_mb=4)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 3000000\r\n\r\n"
    packed = {"content": gzip.compress(bytes(3_000_000)), "headers": {"content-encoding": "gzip"}}
    with Running(config, runtime.load) as running:
        address = f"{running.addresses.http}/v2/models/backbone/infer"
        host, port = running.addresses.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as other:
            other.sendall(head + bytes(500_000))
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 500_000)
            busy = httpx.post(address, **packed)
            assert (busy.status_code, busy.headers["retry-after"], "are being read" in busy.text) == (429, "1", True)
            assert gauge(running, "dinoscope_body_bytes") == 500_000
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
        alone = httpx.post(address, **packed)
        assert (alone.status_code, "not JSON" in alone.text) == (400, True)
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)


def test_messages_of_grpc_count_among_the_bytes_and_are_not_read_while_those_fill_the_queue(tmp_path):
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", queue_mb=1, max_message_mb=4)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 3000000\r\n\r\n"
    with Running(config, runtime.load) as running, grpc.insecure_channel(running.addresses.grpc) as channel:
        stub, health = service_pb2_grpc.GRPCInferenceServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        runtime.gate.clear()
        waiting = stub.ModelInfer.future(one_image())
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == one_image().ByteSize())
        runtime.gate.set()
        waiting.result(30)
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
        host, port = running.addresses.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as slow:
            slow.sendall(head + bytes(2_500_000))
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 2_500_000)
            with pytest.raises(grpc.RpcError, match="are being read") as caught:
                stub.ModelInfer(one_image(), timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status
        wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
        stub.ModelInfer(one_image(), timeout=30)


def begun_call(address):
    """One whose message does not come whole."""
    one = send_call(address, "ModelInfer", b"some", 1000)
    return one, lambda: one.sendall(frame(0, 0, 1, b"x"))


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_reply_that_its_grpc_client_does_not_take_counts_until_the_client_is_gone(gated, monkeypatch, method):
    running, _ = gated
    monkeypatch.setattr(grpc_calls, "REPLY_BYTES", 50)  # of which a reply of the network has more
    sent = one_image().SerializeToString()
    with send_call(running.addresses.grpc, method, sent, settings=TAKE_NOTHING):
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 0 and gauge(running, "dinoscope_body_bytes") > 50)
        with send_call(running.addresses.grpc, method, sent, settings=TAKE_NOTHING):
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") > 100)
        wait_for(lambda: gauge(running, "dinoscope_calls") == 1)
        assert 50 < gauge(running, "dinoscope_body_bytes") < 200
        assert ask(running, 1) < 1e-6
    wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
    assert gauge(running, "dinoscope_calls") == 0


def test_a_grpc_call_whose_message_does_not_come_is_ended_and_leaves_its_place_to_others(gated, monkeypatch):
    """Silent, or with a byte now and then; a call that waits for its answer and a stream that says nothing are not ended."""
    running, runtime = gated
    monkeypatch.setattr(Messages, "whole_s", 1.0)
    runtime.gate.clear()
    over = threading.Event()

    def silence():
        over.wait()
        yield from ()

    with grpc.insecure_channel(running.addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        waits, idle = stub.ModelInfer.future(one_image()), stub.ModelStreamInfer(silence())
        methods = ["inference.GRPCInferenceService/ModelInfer", "inference.GRPCInferenceService/ServerLive"]
        silent = [channel.stream_unary(f"/{method}").future(silence()) for method in methods]
        slow, trickle = begun_call(running.addresses.grpc)
        wait_for(lambda: gauge(running, "dinoscope_calls") == 4)
        for call in silent:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert call.details() == "the request did not come whole within 1 s; send fewer images at a time"
        with slow, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while gauge(running, "dinoscope_calls") > 2:
                trickle()
                time.sleep(0.1)
        assert (waits.done(), idle.done()) == (False, False)
        runtime.gate.set()
        assert waits.result(30).outputs
        over.set()
        assert list(idle) == []
        wait_for(lambda: gauge(running, "dinoscope_calls") == 0)


def test_a_grpc_call_that_ends_without_a_message_is_told_so(gated):
    with grpc.insecure_channel(gated[0].addresses.grpc) as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ServerLive").future(iter(()), timeout=30)
        assert (call.code(), call.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the call has no message; send one")


LONG = 16 << 20
"""More of a reply than two sockets hold."""


@pytest.fixture
def long_reply(tmp_path, monkeypatch):
    """A server that takes 4 MB at a time and lists 16 MB, and a client that has asked for them and reads nothing."""
    config = config_of(tmp_path, tmp_path / "state", queue_mb=4)
    with Running(config, GatedRuntime().load) as running:
        at = running.addresses.http
        items = [
            {"id": str(n), "embedding": [1.0] * 3, "metadata": {"text": "x" * (1 << 20)}} for n in range(LONG >> 20)
        ]
        for one in items:
            httpx.post(f"{at}/v1/collections/long/items", json={"items": [one]}, timeout=60).raise_for_status()
        host, port = at.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as silent:
            silent.sendall(b"GET /v1/collections/long/items HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            wait_for(lambda: gauge(running, "dinoscope_body_bytes") > LONG)
            yield running, silent


def test_a_reply_that_its_client_does_not_take_counts_until_it_does(long_reply):
    running, silent = long_reply
    at = running.addresses.http
    image = {"content": png(0), "headers": {"content-type": "image/png"}}
    assert httpx.post(f"{at}/v1/embeddings", **image).status_code == 429
    assert httpx.get(f"{at}/v1/collections/long/export").status_code == 429
    assert httpx.get(f"{at}/v2/health/ready").status_code == 200
    with silent.makefile("rb") as stream:
        head, _, body = stream.read().partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    assert [len(one["metadata"]["text"]) for one in json.loads(body)["items"]] == [1 << 20] * 16
    wait_for(lambda: gauge(running, "dinoscope_body_bytes") == 0)
    assert httpx.post(f"{at}/v1/embeddings", **image).status_code == 200


def test_a_server_that_leaves_gives_a_slow_client_its_whole_reply(long_reply):
    running, silent = long_reply
    running.leave()
    time.sleep(3)  # longer than replies have once nothing is at work
    with silent.makefile("rb") as stream:
        assert len(stream.read()) > LONG


def test_a_client_that_takes_nothing_is_given_up(long_reply, monkeypatch, caplog):
    running, silent = long_reply
    monkeypatch.setattr(PatientProtocol, "reply_s", 2.0)
    httpx.get(f"{running.addresses.http}/v2/health/live").raise_for_status()
    another = socket.create_connection(silent.getpeername(), 60)
    another.sendall(b"GET /v1/collections/long/items HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: gauge(running, "dinoscope_body_bytes") > 2 * LONG)
    wait_for(lambda: gauge(running, "dinoscope_body_bytes") < 2 * LONG)
    with another.makefile("rb") as stream, contextlib.suppress(ConnectionResetError):
        assert len(stream.read()) < LONG
    another.close()
    assert "Traceback" not in caplog.text


@pytest.fixture
def narrow(monkeypatch):
    """Connections of a server and of a client that hold little themselves, so that the server sees each byte that is taken."""

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        wide(self, transport)

    def connect(address):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        one.settimeout(30)
        one.connect(address)
        return one

    wide = PatientProtocol.connection_made
    monkeypatch.setattr(PatientProtocol, "connection_made", connection_made)
    return connect


def test_a_client_that_takes_a_reply_by_a_trickle_is_given_up_and_a_slow_one_is_not(long_reply, narrow, monkeypatch):
    running, silent = long_reply
    monkeypatch.setattr(PatientProtocol, "reply_s", 2.0)
    with narrow(silent.getpeername()) as one:
        one.sendall(b"GET /v1/collections/long/items HTTP/1.1\r\nHost: x\r\n\r\n")
        began, taken = time.monotonic(), 0
        while (slow_s := time.monotonic() - began) < 5:
            if taken < 1e6 * slow_s:
                taken += len(one.recv(4096))
            else:
                time.sleep(0.001)
        assert gauge(running, "dinoscope_body_bytes") > 2 * LONG, "it took a megabyte a second"
        with contextlib.suppress(ConnectionResetError):
            while time.monotonic() - began < 10 and one.recv(4096):
                time.sleep(0.05)
        assert time.monotonic() - began < 10
    wait_for(lambda: gauge(running, "dinoscope_body_bytes") < 2 * LONG)


def test_last_replies_that_their_client_does_not_take_keep_no_connection(gated, narrow, monkeypatch):
    """Short ones, of which the server would hold more: a connection does not close before all is taken."""
    running, _ = gated
    monkeypatch.setattr(PatientProtocol, "reply_s", 0.5)
    host, port = running.addresses.http.removeprefix("http://").split(":")
    page, ask = len(httpx.get(f"{running.addresses.http}/docs").content), b"GET /docs HTTP/1.1\r\nHost: x\r\n"
    with narrow((host, int(port))) as one, contextlib.suppress(ConnectionResetError):
        one.sendall((ask + b"\r\n") * 19 + ask + b"Connection: close\r\n\r\n")
        time.sleep(1.5)
        assert len(b"".join(iter(lambda: one.recv(65_536), b""))) < 20 * page
