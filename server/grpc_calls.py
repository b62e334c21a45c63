"""The bound on gRPC calls that are inside at once."""

import asyncio
from typing import Any

import grpc

from server.access import needed_on_grpc
from server.admission import Admission
from server.errors import Overloaded, message, outcome, retry_after


class BoundCalls(grpc.aio.ServerInterceptor):
    """Refuses calls beyond `Admission.max_calls` before their messages are read; what is open to everyone, as health, is never refused.

    gRPC's own `maximum_concurrent_rpcs` would refuse health too.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, or one that refuses."""
        if needed_on_grpc(details.method.rpartition("/")[2]) is not None:
            try:
                self.admission.enter()
            except Overloaded as error:
                return _refusing(error)
            call = asyncio.current_task()  # it lives as long as the call, whatever becomes of that
            assert call is not None
            call.add_done_callback(self._left)
        return await continuation(details)

    def _left(self, _: "asyncio.Task[Any]") -> None:
        self.admission.leave()


def _refusing(error: Overloaded) -> Any:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        metadata = tuple(retry_after(error).items())
        await context.abort(outcome(error).grpc_code, message(error), trailing_metadata=metadata)

    return grpc.stream_unary_rpc_method_handler(refuse)  # of a stream, nothing is read unasked
