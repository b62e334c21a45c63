"""Many requests at once: batches, a full queue, deadlines, callers who leave, a network that fails."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from server.admission import LEAST_CALLS
from server.collections import Collections
from server.grpc_api import STREAM_DEPTH
from server.run import Running
from tests.server.conftest import config_of
from tests.server.gate import ROWS, GatedRuntime, Held, ask, gauge, one_image, pixels, wait_for
from tests.server.images import png
from tests.server.wires import Refused, open_wire

PENDING = 'nv_inference_pending_request_count{model="backbone"'


def statistics(running):
    return httpx.get(f"{running.addresses.http}/v2/models/backbone/stats").json()["model_stats"][0]


def test_requests_that_wait_share_a_batch_and_get_their_own_answers(gated):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(ROWS) as pool:
        first = pool.submit(ask, running, 0)
        wait_for(lambda: runtime.batches == [1])
        others = [pool.submit(ask, running, seed) for seed in range(1, 8)]
        wait_for(lambda: gauge(running, "dinoscope_queue_rows") == 7)
        runtime.gate.set()
        assert max(one.result() for one in (first, *others)) < 1e-6
    assert runtime.batches == [1, 4, 3]
    counted = statistics(running)
    assert (counted["inference_count"], counted["execution_count"]) == (8, 3)
    assert {one["batch_size"]: one["compute_infer"]["count"] for one in counted["batch_stats"]} == {1: 1, 3: 1, 4: 1}


def test_pending_are_requests_that_wait_and_not_the_one_that_runs(gated):
    """As Triton counts them: what scales by it would never come down to none."""
    running, runtime = gated
    runtime.gate.clear()

    def pending():
        page = httpx.get(running.addresses.metrics).text
        return [int(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(PENDING)]

    with ThreadPoolExecutor(ROWS) as pool:
        answers = [pool.submit(ask, running, 0)]
        wait_for(lambda: runtime.batches == [1])
        assert pending() == [0]
        answers += [pool.submit(ask, running, seed) for seed in (1, 2)]
        wait_for(lambda: gauge(running, "dinoscope_queue_rows") == 2)
        assert pending() == [2]
        runtime.gate.set()
        assert max(one.result() for one in answers) < 1e-6
    assert pending() == [0]
    with pytest.raises(Refused):
        ask(running, 0, rows=ROWS + 1)
    assert pending() == [0]


def test_sizes_do_not_mix_in_a_batch(gated):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(ROWS) as pool:
        answers = [pool.submit(ask, running, 0)]
        wait_for(lambda: runtime.batches == [1])
        answers += [pool.submit(ask, running, seed, side=8 + 8 * (seed % 2)) for seed in range(1, 7)]
        wait_for(lambda: gauge(running, "dinoscope_queue_rows") == 6)
        runtime.gate.set()
        assert max(one.result() for one in answers) < 1e-6
    assert sorted(runtime.batches) == [1, 3, 3]


def test_a_request_larger_than_a_batch_is_split_and_put_together(gated):
    running, runtime = gated
    assert ask(running, 0, rows=7) < 1e-6
    assert runtime.batches == [4, 3]


def test_wires_share_batches(gated):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(ROWS) as pool:
        answers = [pool.submit(ask, running, 0)]
        wait_for(lambda: runtime.batches == [1])
        answers += [pool.submit(ask, running, seed, name=name) for seed, name in enumerate(("grpc", "http", "json"))]
        wait_for(lambda: gauge(running, "dinoscope_queue_rows") == 3)
        runtime.gate.set()
        assert max(one.result() for one in answers) < 1e-6
    assert runtime.batches == [1, 3]


def test_beyond_the_queue_clients_are_told_when_to_come_back(gated):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, running, 0, ROWS)
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == ROWS)
        body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}
        refused = httpx.post(f"{running.addresses.http}/v2/models/backbone/infer", json=body)
        assert (refused.status_code, "the queue is full" in refused.json()["error"]) == (429, True)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(Refused, match="the queue is full"):
            ask(running, 1)
        assert httpx.get(f"{running.addresses.http}/v2/health/ready").status_code == 200
        runtime.gate.set()
        assert answer.result() < 1e-6
    assert ask(running, 2) < 1e-6


def test_a_full_queue_may_speak_as_triton_does_and_liveness_never_waits_in_it(tmp_path):
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", queue_rows=1, triton_codes=True)
    with Running(config, runtime.load) as running, ThreadPoolExecutor(1) as pool:
        runtime.gate.clear()
        answer = pool.submit(ask, running, 0)
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 1)
        body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}
        refused = httpx.post(f"{running.addresses.http}/v2/models/backbone/infer", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        tensor = grpc_client.InferInput("pixels", [1, 3, 8, 8], "FP32")
        tensor.set_data_from_numpy(pixels(1))
        with grpc_client.InferenceServerClient(running.addresses.grpc) as client:
            with pytest.raises(InferenceServerException, match="the queue is full") as unavailable:
                client.infer("backbone", [tensor])
            assert unavailable.value.status() == "StatusCode.UNAVAILABLE"
            assert client.is_server_live()
            assert client.is_server_ready()
        assert httpx.get(f"{running.addresses.http}/v2/health/live", timeout=5).status_code == 200
        runtime.gate.set()
        assert answer.result() < 1e-6


@pytest.mark.parametrize("how", ["client", "parameter", "header"])
def test_a_late_request_ends_and_its_waiting_rows_are_never_computed(gated, how):
    running, runtime = gated
    runtime.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, running, 0)
        wait_for(lambda: runtime.batches == [1])
        if how == "client":
            wire = open_wire("grpc", running.addresses)
            tensor = grpc_client.InferInput("pixels", [1, 3, 8, 8], "FP32")
            tensor.set_data_from_numpy(pixels(1))
            with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
                wire.client.infer("backbone", [tensor], client_timeout=0.3)
            wire.close()
        elif how == "parameter":
            with pytest.raises(Refused) as caught:
                ask(running, 1, parameters={"timeout": 300_000})
            assert caught.value.kind == "late"
        else:
            body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}
            answer = httpx.post(
                f"{running.addresses.http}/v2/models/backbone/infer", json=body, headers={"x-timeout-ms": "300"}
            )
            assert (answer.status_code, "deadline" in answer.json()["error"]) == (504, True)
        wait_for(lambda: gauge(running, "dinoscope_queue_rows") == 0)
        runtime.gate.set()
        first.result()
    assert ask(running, 2) < 1e-6
    assert runtime.batches == [1, 1]


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_rows_of_a_caller_who_left_are_never_computed(gated, wire):
    running, runtime = gated
    runtime.gate.clear()

    async def leave_over_grpc():
        async with grpc.aio.insecure_channel(running.addresses.grpc) as channel:
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(one_image())
            await asyncio.sleep(0)
            while await asyncio.to_thread(gauge, running, "dinoscope_queue_rows") < 1:
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.sleep(0.05)

    def leave_over_http():
        body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.addresses.http}/v2/models/backbone/infer", json=body, timeout=0.5)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, running, 0)
        wait_for(lambda: runtime.batches == [1])
        if wire == "grpc":
            asyncio.run(leave_over_grpc())
        else:
            leave_over_http()
        wait_for(lambda: gauge(running, "dinoscope_cancelled_rows") == 1)
        assert gauge(running, "dinoscope_admitted_rows") == 1
        runtime.gate.set()
        first.result()
    assert runtime.batches == [1]
    failures = httpx.get(running.addresses.metrics).text
    assert 'nv_inference_request_failure{model="backbone",version="1",reason="CANCELED"} 1' in failures


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_a_failure_of_the_network_hides_its_words_and_passes(gated, wire):
    running, runtime = gated
    runtime.fails = True
    with pytest.raises(Refused) as caught:
        ask(running, 0, name=wire)
    assert caught.value.kind in ("StatusCode.INTERNAL", "500")
    assert "secret" not in caught.value.line
    assert "under id" in caught.value.line
    runtime.fails = False
    assert ask(running, 1, name=wire) < 1e-6


def test_of_a_stream_that_is_broken_off_nothing_stays_inside(tmp_path):
    runtime = GatedRuntime()
    with Running(config_of(tmp_path, tmp_path / "state"), runtime.load) as running:
        runtime.gate.clear()
        with grpc_client.InferenceServerClient(running.addresses.grpc) as client:
            client.start_stream(lambda result, error: None)
            pixels = grpc_client.InferInput("pixels", [1, 3, 32, 32], "FP32")
            pixels.set_data_from_numpy(np.zeros((1, 3, 32, 32), np.float32))
            for _ in range(30):
                client.async_stream_infer("backbone", [pixels])
            # Those that wait for their turn to be told, the one that is told next, and the one that waits for a place among them.
            wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == STREAM_DEPTH + 2)
            client.stop_stream(cancel_requests=True)
            wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 0)
        runtime.gate.set()


def test_images_wait_for_no_write_and_no_file_of_a_collection(tmp_path, monkeypatch):
    runtime = GatedRuntime()
    config = config_of(tmp_path, tmp_path / "state", decode_threads=1)
    with Running(config, runtime.load) as running, ThreadPoolExecutor(8) as pool:
        items = {"items": [{"embedding": [1.0, 2.0, 3.0]}]}
        at = f"{running.addresses.http}/v1/collections/birds"
        httpx.post(f"{at}/items", json=items).raise_for_status()
        file = httpx.get(f"{at}/export?format=parquet").content
        held = {name: Held(getattr(Collections, name)) for name in ("add", "exported")}
        for name, one in held.items():
            monkeypatch.setattr(Collections, name, lambda *args, one=one: one(*args))
        asked = [pool.submit(httpx.post, f"{at}/items", json=items, timeout=60) for _ in range(2)]
        asked += [pool.submit(httpx.get, f"{at}/export", timeout=60) for _ in range(2)]
        asked += [pool.submit(httpx.post, f"{at}-2/import", content=file, timeout=60)]
        assert held["add"].begun.wait(60)
        image = {"file": ("a.png", png(0), "image/png")}
        assert httpx.post(f"{running.addresses.http}/v1/embeddings", files=image, timeout=60).status_code == 200
        assert httpx.get(f"{at}/items").json()["items"]
        assert not any(one.done() for one in asked)
        for one in held.values():
            one.go.set()
        assert [one.result().status_code for one in asked] == [201, 201, 200, 200, 201]


def silence(over):
    """The requests of a client that says nothing and stays."""
    over.wait()
    yield from ()


def test_a_flood_of_calls_is_refused_before_it_is_read_and_health_is_not(gated):
    """All of them open and unanswered at once; those beyond the bound are told so, and none of the calls is counted for ever."""
    running, runtime = gated
    runtime.gate.clear()
    request, over = one_image(), threading.Event()
    with grpc.insecure_channel(running.addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        silent = [stub.ModelStreamInfer(silence(over)) for _ in range(LEAST_CALLS // 2)]
        wait_for(lambda: gauge(running, "dinoscope_calls") == len(silent))
        another = stub.ModelStreamInfer(silence(over))
        assert (another.code(), another.details()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{len(silent)} streams are open, and more are not taken at once; try again later",
        )
        unary = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        silent += [unary.future(silence(over)) for _ in range(LEAST_CALLS - ROWS - len(silent))]
        wait_for(lambda: gauge(running, "dinoscope_calls") == len(silent))
        asked = [stub.ModelInfer.future(request) for _ in range(ROWS)]
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == ROWS)
        flood = [stub.ModelInfer.future(request) for _ in range(500)]
        refused = {(call.code(), "calls are being answered" in call.details()) for call in flood}
        assert refused == {(grpc.StatusCode.RESOURCE_EXHAUSTED, True)}
        assert dict(flood[0].trailing_metadata())["retry-after"].isdigit()
        assert httpx.get(f"{running.addresses.http}/v2/models/backbone").status_code == 200
        assert httpx.get(f"{running.addresses.http}/v2/health/live").status_code == 200
        assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        for call in (*silent, *asked[::2]):
            call.cancel()
        wait_for(lambda: gauge(running, "dinoscope_calls") == ROWS / 2)
        runtime.gate.set()
        assert {call.code() for call in asked[1::2]} == {grpc.StatusCode.OK}
        wait_for(lambda: gauge(running, "dinoscope_calls") == 0)
        over.set()


def test_a_storm_of_cancelled_calls_computes_nothing_and_leaves_nothing(gated):
    running, runtime = gated
    runtime.gate.clear()
    request, threads = one_image(), threading.active_count()
    with ThreadPoolExecutor(1) as pool, grpc.insecure_channel(running.addresses.grpc) as channel:
        first = pool.submit(ask, running, 0)
        wait_for(lambda: runtime.batches == [1])
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(60):
            storm = [stub.ModelInfer.future(request) for _ in range(5)]
            for call in storm:
                call.cancel()
        wait_for(lambda: gauge(running, "dinoscope_calls") == 1)
        assert (gauge(running, "dinoscope_admitted_rows"), gauge(running, "dinoscope_queue_rows")) == (1, 0)
        assert threading.active_count() < threads + 20, "ours and the server's"
        runtime.gate.set()
        assert first.result() < 1e-6
    assert ask(running, 2) < 1e-6
    assert runtime.batches == [1, 1]


def test_a_store_that_stalls_keeps_nobodys_images_waiting(gated, monkeypatch):
    """More listings and searches than there are threads that decode."""
    running, _ = gated
    held = Held(lambda *_: [])
    for name in ("infos", "snapshot"):
        monkeypatch.setattr(Collections, name, lambda *args: held(*args))
    at = running.addresses.http
    image = {"content": png(0), "headers": {"content-type": "image/png"}, "timeout": 60}
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            pool.submit(httpx.get, f"{at}/v1/collections", timeout=60)
            pool.submit(httpx.post, f"{at}/v1/collections/any/search", **image)
        assert held.begun.wait(60)
        wait_for(lambda: gauge(running, "dinoscope_admitted_rows") == 3)
        try:
            assert httpx.post(f"{at}/v1/embeddings", **image).status_code == 200
        finally:
            held.go.set()
