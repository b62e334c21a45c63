"""A request, whichever wire it came by -> a reply: checks, admission, deadline, model, counters, log line.

This is the one way in. gRPC, the v2 REST routes and the routes for people all build an InferRequest and call
`Service.infer`; what a request may cost and how its failure is counted is decided here and nowhere else.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from data.errors import InputError
from server.access import Rates, client
from server.admission import Admission, AdmissionSpec
from server.collections import Collections
from server.engine import Engine
from server.errors import Draining, EngineFailed, Expired, NotFound, ServerError, outcome
from server.models import ServedModel, make_models
from server.shared_memory import Place, SharedMemory
from server.statistics import Metrics, ModelCounts, Times
from server.tensors import Tensor, TensorSpec, to_raw

log = logging.getLogger("server")
T = TypeVar("T")

UNSUPPORTED = ("classification",)
"""Parameters of inputs and outputs that ask for what this server does not have, on either wire."""
LARGE_BYTES = 1 << 20
"""From here on a request's numbers are read off the event loop."""

NAME = "dinoscope"
VERSION = "0.1.0"
EXTENSIONS = (
    "binary_tensor_data",
    "system_shared_memory",
    "statistics",
    "model_configuration",
    "model_repository",
    "schedule_policy",
)


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """One request for one model, off the wire but unchecked."""

    model: str
    tensors: Sequence[Tensor]
    version: str = ""
    outputs: Sequence[str] = ()
    """Names of the outputs wanted; none: all of them."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    protocol: str = ""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Outputs that go into shared memory instead of the reply."""
    timeout_s: float | None = None
    """What the wire's own deadline leaves; the parameter `timeout` (microseconds) can only shorten it."""


@dataclass(frozen=True)
class InferReply:
    """The outputs in the order asked for, each with its spec."""

    model: str
    version: str
    id: str
    outputs: tuple[tuple[TensorSpec, np.ndarray], ...]

    def __getitem__(self, name: str) -> np.ndarray:
        return next(array for spec, array in self.outputs if spec.name == name)


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
        rates: Rates | None = None,
        shared_memory: SharedMemory | None = None,
    ) -> None:
        self.admission = Admission(admission)
        self.rates = rates or Rates(None)
        self.shared_memory = shared_memory or SharedMemory(offered=False)
        self.counts: dict[str, ModelCounts] = {}
        self.metrics = Metrics()
        self._running: Counter[Engine] = Counter()
        self.use(engine, collections, version, depth_unit, classes)
        self.state: Literal["starting", "ready", "leaving", "closed"] = "starting"
        self._watch_gauges()

    def use(
        self,
        engine: Engine,
        collections: Collections,
        version: str,
        depth_unit: str | None,
        classes: Sequence[str],
    ) -> None:
        """Serve this network from the next request on; those that are in finish on the one they began on."""
        self.engine, self.collections = engine, collections
        self.models, self.absent = make_models(engine, collections)
        self.unloaded: dict[str, ServedModel] = {}
        self.model_version, self.depth_unit, self.classes = version, depth_unit, tuple(classes)
        for name in self.models:
            self.counts.setdefault(name, ModelCounts())

    def unload(self, name: str) -> None:
        """Answer no more requests for a model; nothing for one that is not served."""
        if name in self.models:
            self.unloaded[name] = self.models.pop(name)

    def runs_on(self, engine: Engine) -> bool:
        """Whether a request is being answered by this network."""
        return self._running[engine] > 0

    @property
    def ready(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.state == "ready"

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and are not answered yet."""
        return sum(counts.pending for counts in self.counts.values())

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

    async def infer(self, request: InferRequest) -> InferReply:
        """Answer one request. Raises InputError and the errors of `server.errors`, all of them counted and logged."""
        began_ns = time.perf_counter_ns()
        rows = 0
        try:
            model = self.model(request.model, request.version)
            outputs, inputs = _wanted(model, request.outputs), _checked(model, request.tensors)
            rows = len(next(iter(inputs.values())))
            self.rates.take(client.get(), rows)
            reply = await self._infer(model, request, inputs, outputs, rows, began_ns)
        except BaseException as error:
            self._failed(request, rows, error, time.perf_counter_ns() - began_ns)
            raise
        _log_request(request, rows, "OK", time.perf_counter_ns() - began_ns)
        return reply

    async def infer_aside(self, request: InferRequest, patience_s: float) -> InferReply:
        """Pixels through the network for an evaluation: no admission, no counters, and clients' rows go first."""
        model = self.model(request.model, request.version)
        outputs, inputs = _wanted(model, request.outputs), _checked(model, request.tensors)
        answers = await self.engine.run(inputs["pixels"], outputs, Times(), None, patience_s)
        specs = {spec.name: spec for spec in model.outputs}
        return InferReply(
            model.name, self.model_version, request.id, tuple((specs[name], answers[name]) for name in outputs)
        )

    async def _infer(
        self,
        model: ServedModel,
        request: InferRequest,
        inputs: dict[str, np.ndarray],
        outputs: tuple[str, ...],
        rows: int,
        began_ns: int,
    ) -> InferReply:
        if self.state == "closed":
            raise Draining("the server is shutting down")
        options = model.options(request.parameters)
        nbytes = rows * 12 * model.pixel_count(inputs, options) + sum(map(_bytes, inputs.values()))
        timeout_s = _timeout_s(request)
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        counts, times = self.counts[model.name], Times()
        with self.admission.hold(rows, nbytes):
            counts.pending += 1
            self._running[model.engine] += 1
            try:
                async with asyncio.timeout_at(deadline_s) as limit:
                    answers = await model.infer(inputs, outputs, options, times, deadline_s)
            except TimeoutError as error:
                if not limit.expired():
                    raise EngineFailed("a part of the server timed out") from error
                raise Expired(
                    f"the deadline of {(timeout_s or 0) * 1e3:g} ms passed before the answer was ready"
                ) from error
            finally:
                counts.pending -= 1
                self._running[model.engine] -= 1
        total_ns = time.perf_counter_ns() - began_ns
        counts.succeed(model.name, rows, total_ns, times)
        self.admission.learn(rows, times.infer_ns)
        self.metrics.observe(model.name, total_ns, times)
        specs = {spec.name: spec for spec in model.outputs}
        ordered = tuple((specs[name], answers[name]) for name in outputs)
        return InferReply(model.name, self.model_version, request.id, ordered)

    def _failed(self, request: InferRequest, rows: int, error: BaseException, total_ns: int) -> None:
        cancelled = isinstance(error, asyncio.CancelledError)
        code = "CANCELLED" if cancelled else outcome(error).grpc_code.name
        known = request.model in self.counts
        if known:
            self.counts[request.model].failed("CANCELED" if cancelled else outcome(error).reason, total_ns)
        self.metrics.errors.labels(request.model if known else "unknown", code).inc()
        told = str(error) if isinstance(error, InputError | ServerError) else type(error).__name__
        _log_request(request, rows, code, total_ns, told)

    def exposition(self) -> bytes:
        """The Prometheus page."""
        return self.metrics.exposition({(name, self.model_version): counts for name, counts in self.counts.items()})

    def _watch_gauges(self) -> None:
        show, admission = self.metrics.gauge, self.admission
        show("dinoscope_queue_rows", "Rows that wait for an instance", lambda: self.engine.batcher.waiting_rows)
        show("dinoscope_admitted_rows", "Rows accepted and not yet answered", lambda: admission.rows)
        show("dinoscope_admitted_bytes", "Memory reckoned for these rows", lambda: admission.bytes)
        show("dinoscope_rejected_requests", "Requests refused because of rows or bytes", lambda: admission.rejected)
        show(
            "dinoscope_expired_rows", "Rows dropped before compute: deadline", lambda: self.engine.batcher.expired_rows
        )
        show(
            "dinoscope_cancelled_rows",
            "Rows dropped before compute: caller left",
            lambda: self.engine.batcher.cancelled_rows,
        )


async def off_loop_if_large(nbytes: int, work: Callable[..., T], *args: Any) -> T:
    """Do the parsing of a request, in a thread where it is so large that other clients would have to wait for it."""
    return await asyncio.to_thread(work, *args) if nbytes > LARGE_BYTES else work(*args)


def _wanted(model: ServedModel, names: Sequence[str]) -> tuple[str, ...]:
    known = tuple(spec.name for spec in model.outputs)
    for name in names:
        if name not in known:
            raise InputError(f"model {model.name!r} has no output {name!r:.80}; it has {', '.join(known)}")
    if len(set(names)) != len(names):
        raise InputError("an output is asked for twice")
    return tuple(names) or known


def _checked(model: ServedModel, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The inputs by name, each with the datatype and shape that the model declares, and equally many rows."""
    specs = {spec.name: spec for spec in model.inputs}
    inputs: dict[str, np.ndarray] = {}
    for tensor in tensors:
        spec = specs.get(tensor.name)
        if spec is None:
            raise InputError(f"model {model.name!r} has no input {tensor.name!r:.80}; it has {', '.join(specs)}")
        if tensor.name in inputs:
            raise InputError(f"input {tensor.name!r} came twice")
        inputs[tensor.name] = _fit(spec, tensor)
    missing = [spec.name for spec in model.inputs if not spec.optional and spec.name not in inputs]
    if missing or not inputs:
        wanted = missing[0] if missing else " or ".join(specs)
        raise InputError(f"model {model.name!r} wants the input {wanted}, which did not come")
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"inputs have different numbers of rows: {counts}")
    return inputs


def _fit(spec: TensorSpec, tensor: Tensor) -> np.ndarray:
    array = tensor.array
    if tensor.datatype != spec.datatype:
        raise InputError(f"input {spec.name!r} is {tensor.datatype}; wanted {spec.datatype}")
    if len(spec.shape) == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    fits = array.ndim == len(spec.shape) and all(
        wanted in (-1, came) for wanted, came in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"input {spec.name!r} has the shape {list(array.shape)}; wanted {list(spec.shape)}, -1 being any"
        )
    if not len(array):
        raise InputError(f"input {spec.name!r} is an empty batch; wanted at least one row")
    return array


def _bytes(array: np.ndarray) -> int:
    return sum(len(element) for element in array.flat) if array.dtype == object else array.nbytes


def _timeout_s(request: InferRequest) -> float | None:
    """The shorter of the wire's deadline and the request parameter. Raises InputError."""
    given = request.parameters.get("timeout")
    if given is None:
        return request.timeout_s
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 1 << 63:
        raise InputError(f"parameter 'timeout' is {given!r:.40}; wanted microseconds as a whole number")
    if given == 0:
        return request.timeout_s
    return given / 1e6 if request.timeout_s is None else min(given / 1e6, request.timeout_s)


def _log_request(request: InferRequest, rows: int, code: str, total_ns: int, told: str = "") -> None:
    fields = {"id": request.id, "protocol": request.protocol, "model": request.model[:80], "rows": rows, "code": code}
    if client.get():
        fields["client"] = client.get()
    fields["ms"] = round(total_ns / 1e6, 2)
    if told:
        fields["error"] = " ".join(told.split())[:300]
    log.info("request", extra={"fields": fields})
