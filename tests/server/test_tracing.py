"""Traces of requests, read from OpenTelemetry's in-memory exporter, and from what a collector is sent."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import server.run
from data.errors import InputError
from server.run import Running
from server.tracing import Tracing, open_tracing
from tests.server.conftest import config_of
from tests.server.images import png
from tests.server.wires import images, open_wire

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(server.run, "open_tracing", lambda: Tracing(provider))
    return exporter


def test_a_request_is_a_span_with_its_stages_below_it_and_its_caller_above(network, tmp_path, spans):
    with Running(config_of(network, tmp_path, traces=True)) as running:
        headers = {"x-request-id": "mine-1", "traceparent": CALLER}
        http = running.addresses.http
        httpx.post(f"{http}/v1/embeddings", files={"file": png(0)}, headers=headers).raise_for_status()
        first = {span.name: span for span in spans.get_finished_spans()}
        spans.clear()
        wire = open_wire("grpc", running.addresses)
        wire.infer("attention", images(png(1), png(2)))
        second = {span.name: span for span in spans.get_finished_spans()}
        wire.close()
        spans.clear()
        assert httpx.post(f"{http}/v1/embeddings", files={"file": b"no image"}).status_code == 400
        (failed,) = [span for span in spans.get_finished_spans() if span.name == "infer"]
    root = first["infer"]
    assert set(first) >= {"infer", "decode", "queue", "compute"}
    about = {
        "request.id": "mine-1",
        "model.name": "embedding",
        "rows": 1,
        "protocol": "rest",
        "code": "OK",
        "batch.rows": (1,),
    }
    assert dict(root.attributes) == about
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]
    for name in ("decode", "queue", "compute"):
        assert first[name].parent.span_id == root.context.span_id
        assert root.start_time <= first[name].start_time <= first[name].end_time <= root.end_time
    assert first["decode"].end_time <= first["queue"].start_time <= first["compute"].start_time
    assert (second["infer"].attributes["protocol"], second["infer"].attributes["rows"]) == ("grpc", 2)
    assert second["infer"].parent is None
    assert (failed.status.status_code, failed.attributes["code"]) == (StatusCode.ERROR, "INVALID_ARGUMENT")


@pytest.fixture
def collector(monkeypatch):
    """What a collector gets: an endpoint that reads OTLP over HTTP, and its requests."""
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, self.headers["x-tenant"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listener.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mine")
        yield got
        listener.shutdown()


def test_a_collector_is_sent_every_span_before_the_server_ends(network, tmp_path, collector):
    with Running(config_of(network, tmp_path, traces=True)) as running:
        for number in range(3):
            headers = {"x-request-id": f"mine-{number}", "traceparent": CALLER}
            url = f"{running.addresses.http}/v1/embeddings"
            httpx.post(url, files={"file": png(number)}, headers=headers).raise_for_status()
    assert {(path, tenant) for path, tenant, _ in collector} == {("/v1/traces", "mine")}
    resources = [one for _, _, request in collector for one in request.resource_spans]
    assert {a.value.string_value for one in resources for a in one.resource.attributes if a.key == "service.name"} == {
        "dinoscope"
    }
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    roots = [span for span in spans if span.name == "infer"]
    ids = [a.value.string_value for span in roots for a in span.attributes if a.key == "request.id"]
    assert ids == ["mine-0", "mine-1", "mine-2"]
    assert {span.trace_id.hex() for span in spans} == {CALLER.split("-")[1]}
    assert {span.parent_span_id.hex() for span in roots} == {CALLER.split("-")[2]}
    for root in roots:
        below = {span.name for span in spans if span.parent_span_id == root.span_id}
        assert {"decode", "queue", "compute"} <= below
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)


def test_a_collector_that_is_not_there_holds_nobody_up(network, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with Running(config_of(network, tmp_path, traces=True)) as running:
        url = f"{running.addresses.http}/v1/embeddings"
        httpx.post(url, files={"file": png(0)}, timeout=30).raise_for_status()


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match="dinoscope\\[otel\\]"):
        open_tracing()


def test_a_server_without_traces_loads_nothing_of_it():
    """Asked of a fresh interpreter, in which no test has imported it."""
    import subprocess

    code = "import sys, server.run; print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
