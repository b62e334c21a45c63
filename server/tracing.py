"""Requests as OpenTelemetry traces: a span each, with decode, queue, compute and output below it.

An extra (`[otel]`), switched on by --traces. The spans are made when a request has ended, from the times that are taken anyway, so that
a server without it does nothing more. Where spans go is said by OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_ENDPOINT.
"""

from contextvars import ContextVar
from typing import Any

from data.errors import InputError
from server.requests import InferRequest
from server.statistics import Times

parent: ContextVar[str] = ContextVar("traceparent", default="")
"""The header `traceparent` of the request at hand: the span of the caller that this one belongs to."""


class Tracing:
    """Makes spans with a provider of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("dinoscope.server")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: InferRequest, rows: int, code: str, ended_ns: int, total_ns: int, times: Times) -> None:
        """One request that has ended; `ended_ns` is the time of day."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        began_ns = ended_ns - total_ns
        about = {
            "request.id": request.id,
            "model.name": request.model[:80],
            "rows": rows,
            "protocol": request.protocol,
            "code": code,
            "batch.rows": [execution.batch_rows for execution in times.executions],
        }
        caller = self._propagator.extract({"traceparent": parent.get()})
        span = self._tracer.start_span("infer", caller, SpanKind.SERVER, about, start_time=began_ns)
        inside, at_ns = set_span_in_context(span), began_ns
        stages = {
            "decode": times.input_ns,
            "queue": times.queue_ns,
            "compute": times.infer_ns,
            "output": times.output_ns,
        }
        for name, took_ns in stages.items():
            if took_ns:
                self._tracer.start_span(name, inside, start_time=at_ns).end(at_ns + took_ns)
                at_ns += took_ns
        if code != "OK":
            span.set_status(StatusCode.ERROR, code)
        span.end(ended_ns)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def open_tracing() -> Tracing:
    """Spans by OTLP over HTTP. Raises InputError where the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(
            f"--traces: OpenTelemetry is not installed ({error}); pip install 'dinoscope[otel]', or leave it out"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "dinoscope"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
