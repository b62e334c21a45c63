"""KServe v2 over gRPC, on the stubs that come with tritonclient.

Only translation: messages to InferRequest and back, errors to codes. What is not overridden here (CUDA shared memory, trace
and log settings) answers UNIMPLEMENTED.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError as ProtobufError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from data.errors import InputError
from server import describe
from server.access import Access, RequireToken
from server.errors import message, outcome, retry_after
from server.formats import FORMAT, SCALE
from server.grpc_calls import BoundCalls
from server.infer_message import InferMessage, read_infer
from server.repository import Repository
from server.requests import UNSUPPORTED, InferReply, InferRequest
from server.service import Service, off_loop_if_large
from server.shared_memory import BYTE_SIZE, OFFSET, REGION, Place, SharedMemory
from server.tensors import Tensor, from_raw, from_values
from server.tls import Tls

SERVICE_NAME = "inference.GRPCInferenceService"
_CONTENTS_OF = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
STREAM_DEPTH = 16
"""Requests of one stream that are worked on at the same time."""
Handler = Callable[[Any, Any, grpc.aio.ServicerContext], Awaitable[Any]]


def answering(handler: Handler) -> Handler:
    """Wrap an RPC so that whatever it raises ends it with the code and message of the error table."""

    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await handler(self, request, context)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await _abort(context, error, getattr(request, "id", ""))

    return answer


async def _abort(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> NoReturn:
    metadata = tuple(retry_after(error).items())
    await context.abort(outcome(error).grpc_code, message(error, request_id), trailing_metadata=metadata)
    raise AssertionError("abort always raises")


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
        self.service.model(request.name, request.version)
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
        await self.repository.load(request.model_name, _parameters(request.parameters))
        return pb.RepositoryModelLoadResponse()

    @answering
    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await self.repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @answering
    async def ModelInfer(self, request: InferMessage, context: grpc.aio.ServicerContext) -> Any:
        return await self._infer(request, context)

    async def _infer(self, request: InferMessage, context: grpc.aio.ServicerContext) -> Any:
        given = request.id
        # Logs, and the reply to an internal error, name a request even if its client did not.
        request.fields.id = given or f"{random.getrandbits(48):012x}"
        left_s, shared = context.time_remaining(), self.service.shared_memory
        wanted = await off_loop_if_large(request.nbytes, request_from, request, left_s, shared)
        return reply_message(self.service, wanted, await self.service.infer(wanted), given)

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

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Requests answered in their order, some worked on at a time; an error is the answer to its request, and the stream goes on."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(STREAM_DEPTH)

        async def read() -> None:
            async for request in request_iterator:
                await answers.put(asyncio.ensure_future(self._stream_answer(request, context)))
            await answers.put(None)

        reader, current = asyncio.ensure_future(read()), None
        try:
            while (current := await answers.get()) is not None:
                yield await current
        finally:  # of a stream that was broken off, nothing is computed any more
            reader.cancel()
            for task in (current, *(answers.get_nowait() for _ in range(answers.qsize()))):
                if task is not None:
                    task.cancel()

    async def _stream_answer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, InputError):
            return pb.ModelStreamInferResponse(error_message=str(request))
        given = request.id
        try:
            reply = await self._infer(request, context)
        except Exception as error:
            return pb.ModelStreamInferResponse(
                error_message=message(error, request.id), infer_response=pb.ModelInferResponse(id=given)
            )
        reply.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=reply)


def _not_offered(method: str) -> str:
    return f"{method} is not offered by this server"


def request_from(sent: InferMessage, timeout_s: float | None, shared: SharedMemory) -> InferRequest:
    """The protocol's message as an InferRequest. Raises InputError where it contradicts itself."""
    request = sent.fields
    for part in (*request.inputs, *request.outputs):
        for name in UNSUPPORTED:
            if name in part.parameters:
                raise InputError(f"{part.name!r} asks for {name}, which this server does not have")
    return InferRequest(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        tensors=_tensors(request.inputs, sent.raw, shared),
        outputs=[output.name for output in request.outputs],
        parameters=_parameters(request.parameters),
        formats={
            output.name: str(chosen)
            for output in request.outputs
            if (chosen := _parameters(output.parameters).get(FORMAT))
        },
        places={
            output.name: place
            for output in request.outputs
            if (place := Place.of(_parameters(output.parameters), f"output {output.name!r:.80}")) is not None
        },
        protocol="grpc",
        timeout_s=timeout_s,
    )


def _tensors(inputs: Sequence[Any], raw: Sequence[memoryview], shared: SharedMemory) -> list[Tensor]:
    places = [Place.of(_parameters(tensor.parameters), f"input {tensor.name!r:.80}") for tensor in inputs]
    if any(places):
        sent = [tensor for tensor, place in zip(inputs, places, strict=True) if place is None]
        found = iter(_sent(sent, raw))
        return [
            next(found) if place is None else from_raw(t.name, t.datatype, t.shape, shared.read(place))
            for t, place in zip(inputs, places, strict=True)
        ]
    return _sent(inputs, raw)


def _sent(inputs: Sequence[Any], raw: Sequence[memoryview]) -> list[Tensor]:
    """Tensors whose values lie in the message itself."""
    if not raw:
        return [_typed(tensor) for tensor in inputs]
    if len(raw) != len(inputs):
        raise InputError(f"{len(inputs)} inputs and {len(raw)} raw_input_contents came; wanted one for each")
    for tensor in inputs:
        if tensor.HasField("contents"):
            raise InputError(
                f"input {tensor.name!r} has typed contents beside raw_input_contents; wanted one of the two"
            )
    return [from_raw(t.name, t.datatype, t.shape, content) for t, content in zip(inputs, raw, strict=True)]


def _typed(tensor: Any) -> Tensor:
    field = _CONTENTS_OF.get(tensor.datatype)
    if field is None:
        return from_raw(tensor.name, tensor.datatype, tensor.shape, b"")
    return from_values(tensor.name, tensor.datatype, tensor.shape, list(getattr(tensor.contents, field)))


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    return {name: getattr(parameters[name], field) for name, field in chosen.items() if field}


def reply_message(service: Service, request: InferRequest, reply: InferReply, request_id: str) -> Any:
    """The reply as the protocol's message: raw contents for every output that is not in shared memory, in the order of the outputs."""
    response = pb.ModelInferResponse(model_name=reply.model, model_version=reply.version, id=request_id)
    for spec, array in reply.outputs:
        output = response.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if spec.name in reply.scales:
            output.parameters[SCALE].string_param = reply.scales[spec.name]
        content = service.raw(request, spec.name, array)
        response.raw_output_contents.append(content or b"")  # clients count outputs and contents alike
        if content is not None:
            continue
        place = request.places[spec.name]
        output.parameters[REGION].string_param = place.region
        output.parameters[BYTE_SIZE].int64_param = place.byte_size
        output.parameters[OFFSET].int64_param = place.offset
    return response


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """Bytes that are no message of the protocol are the client's mistake, not an exception of the server."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, with a reader that never raises; made once, for it knows nothing of the call."""
        handler = await continuation(details)
        if handler is None:
            return None
        if details.method not in self._wrapped:
            self._wrapped[details.method] = self._wrap(handler, details.method.rpartition("/")[2])
        return self._wrapped[details.method]

    def _wrap(self, handler: Any, method: str) -> Any:
        if handler.stream_stream is not None:
            reader = _reader(handler, method)
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, reader, handler.response_serializer)
        if handler.unary_unary is None:
            return handler
        if not asyncio.iscoroutinefunction(handler.unary_unary):

            async def refuse(request: Any, context: grpc.aio.ServicerContext) -> Any:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, _not_offered(method))

            return grpc.unary_unary_rpc_method_handler(refuse, bytes, bytes)

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if isinstance(request, InputError):
                await _abort(context, request, "")
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, _reader(handler, method), handler.response_serializer)


def _reader(handler: Any, method: str) -> Callable[[bytes], Any]:
    """Bytes to a message, or to the InputError that is told instead."""
    parse = read_infer if method in ("ModelInfer", "ModelStreamInfer") else handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except ProtobufError:
            return InputError(f"the request's {len(data)} bytes are not a {method} message of the protocol")

    return read


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
            interceptors=[BoundCalls(service.admission), RequireToken(access), RefuseUnreadable()],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),
                # Connections that say nothing, or whose other end is gone, are closed.
                ("grpc.server_handshake_timeout_ms", 30_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service, repository), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
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
        """Take no new calls, and give those that run `grace_s` to finish."""
        await self._server.stop(grace_s)
