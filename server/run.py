"""The server's life: load, listen, get ready, serve, drain, leave.

`serve` is the whole life on one event loop; `Running` is what a caller in the same process gets to see of it.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import uvicorn
from fastapi import FastAPI

from data.errors import InputError
from server.access import Access, Rates
from server.admission import AdmissionSpec
from server.artifacts import Loaded, load_artifacts
from server.batcher import BatchSpec
from server.collections import Collections
from server.config import ServerConfig, is_loopback
from server.cores import freeze_heap, keep_freed_memory, wake_without_preempting
from server.databases import open_database
from server.engine import Engine, EngineSpec
from server.errors import ServerError
from server.evaluation_wire import evaluation_wire
from server.evaluations import Evaluations
from server.grpc_api import GrpcServer
from server.http_app import make_http_app, make_metrics_app
from server.patience import KEEP_ALIVE_S, PatientProtocol
from server.repository import Repository, binding_of
from server.samples import build_samples
from server.service import Service
from server.settings import resolved
from server.shared_memory import SharedMemory
from server.tls import Tls
from server.tracing import open_tracing

log = logging.getLogger("server")

LAG_EVERY_S = 0.5
REFUSING_S = 0.25
"""How long busy clients are told that the server leaves before it stops listening: gRPC cancels a call that meets a closing listener."""
LAST_REPLIES_S = 2.0
"""How long a reply that is ready may take to reach its client when the server leaves."""

Load = Callable[[ServerConfig], Loaded]
"""How the network is brought up; tests bring their own."""


@dataclass(frozen=True)
class Addresses:
    """Where a server listens."""

    http: str
    grpc: str
    """host:port, as tritonclient wants it."""
    metrics: str
    pid: int = field(default_factory=os.getpid)


@asynccontextmanager
async def assembled(config: ServerConfig, load: Load) -> AsyncIterator[tuple[Service, Evaluations, Repository]]:
    """Everything behind the wires, built from the inside out and closed in the opposite order."""
    allowed = config.allowed_data
    spec = EngineSpec(
        batching=BatchSpec(max_rows=config.max_batch_rows, max_delay_us=config.batch_delay_us),
        decode_threads=config.decode_threads,
        max_size_px=config.max_size_px,
        working_bytes=config.queue_mb << 20,
    )
    loaded = await asyncio.to_thread(load, config)
    engine = Engine(loaded.runtimes, spec)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        database = open_database(config.state_folder, config.database)
        stack.callback(database.close)
        store = Collections(database, binding_of(engine))
        limits = AdmissionSpec(
            max_rows=config.queue_rows,
            max_bytes=config.queue_mb << 20,
            triton_codes=config.triton_codes,
            max_reply_bytes=config.max_message_mb << 20,
        )
        rates = Rates(config.client_rows_per_s)
        shared_memory = SharedMemory(offered=is_loopback(config.host), max_bytes=config.queue_mb << 20)
        tracing = open_tracing() if config.traces else None
        if tracing is not None:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        service = Service(
            engine,
            store,
            limits,
            loaded.version,
            loaded.depth_unit,
            loaded.classes,
            loaded.labels,
            rates,
            shared_memory,
            tracing,
        )
        stack.push_async_callback(service.close)
        stack.push_async_callback(lambda: service.engine.close())
        evaluations = Evaluations(
            service, lambda: evaluation_wire(service), allowed, config.state_folder / "evaluations"
        )
        stack.push_async_callback(evaluations.close)
        repository = Repository(config, load, spec, service, evaluations)
        stack.push_async_callback(repository.close)
        if config.sample_data is not None:
            try:
                await build_samples(engine, store, config.sample_data)
            except ServerError as error:
                raise InputError(f"--samples {config.sample_data}: {error}") from error
        lag = asyncio.ensure_future(_watch_loop(service))
        stack.callback(lag.cancel)
        yield service, evaluations, repository


async def serve(
    config: ServerConfig, stop: asyncio.Event, announce: Callable[[Addresses], None], load: Load = load_artifacts
) -> None:
    """Live until `stop` is set; `announce` is called once requests are answered. Raises InputError for what cannot be."""
    config.check()
    missing = [what for what, there in (("access control", config.token_file), ("TLS", config.tls_cert)) if not there]
    if not is_loopback(config.host) and missing:
        log.warning("public", extra={"fields": {"host": config.host, "warning": f"no {', no '.join(missing)}"}})
    max_bytes = config.max_message_mb << 20
    with contextlib.ExitStack() as sockets:
        http_socket = sockets.enter_context(_listen(config.host, config.http_port, "--http-port"))
        metrics_socket = sockets.enter_context(_listen(config.host, config.metrics_port, "--metrics-port"))
        if config.grpc_port:  # gRPC binds its port by itself, and only after the network is loaded; look now
            _listen(config.host, config.grpc_port, "--grpc-port").close()
        async with assembled(config, load) as (service, evaluations, repository):
            access = Access() if config.token_file is None else Access.from_file(config.token_file)
            tls = config.tls
            grpc_server = GrpcServer(service, repository, config.host, config.grpc_port, max_bytes, access, tls)
            http = [
                _Http(make_http_app(service, evaluations, repository, max_bytes, access), http_socket, tls),
                _Http(make_metrics_app(service), metrics_socket, tls),
            ]
            for one in http:
                await one.start()
            await grpc_server.start()
            service.state = "ready"
            await grpc_server.announce(True)
            log.info("settings", extra={"fields": resolved(config, service.engine.runtimes)})
            announce(_addresses(config, http_socket, metrics_socket, grpc_server.port))
            await _until_stopped(stop, http)
            await _drain(config, service, grpc_server, http)


async def _watch_loop(service: Service) -> None:
    """Measure by how much the event loop is late: what every client waits for, whatever it asked."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        service.metrics.loop_lag_s.observe(max(0.0, loop.time() - due_s))


async def _until_stopped(stop: asyncio.Event, http: "list[_Http]") -> None:
    """Wait for `stop`, or for a listener that ends by itself, which is an error."""
    stopping = asyncio.ensure_future(stop.wait())
    listeners = [one.task for one in http]
    await asyncio.wait([stopping, *listeners], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in listeners:
        if task.done():
            task.result()
            raise RuntimeError("an HTTP listener ended by itself")


async def _drain(config: ServerConfig, service: Service, grpc_server: GrpcServer, http: "list[_Http]") -> None:
    """Say not ready, take no new work, finish what was accepted."""
    log.info("leaving", extra={"fields": {"in_flight": service.in_flight}})
    service.state = "leaving"
    await grpc_server.announce(False)
    await asyncio.sleep(config.drain_delay_s)
    service.refuse_work()
    loop = asyncio.get_running_loop()
    end_s = loop.time() + config.grace_s
    # Listeners close when nothing runs any more: one that is closing lets new calls hang, these refuse them.
    refused_till_s = loop.time() + REFUSING_S
    while (service.in_flight or loop.time() < refused_till_s) and loop.time() < end_s:
        await asyncio.sleep(0.01)
    service.collections.give_up()
    left_s = min(LAST_REPLIES_S, max(0.0, end_s - loop.time()))
    await asyncio.gather(grpc_server.stop(left_s), *(one.stop(left_s) for one in http))
    log.info("left", extra={"fields": {"unanswered": service.in_flight}})


class _Http(uvicorn.Server):
    """uvicorn on a socket of ours, in a loop of ours; signals are none of its business."""

    def __init__(self, app: FastAPI, listener: socket.socket, tls: Tls | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                http=PatientProtocol,
                timeout_keep_alive=KEEP_ALIVE_S,
                **({} if tls is None else tls.for_uvicorn()),
            )
        )
        self._listener = listener

    async def start(self) -> None:
        """Begin to answer."""
        self.task = asyncio.ensure_future(self.serve([self._listener]))
        while not self.started:
            if self.task.done():
                self.task.result()
                raise RuntimeError("an HTTP listener could not start")
            await asyncio.sleep(0.01)

    async def stop(self, grace_s: float) -> None:
        """Take no new requests, and give those that are not answered `grace_s` to finish."""
        self.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self.should_exit = True
        await self.task

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """The signals stay with `main`."""
        yield


def _listen(host: str, port: int, flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InputError(f"{flag} {port}: cannot listen on {host} ({reason}); name another port, or 0") from error
    return listener


def _addresses(config: ServerConfig, http: socket.socket, metrics: socket.socket, grpc_port: int) -> Addresses:
    shown = f"[{config.host}]" if ":" in config.host else config.host
    scheme = "http" if config.tls_cert is None else "https"
    return Addresses(
        http=f"{scheme}://{shown}:{http.getsockname()[1]}",
        grpc=f"{shown}:{grpc_port}",
        metrics=f"{scheme}://{shown}:{metrics.getsockname()[1]}/metrics",
    )


def main(config: ServerConfig, load: Load = load_artifacts) -> None:
    """Run in the foreground until SIGTERM or SIGINT; a second signal ends the process at once."""
    cv2.setNumThreads(1)  # the cores belong to the network's copies; the decode pool has threads of its own
    keep_freed_memory()
    wake_without_preempting()
    _run(_main(config, load))


def _run(life: Coroutine[Any, Any, None]) -> None:
    """On uvloop's event loop, which takes less of a core for each request than asyncio's own; it is not made for Windows."""
    if sys.platform == "win32":
        asyncio.run(life)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life)


async def _main(config: ServerConfig, load: Load) -> None:
    stop = asyncio.Event()

    def leave() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave)

    def ready(addresses: Addresses) -> None:
        freeze_heap()
        print_ready(addresses)

    await serve(config, stop, ready, load)
    logging.shutdown()
    sys.stdout.flush()
    # All is closed; a thread whose database stalls, or gRPC with a client that takes nothing, is not waited for.
    os._exit(0)


def print_ready(addresses: Addresses) -> None:
    """Two lines on stdout: one for people, one for programs."""
    print(f"ready: page and REST {addresses.http}/docs, gRPC {addresses.grpc}, metrics {addresses.metrics}")
    print(json.dumps({"event": "ready", **asdict(addresses)}), flush=True)


class Running:
    """A server in a thread of this process, for tests and for programs that embed it."""

    def __init__(self, config: ServerConfig, load: Load = load_artifacts) -> None:
        self._config, self._load = config, load
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="server", daemon=True)
        self.addresses: Addresses

    def __enter__(self) -> "Running":
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._thread.join()

    def leave(self) -> None:
        """Begin to drain, as SIGTERM does; one that has left stays so."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)

    def _live(self) -> None:
        try:
            _run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(self._config, self._stop, self._announced, self._load)

    def _announced(self, addresses: Addresses) -> None:
        self.addresses = addresses
        self._started.set()
