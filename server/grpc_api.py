"""KServe v2 over gRPC, on the stubs that come with tritonclient.

Only translation: messages to InferRequest and back, errors to codes. What is not overridden here (CUDA shared memory, trace
and log settings) answers UNIMPLEMENTED.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from data.errors import InputError
from server import describe
from server.access import Access
from server.errors import NotFound, message
from server.grpc_calls import GuardedCalls, abort
from server.grpc_messages import parameters, reply_message, request_from
from server.infer_message import InferMessage
from server.repository import Repository
from server.requests import InferReply
from server.service import Service, off_loop_if_large
from server.tls import Tls

SERVICE_NAME = "inference.GRPCInferenceService"
STREAM_DEPTH = 16
"""Requests of one stream that are worked on at the same time."""
FRAME_BYTES, WINDOW_BYTES = 1 << 20, 4 << 20
"""What clients may send of a message in one piece, and before they are told to go on; 16 and 64 KB unless something is said."""
CLOSING_S = 1.0
"""How long connections may take to close once all calls are ended."""
Handler = Callable[[Any, Any, grpc.aio.ServicerContext], Awaitable[Any]]


def answering(handler: Handler) -> Handler:
    """Wrap an RPC so that whatever it raises ends it with the code and message of the error table."""

    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await handler(self, request, context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await abort(context, error, getattr(request, "id", ""))

    return answer


class InferenceServicer(GRPCInferenceServiceServicer):
    """The RPCs that real clients use."""

    def __init__(self, service: Service, repository: Repository) -> None:
        self.service, self.repository = service, repository

    @answering
    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    @answering
    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self.service.ready)

    @answering
    async def ModelReady(self, request: Any, context: Any) -> Any:
        try:
            self.service.model(request.name, request.version)
        except NotFound:  # as Triton answers: clients wait for a model so
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.service.ready)

    @answering
    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return ParseDict(describe.server_metadata(), pb.ServerMetadataResponse())

    @answering
    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        return ParseDict(
            describe.model_metadata(self.service, request.name, request.version), pb.ModelMetadataResponse()
        )

    @answering
    async def ModelConfig(self, request: Any, context: Any) -> Any:
        config = describe.model_config(self.service, request.name, request.version)
        return ParseDict({"config": config}, pb.ModelConfigResponse())

    @answering
    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        statistics = describe.model_statistics(self.service, request.name, request.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    @answering
    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        return ParseDict({"models": self.repository.index(request.ready)}, pb.RepositoryIndexResponse())

    @answering
    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await self.repository.load(request.model_name, parameters(request.parameters))
        return pb.RepositoryModelLoadResponse()

    @answering
    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await self.repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: InferMessage, context: grpc.aio.ServicerContext) -> Any:
        called = _called(request)
        try:
            return await self._infer(request, called, context)
        except Exception as error:
            await abort(context, error, called)

    async def _infer(self, request: InferMessage, called: str, context: grpc.aio.ServicerContext) -> Any:
        left_s, shared, admission = context.time_remaining(), self.service.shared_memory, self.service.admission
        try:
            admission.receive(request.nbytes, request.nbytes)
            wanted = await off_loop_if_large(request.nbytes, request_from, request, called, left_s, shared)

            async def write(reply: InferReply) -> Any:
                return reply_message(self.service, wanted, reply, request.id)

            return await self.service.infer(wanted, write)
        finally:
            admission.forget(request.nbytes)

    @answering
    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        self.service.shared_memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    @answering
    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self.service.shared_memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    @answering
    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        reply = pb.SystemSharedMemoryStatusResponse()
        for one in self.service.shared_memory.status(request.name):
            region = reply.regions[one.name]
            region.name, region.key, region.offset, region.byte_size = one.name, one.key, one.offset, one.byte_size
        return reply

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
        """Requests answered in their order, some worked on at a time; an error is the answer to its request, and the stream goes on."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_DEPTH)

        async def read() -> None:
            async for request in request_iterator:
                task = asyncio.ensure_future(self._stream_answer(request, context))
                try:
                    await answers.put(task)
                except asyncio.CancelledError:  # while it waited for its place: nobody else knows this one
                    self._drop(task)
                    raise
            await answers.put(None)

        reader, current = asyncio.ensure_future(read()), None
        try:
            while (current := await answers.get()) is not None:
                yield await current
                self._drop(current)
                current = None
        finally:  # of a stream that was broken off, nothing is computed any more
            reader.cancel()
            for task in (current, *(answers.get_nowait() for _ in range(answers.qsize()))):
                if task is not None:
                    self._drop(task)

    def _drop(self, answer: "asyncio.Task[bytes]") -> None:
        """An answer of a stream was taken, or nobody wants it any more."""
        if not answer.cancel() and not answer.cancelled() and answer.exception() is None:
            self.service.admission.forget(len(answer.result()))

    async def _stream_answer(self, request: Any, context: grpc.aio.ServicerContext) -> bytes:
        """The answer to a request, as bytes that count among those that are held until its client has taken them."""
        answer: bytes = (await self._stream_reply(request, context)).SerializeToString()
        self.service.admission.body_bytes += len(answer)
        return answer

    async def _stream_reply(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, InputError):
            return pb.ModelStreamInferResponse(error_message=str(request))
        called, admission = _called(request), self.service.admission
        counted = admission.begin()
        try:
            reply = await self._infer(request, called, context)
        except Exception as error:
            return pb.ModelStreamInferResponse(
                error_message=message(error, called), infer_response=pb.ModelInferResponse(id=request.id)
            )
        finally:
            if counted:
                admission.end()
        reply.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=reply)


_OWN_IDS = itertools.count(random.getrandbits(47))
"""Begun anywhere, so that those of several servers, or of one that was started again, do not meet in a log."""


def _called(request: InferMessage) -> str:
    """What logs, and the reply to an internal error, call a request, even if its client gave it no name."""
    return request.id or f"{next(_OWN_IDS):012x}"


class GrpcServer:
    """The gRPC listener with the inference and the health service."""

    def __init__(
        self,
        service: Service,
        repository: Repository,
        host: str,
        port: int,
        max_message_bytes: int,
        access: Access,
        tls: Tls | None,
    ) -> None:
        self._health = health.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                # `Service` refuses a reply that is too large; gRPC would end its whole stream.
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                # An image is one frame, and comes without a pause for leave to go on.
                ("grpc.http2.max_frame_size", FRAME_BYTES),
                ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
                # Connections that say nothing, or whose other end is gone, are closed.
                ("grpc.server_handshake_timeout_ms", 30_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        calls = GuardedCalls(service.admission, access)
        add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service, repository), calls)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, calls)
        self._server.add_generic_rpc_handlers((calls,))
        try:
            where = f"{f'[{host}]' if ':' in host else host}:{port}"
            add_port = self._server.add_insecure_port
            self.port = add_port(where) if tls is None else self._server.add_secure_port(where, tls.for_grpc())
        except RuntimeError as error:
            raise InputError(f"--grpc-port {port}: cannot listen on {host}; name another port, or 0") from error

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()

    async def announce(self, serving: bool) -> None:
        """What the health service says from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and give those that run `grace_s` to finish.

        Connections whose clients take nothing outlast that: gRPC itself waits until it misses their answer to a ping.
        """
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        await asyncio.wait({stopping}, timeout=grace_s + CLOSING_S)
