"""The way from an evaluation's process back to the served network: KServe v2 over a Unix socket that only this user can reach.

It needs no token and no certificate, takes no part in admission (there is one evaluation, and it sends one request at a time), and its
rows wait while those of clients run.
"""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from server import describe
from server.grpc_api import answering
from server.grpc_calls import ReadableCalls
from server.grpc_messages import reply_message, request_from
from server.infer_message import InferMessage
from server.service import Service, off_loop_if_large

PATIENCE_S = 60.0
"""Rows of an evaluation let those of clients pass for so long; the process gives up a request after twice that."""
STOP_S = 1.0


class _Inside(GRPCInferenceServiceServicer):
    """What `runtimes.remote` asks for."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @answering
    async def ModelConfig(self, request: Any, context: Any) -> Any:
        return ParseDict({"config": describe.model_config(self.service, request.name)}, pb.ModelConfigResponse())

    @answering
    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        return ParseDict(describe.model_metadata(self.service, request.name), pb.ModelMetadataResponse())

    @answering
    async def ModelInfer(self, request: InferMessage, context: Any) -> Any:
        wanted = await off_loop_if_large(
            request.nbytes, request_from, request, request.id, None, self.service.shared_memory
        )
        return reply_message(self.service, wanted, await self.service.infer_aside(wanted, PATIENCE_S), request.id)


@asynccontextmanager
async def evaluation_wire(service: Service) -> AsyncIterator[str]:
    """Listen while the block runs; gives the address as `--ckpt` takes it."""
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    calls = ReadableCalls(service.admission)  # it reads requests as the other listener does
    add_GRPCInferenceServiceServicer_to_server(_Inside(service), calls)
    server.add_generic_rpc_handlers((calls,))
    with tempfile.TemporaryDirectory(prefix="dinoscope-") as folder:
        socket = Path(folder) / "network"
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        try:
            yield f"grpc+unix:{socket}"
        finally:
            await server.stop(STOP_S)
