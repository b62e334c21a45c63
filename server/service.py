"""A request, whichever wire it came by -> a reply: checks, admission, deadline, model, counters, log line.

This is the one way in. gRPC, the v2 REST routes and the routes for people all build an InferRequest and call
`Service.infer`; what a request may cost and how its failure is counted is decided here and nowhere else.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np

from data.errors import InputError
from server.access import Rates, client
from server.admission import Admission, AdmissionSpec, accepted
from server.collections import Collections
from server.engine import Engine
from server.errors import Draining, EngineFailed, Expired, NotFound, ServerError, TooLarge, outcome
from server.formats import Formatted, formatted
from server.models import ServedModel, make_models
from server.requests import (
    InferReply,
    InferRequest,
    checked_inputs,
    chosen_formats,
    size_bytes,
    timeout_of,
    wanted_outputs,
)
from server.shared_memory import SharedMemory
from server.statistics import Metrics, ModelCounts, Times
from server.tensors import TensorSpec, to_raw
from server.tracing import Tracing

log = logging.getLogger("server")
T = TypeVar("T")

CLOSE_S = 5.0
LARGE_BYTES = 1 << 20
"""From here on a request's numbers are read off the event loop."""

_UNLIMITED = contextlib.nullcontext()
NAME = "dinoscope"
VERSION = "0.1.0"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "system_shared_memory",
    "statistics",
    "model_configuration",
    "model_repository",
    "schedule_policy",
)


class Service:
    """All served models of one engine."""

    def __init__(
        self,
        engine: Engine,
        collections: Collections,
        admission: AdmissionSpec,
        version: str = "1",
        depth_unit: str | None = None,
        classes: Sequence[str] = (),
        labels: Sequence[str] = (),
        rates: Rates | None = None,
        shared_memory: SharedMemory | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.admission = Admission(admission)
        self.rates = rates or Rates(None)
        self.shared_memory = shared_memory or SharedMemory(offered=False)
        self.counts: dict[str, ModelCounts] = {}
        """Of each model that is served, in the version that is served."""
        self.model_version = version
        self.metrics = Metrics()
        self.tracing = tracing
        self._running: Counter[Engine] = Counter()
        self._writes, self._files = ThreadPoolExecutor(1, "writes"), ThreadPoolExecutor(1, "files")
        self.use(engine, collections, version, depth_unit, classes, labels)
        self.state: Literal["starting", "ready", "leaving", "closed"] = "starting"
        self._watch_gauges()

    def use(
        self,
        engine: Engine,
        collections: Collections,
        version: str,
        depth_unit: str | None,
        classes: Sequence[str],
        labels: Sequence[str],
    ) -> None:
        """Serve this network from the next request on; those that are in finish on the one they began on."""
        self.engine, self.collections = engine, collections
        self.models, self.absent = make_models(engine, collections, labels)
        self.unloaded: dict[str, ServedModel] = {}
        before, self.counts = self.counts if version == self.model_version else {}, {}
        for name in self.models:
            self.counts[name] = before.get(name) or ModelCounts()
            self.counts[name].load()
        self.model_version, self.depth_unit = version, depth_unit
        self.classes, self.labels = tuple(classes), tuple(labels)

    def unload(self, name: str) -> None:
        """Answer no more requests for a model; nothing for one that is not served."""
        if name in self.models:
            self.unloaded[name] = self.models.pop(name)
            del self.counts[name]

    def runs_on(self, engine: Engine) -> bool:
        """Whether a request is being answered by this network."""
        return self._running[engine] > 0

    @property
    def ready(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.state == "ready"

    @property
    def in_flight(self) -> int:
        """Requests of any kind that were accepted and are not answered yet, each of a stream too."""
        return self.admission.working

    def refuse_work(self) -> None:
        """Take nothing new; what was accepted is finished."""
        self.state, self.admission.open = "closed", False

    def check_open(self) -> None:
        """Raise Draining for what came too late."""
        if self.state == "closed" and not accepted.get():
            raise Draining("the server is shutting down")

    async def write(self, work: Callable[[], T]) -> T:
        """Do a write to the collections, which waits for the one before it: apart from the decode pool, or images would wait too."""
        return await asyncio.get_running_loop().run_in_executor(self._writes, work)

    async def convert(self, work: Callable[[], T]) -> T:
        """Read or write a collection's file, one at a time: each may take long, and much memory.

        Raises Overloaded while requests and replies hold too much of it.
        """
        self.admission.receive(0, self.admission.spec.max_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._files, work)

    async def close(self) -> None:
        """Finish what is being written, unless the store stalls: nothing of it is committed any more."""
        ending = [asyncio.to_thread(worker.shutdown) for worker in (self._files, self._writes)]
        await asyncio.wait(map(asyncio.ensure_future, ending), timeout=CLOSE_S)

    def model(self, name: str, version: str = "") -> ServedModel:
        """The model of this name. Raises NotFound, saying what there is."""
        if name not in self.models:
            why = (
                f": {self.absent[name]}"
                if name in self.absent
                else ": it was unloaded"
                if name in self.unloaded
                else ""
            )
            raise NotFound(f"model {name!r:.80} is not served here{why}; served: {', '.join(sorted(self.models))}")
        if version not in ("", self.model_version):
            raise NotFound(f"model {name!r} has no version {version!r:.20}; it has {self.model_version}")
        return self.models[name]

    def raw(self, request: InferRequest, name: str, array: np.ndarray) -> bytes | None:
        """An output's wire bytes; None where they went into shared memory. Raises InputError where they do not fit there."""
        content = to_raw(array)
        if name not in request.places:
            return content
        self.shared_memory.write(request.places[name], content)
        return None

    async def infer(self, request: InferRequest, write: Callable[[InferReply], Awaitable[T]]) -> T:
        """Answer one request as its wire writes it: what fails there is a failure too.

        Raises InputError and the errors of `server.errors`, all of them counted and logged.
        """
        began_ns = time.perf_counter_ns()
        rows, times, counts = 0, Times(), self.counts.get(request.model)
        try:
            model = self.model(request.model, request.version)
            outputs, inputs = wanted_outputs(model, request.outputs), checked_inputs(model, request.tensors)
            rows = len(next(iter(inputs.values())))
            self.rates.take(client.get(), rows)
            written = await self._infer(model, request, inputs, outputs, rows, began_ns, times, write)
        except BaseException as error:
            total_ns = time.perf_counter_ns() - began_ns
            code = self._failed(request, rows, error, total_ns, counts)
            if self.tracing is not None:
                self.tracing.record(request, rows, code, time.time_ns(), total_ns, times)
            raise
        total_ns = time.perf_counter_ns() - began_ns
        _log_request(request, rows, "OK", total_ns)
        if self.tracing is not None:
            self.tracing.record(request, rows, "OK", time.time_ns(), total_ns, times)
        return written

    async def infer_aside(self, request: InferRequest, patience_s: float) -> InferReply:
        """Pixels through the network for an evaluation: no admission, no counters, and clients' rows go first."""
        model = self.model(request.model, request.version)
        outputs, inputs = wanted_outputs(model, request.outputs), checked_inputs(model, request.tensors)
        model.engine.runtimes[0].check_call(inputs["pixels"], outputs)
        answers = await self.engine.run(inputs["pixels"], outputs, Times(), None, patience_s)
        specs = model.output_specs
        ordered = tuple((specs[name], answers[name]) for name in outputs)
        return InferReply(model.name, self.model_version, request.id, ordered, model.engine)

    async def _infer(
        self,
        model: ServedModel,
        request: InferRequest,
        inputs: dict[str, np.ndarray],
        outputs: tuple[str, ...],
        rows: int,
        began_ns: int,
        times: Times,
        write: Callable[[InferReply], Awaitable[T]],
    ) -> T:
        self.check_open()
        version = self.model_version  # of this model: while it answers, another may take its place
        options = model.options(request.parameters)
        specs = model.output_specs
        forms = chosen_formats(request, [specs[name] for name in outputs])
        nbytes = rows * 12 * model.pixel_count(inputs, options) + sum(map(size_bytes, inputs.values()))
        timeout_s = timeout_of(request)
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        counts = self.counts[model.name]
        with self.admission.hold(rows, nbytes):
            waits = times.begun = _Waits(counts)
            self._running[model.engine] += 1
            try:
                async with asyncio.timeout_at(deadline_s) if deadline_s is not None else _UNLIMITED as limit:
                    answers = await model.infer(inputs, outputs, options, times, deadline_s)
                    made = [(specs[name], answers[name]) for name in outputs]
                    ready = await _formatted(model, made, forms, times) if forms else [Formatted(*one) for one in made]
                written = await write(self._reply(model, version, request, ready))
            except TimeoutError as error:
                if limit is None or not limit.expired():
                    raise EngineFailed("a part of the server timed out") from error
                raise Expired(
                    f"the deadline of {(timeout_s or 0) * 1e3:g} ms passed before the answer was ready"
                ) from error
            finally:
                waits()
                self._running[model.engine] -= 1
                if not self._running[model.engine]:  # or a network would be kept for as long as its count
                    del self._running[model.engine]
        total_ns = time.perf_counter_ns() - began_ns
        counts.succeed(model.name, rows, total_ns, times)
        self.admission.learn(times, len(model.engine.runtimes))
        self.metrics.observe(model.name, total_ns, times)
        return written

    def _reply(self, model: ServedModel, version: str, request: InferRequest, ready: Sequence[Formatted]) -> InferReply:
        """The outputs as a reply. Raises TooLarge."""
        nbytes = sum(size_bytes(one.array) for one in ready if one.spec.name not in request.places)
        most = self.admission.spec.max_reply_bytes
        if nbytes > most:
            raise TooLarge(
                f"the reply has {nbytes / 2**20:.1f} MB of outputs, and {most >> 20} MB are allowed; ask for fewer images or "
                "outputs, or for a smaller form of them, or start the server with more --max-message-mb"
            )
        scales = {one.spec.name: one.scale for one in ready if one.scale is not None}
        ordered = tuple((one.spec, one.array) for one in ready)
        return InferReply(model.name, version, request.id, ordered, model.engine, scales)

    def _failed(
        self, request: InferRequest, rows: int, error: BaseException, total_ns: int, counts: ModelCounts | None
    ) -> str:
        """Count and log; gives the code that the client gets."""
        cancelled = isinstance(error, asyncio.CancelledError)
        code = "CANCELLED" if cancelled else outcome(error).grpc_code.name
        if counts is not None:
            counts.failed("CANCELED" if cancelled else outcome(error).reason, total_ns)
        known = counts is not None or request.model in self.unloaded
        self.metrics.errors.labels(request.model if known else "unknown", code).inc()
        told = str(error) if isinstance(error, InputError | ServerError) else type(error).__name__
        _log_request(request, rows, code, total_ns, told)
        return code

    def exposition(self) -> bytes:
        """The Prometheus page."""
        return self.metrics.exposition({(name, self.model_version): counts for name, counts in self.counts.items()})

    def _watch_gauges(self) -> None:
        show, admission = self.metrics.gauge, self.admission
        show("dinoscope_queue_rows", "Rows that wait for an instance", lambda: self.engine.batcher.waiting_rows)
        show("dinoscope_admitted_rows", "Rows accepted and not yet answered", lambda: admission.rows)
        show("dinoscope_admitted_bytes", "Memory reckoned for these rows", lambda: admission.bytes)
        show(
            "dinoscope_body_bytes",
            "Bytes that came of requests that are not answered yet, and of large replies that are not taken yet",
            lambda: admission.body_bytes,
        )
        show("dinoscope_calls", "gRPC calls that are being answered", lambda: admission.calls)
        show(
            "dinoscope_rejected_requests",
            "Requests refused because of rows, bytes or calls",
            lambda: admission.rejected,
        )
        show(
            "dinoscope_expired_rows", "Rows dropped before compute: deadline", lambda: self.engine.batcher.expired_rows
        )
        show(
            "dinoscope_cancelled_rows",
            "Rows dropped before compute: caller left",
            lambda: self.engine.batcher.cancelled_rows,
        )


class _Waits:
    """A request that counts as pending until this is called: when the network begins with it, or when it ends without."""

    __slots__ = ("_counts",)

    def __init__(self, counts: ModelCounts) -> None:
        self._counts: ModelCounts | None = counts
        counts.pending += 1

    def __call__(self) -> None:
        if self._counts is not None:
            self._counts.pending -= 1
            self._counts = None


async def _formatted(
    model: ServedModel, made: Sequence[tuple[TensorSpec, np.ndarray]], forms: Mapping[str, str], times: Times
) -> list[Formatted]:
    """The outputs, those in `forms` in the form asked for."""
    began, ready = time.perf_counter_ns(), []
    for spec, array in made:
        if spec.name in forms:
            ready.append(await model.engine.off_loop(formatted, spec, array, forms[spec.name]))
        else:
            ready.append(Formatted(spec, array))
    times.output_ns += time.perf_counter_ns() - began
    return ready


async def off_loop_if_large(nbytes: int, work: Callable[..., T], *args: Any) -> T:
    """Do the parsing of a request, in a thread where it is so large that other clients would have to wait for it."""
    return await asyncio.to_thread(work, *args) if nbytes > LARGE_BYTES else work(*args)


def _log_request(request: InferRequest, rows: int, code: str, total_ns: int, told: str = "") -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    fields = {"id": request.id, "protocol": request.protocol, "model": request.model[:80], "rows": rows, "code": code}
    if client.get():
        fields["client"] = client.get()
    fields["ms"] = round(total_ns / 1e6, 2)
    if told:
        fields["error"] = " ".join(told.split())[:300]
    log.info("request", extra={"fields": fields})
