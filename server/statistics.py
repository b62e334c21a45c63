"""What the server counts: per model in Triton's terms, and as Prometheus text.

Triton's `nv_*` names stand where the meaning is equal, so that its dashboards carry over; what Triton does not count is
named `dinoscope_*`. Durations of `nv_*` are microseconds, summed over requests; those of `dinoscope_*` are seconds.
"""

import copy
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from server.batcher import Answer, Execution

REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
"""Of a request, as Triton's statistics tell them apart."""


@dataclass
class Stage:
    """How often something happened, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def since(self, earlier: "Stage") -> "Stage":
        """What was added since then."""
        return Stage(self.count - earlier.count, self.ns - earlier.ns)


@dataclass
class Times:
    """Where one request spent its time, in ns; filled on its way through a model."""

    input_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    executions: list[Execution] = field(default_factory=list)
    begun: Callable[[], None] | None = None
    """Called when the network begins with the request."""

    def add(self, answer: Answer) -> None:
        """Account for one trip through the batcher."""
        self.queue_ns += answer.queue_ns
        self.infer_ns += sum(execution.run_ns for execution in answer.executions)
        self.executions.extend(answer.executions)


@dataclass
class ModelCounts:
    """The counters of one version of a served model, over its loads."""

    rows: int = 0
    executions: int = 0
    pending: int = 0
    """Requests that were accepted and wait: for their images to be decoded, or for the network."""
    last_inference_ms: int = 0
    success: Stage = field(default_factory=Stage)
    fail: Stage = field(default_factory=Stage)
    queue: Stage = field(default_factory=Stage)
    compute_input: Stage = field(default_factory=Stage)
    compute_infer: Stage = field(default_factory=Stage)
    compute_output: Stage = field(default_factory=Stage)
    failures: Tally[str] = field(default_factory=Tally)
    batches: dict[int, Stage] = field(default_factory=dict)
    """Runs of the network by batch size. One that several requests share counts once; one that several models share
    counts for each of them."""
    _at_load: "ModelCounts | None" = None

    def load(self) -> None:
        """The version is loaded once more: in Triton its statistics then begin at zero, and its `nv_*` run on."""
        self._at_load = None
        self._at_load = copy.deepcopy(self)

    def since_load(self) -> "ModelCounts":
        """What was answered, and how long it took, since then."""
        earlier = self._at_load
        if earlier is None:
            return self
        stages = {name: getattr(self, name).since(getattr(earlier, name)) for name in STAGES}
        batches = {rows: stage.since(earlier.batches.get(rows, Stage())) for rows, stage in self.batches.items()}
        return ModelCounts(
            rows=self.rows - earlier.rows,
            executions=self.executions - earlier.executions,
            last_inference_ms=self.last_inference_ms if stages["success"].count else 0,
            batches={rows: stage for rows, stage in batches.items() if stage.count},
            **stages,
        )

    def succeed(self, model: str, rows: int, total_ns: int, times: Times) -> None:
        """Count an answered request of `rows` rows."""
        self.rows += rows
        self.last_inference_ms = int(time.time() * 1000)
        self.success.add(total_ns)
        self.queue.add(times.queue_ns)
        self.compute_input.add(times.input_ns)
        self.compute_infer.add(times.infer_ns)
        self.compute_output.add(times.output_ns)
        for execution in times.executions:
            if execution.first_count(model):
                self.executions += 1
                self.batches.setdefault(execution.batch_rows, Stage()).add(execution.run_ns)

    def failed(self, reason: str, total_ns: int) -> None:
        """Count a request that was not answered."""
        self.fail.add(total_ns)
        self.failures[reason] += 1


class Histogram(Collector):
    """A histogram for each value of at most one label, filled by the event loop alone.

    That of Prometheus' client takes locks, and goes through its buckets, for each number: on four of them more than a request's checks.
    """

    def __init__(self, name: str, documentation: str, bounds: Sequence[float], label: str = "") -> None:
        self._name, self._documentation, self._bounds, self._label = name, documentation, tuple(bounds), label
        self._filled: dict[str, tuple[list[int], list[float]]] = {} if label else {"": self._empty()}

    def _empty(self) -> tuple[list[int], list[float]]:
        return [0] * (len(self._bounds) + 1), [0.0]

    def observe(self, value: float, of: str = "") -> None:
        """Count a value, under this value of the label."""
        found = self._filled.get(of)
        if found is None:
            found = self._filled[of] = self._empty()
        counts, total = found
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As the registry wants it."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label] if self._label else [])
        edges = [*map(str, map(float, self._bounds)), "+Inf"]
        for of, (counts, total) in self._filled.items():
            below = zip(edges, accumulate(counts), strict=True)
            family.add_metric([of] if self._label else [], list(below), total[0])
        yield family


class Metrics:
    """The Prometheus side: histograms of this server, and the counters above rendered as `nv_*`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.request_s = Histogram("dinoscope_request_seconds", "Answered requests", seconds, "model")
        self.queue_s = Histogram("dinoscope_queue_seconds", "Wait for an instance", seconds, "model")
        self.decode_s = Histogram("dinoscope_decode_seconds", "Decode and preprocess", seconds, "model")
        self.batch_rows = Histogram(
            "dinoscope_batch_rows", "Rows per run of the network, weighted by requests in it", [2**n for n in range(8)]
        )
        self.loop_lag_s = Histogram("dinoscope_event_loop_lag_seconds", "How late the event loop was", seconds)
        for one in (self.request_s, self.queue_s, self.decode_s, self.batch_rows, self.loop_lag_s):
            self.registry.register(one)
        self.errors = Counter(
            "dinoscope_errors",
            "Requests that were not answered",
            ["model", "code"],
            registry=self.registry,
        )

    def gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Show a number that something else keeps."""
        Gauge(name, documentation, registry=self.registry).set_function(read)

    def observe(self, model: str, total_ns: int, times: Times) -> None:
        """Put one answered request into the histograms."""
        self.request_s.observe(total_ns / 1e9, model)
        self.queue_s.observe(times.queue_ns / 1e9, model)
        self.decode_s.observe(times.input_ns / 1e9, model)
        for execution in times.executions:
            self.batch_rows.observe(execution.batch_rows)

    def exposition(self, counts: Mapping[tuple[str, str], ModelCounts]) -> bytes:
        """The page that Prometheus reads. `counts` is keyed by (model, version)."""
        return generate_latest(self.registry) + "\n".join([*_triton_lines(counts), ""]).encode()


def _triton_lines(counts: Mapping[tuple[str, str], ModelCounts]) -> Iterable[str]:
    """Triton's own names; written by hand because the client library would append `_total` to each."""
    for name, kind, text, read in _TRITON:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
        for (model, version), count in counts.items():
            yield f'{name}{{model="{model}",version="{version}"}} {read(count)}'
    name = "nv_inference_request_failure"
    yield f"# HELP {name} Failed requests by reason"
    yield f"# TYPE {name} counter"
    for (model, version), count in counts.items():
        for reason in REASONS:
            yield f'{name}{{model="{model}",version="{version}",reason="{reason}"}} {count.failures[reason]}'


_TRITON: tuple[tuple[str, str, str, Callable[[ModelCounts], int]], ...] = (
    ("nv_inference_request_success", "counter", "Answered requests", lambda c: c.success.count),
    ("nv_inference_count", "counter", "Answered rows", lambda c: c.rows),
    ("nv_inference_exec_count", "counter", "Runs of the network", lambda c: c.executions),
    ("nv_inference_pending_request_count", "gauge", "Accepted and not yet begun", lambda c: c.pending),
    ("nv_inference_request_duration_us", "counter", "End to end", lambda c: c.success.ns // 1000),
    ("nv_inference_queue_duration_us", "counter", "Waiting for an instance", lambda c: c.queue.ns // 1000),
    ("nv_inference_compute_input_duration_us", "counter", "Decode, preprocess", lambda c: c.compute_input.ns // 1000),
    ("nv_inference_compute_infer_duration_us", "counter", "In the network", lambda c: c.compute_infer.ns // 1000),
    ("nv_inference_compute_output_duration_us", "counter", "Making outputs", lambda c: c.compute_output.ns // 1000),
)
