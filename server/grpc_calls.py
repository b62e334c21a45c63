"""What a gRPC call passes before its RPC sees it: the bound on calls, the token, a message in time, a reader that never raises; and how an
error ends it.

Read in this order: ReadableCalls, GuardedCalls, Messages, guarded, abort.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError as ProtobufError

from data.errors import InputError
from server.access import Access, Role, client, needed_on_grpc
from server.admission import Admission
from server.errors import Forbidden, Overloaded, TooSlow, Unauthenticated, message, outcome, retry_after
from server.http_body import REPLY_BYTES
from server.infer_message import read_infer
from server.patience import BODY_S
from server.tracing import parent


class ReadableCalls(grpc.GenericRpcHandler):
    """The RPCs of the servicers that stubs add to it as they would to a server, each with a reader that never raises.

    Servicers that are added to grpc.aio's own server register each RPC there: a task waits for the next call of each, and every call
    goes through the tasks of all of them. As one handler of everything they cost a call nothing.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission, self.messages = admission, Messages()
        self._added: list[grpc.GenericRpcHandler] = []
        self._found: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Offer these too; stubs call it."""
        self._added.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Stubs call it with the same once more."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler; None where it has none."""
        handler = self._found.get(details.method)
        if handler is None:
            found = (one.service(details) for one in self._added)
            handler = next((guarded(one, details.method, self.admission, self.messages) for one in found if one), None)
            if handler is not None:
                self._found[details.method] = handler
        return handler


class GuardedCalls(ReadableCalls):
    """Refuses calls beyond what `Admission` takes, and calls without the token that they need, before their messages are read.

    What is open to everyone, as health, is never refused; gRPC's own `maximum_concurrent_rpcs` would refuse that too.
    """

    def __init__(self, admission: Admission, access: Access) -> None:
        super().__init__(admission)
        self.access = access
        self._needed: dict[str, Role | None] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, or one that refuses. In the task of the call."""
        handler = super().service(details)
        if handler is None:
            return None
        if details.method not in self._needed:
            self._needed[details.method] = needed_on_grpc(details.method.rpartition("/")[2])
        needed = self._needed[details.method]
        try:
            if needed is not None:
                self._enter(handler.request_streaming and handler.response_streaming)
            given = dict(reversed(details.invocation_metadata))  # the first of a name counts
            client.set(self.access.check(given.get("authorization"), needed, ""))
            parent.set(given.get("traceparent", ""))
        except (Overloaded, Unauthenticated, Forbidden) as error:
            return _refusing(error)
        return handler

    def _enter(self, stream: bool) -> None:
        self.admission.enter(stream)
        call = asyncio.current_task()  # it lives as long as the call, whatever becomes of that
        assert call is not None
        call.add_done_callback(self._stream_left if stream else self._left)

    def _left(self, _: "asyncio.Task[Any]") -> None:
        self.admission.leave()

    def _stream_left(self, _: "asyncio.Task[Any]") -> None:
        self.admission.leave(stream=True)


class Messages:
    """The message of each unary call. A call whose message has not come whole in time is ended: it would hold its place for ever.

    gRPC itself closes only connections whose other end is gone, and tells nothing of a message that is half there. One timer serves all
    calls, as one for each would cost more than the rest of this.
    """

    whole_s = BODY_S
    """From a call's head to the end of its message, of which all must come in the time that HTTP has between two parts of a body."""

    def __init__(self) -> None:
        self._since: dict[asyncio.Task[Any], float] = {}
        """Tasks that read, the oldest first."""
        self._late: set[asyncio.Task[Any]] = set()
        self._look: asyncio.TimerHandle | None = None

    async def read(self, context: grpc.aio.ServicerContext) -> Any:
        """The call's message. Raises TooSlow where it does not come, InputError where the call ends without one."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._since[task] = loop.time()
        if self._look is None:
            self._look = loop.call_later(self.whole_s, self._end_late, loop)
        try:
            request = await context.read()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            task.uncancel()
            raise TooSlow(
                f"the request did not come whole within {self.whole_s:g} s; send fewer images at a time"
            ) from None
        finally:
            self._since.pop(task, None)
            self._late.discard(task)
        if request is grpc.aio.EOF:
            raise InputError("the call has no message; send one")
        return request

    def _end_late(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the calls that are due, and look again when the next one is."""
        self._look = None
        for task, since in list(self._since.items()):
            due = since + self.whole_s
            if due > loop.time():
                self._look = loop.call_at(due, self._end_late, loop)
                return
            del self._since[task]
            self._late.add(task)
            task.cancel()


def _host(peer: str) -> str:
    """`ipv4:127.0.0.1:5000` without scheme and port: a client keeps its name over its connections."""
    return peer.partition(":")[2].rpartition(":")[0] or peer


def _name(context: grpc.aio.ServicerContext) -> None:
    """A client without a token is known by its address."""
    if not client.get():
        client.set(_host(context.peer()))


def _refusing(error: Exception) -> Any:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        await abort(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)  # of a stream, nothing is read unasked


def guarded(handler: Any, method: str, admission: Admission, messages: Messages) -> Any:
    """The handler with a reader that never raises, and with its client's name; a server that leaves waits for its answer.

    Bytes that are no message of the protocol are the client's mistake, not an exception of the server. An RPC that is not offered is
    refused unread. The health service's Watch stays as it is: it is open. A unary RPC is given to gRPC as one of a stream, since it
    reads the message of the others before we know of the call, and leaves a client without an answer whose call is ended then. Replies
    are given to gRPC as bytes.
    """
    method = method.rpartition("/")[2]
    if handler.stream_stream is not None:

        async def answer_stream(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            _name(context)
            async with contextlib.aclosing(handler.stream_stream(requests, context)) as answers:
                async for one in answers:
                    yield one

        reader = _reader(handler, method)
        return grpc.stream_stream_rpc_method_handler(answer_stream, reader, bytes)
    if handler.unary_unary is None:
        return handler
    offered = asyncio.iscoroutinefunction(handler.unary_unary)

    async def answer(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        _name(context)
        if not offered:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not offered by this server")
        try:
            request = await messages.read(context)
        except (InputError, TooSlow) as error:
            await abort(context, error)
        if isinstance(request, InputError):
            await abort(context, request)
        counted = admission.begin()
        try:
            reply: bytes = handler.response_serializer(await handler.unary_unary(request, context))
        finally:
            if counted:
                admission.end()
        if len(reply) > REPLY_BYTES:
            _count_until_taken(len(reply), context, admission)
        return reply

    return grpc.stream_unary_rpc_method_handler(answer, _reader(handler, method) if offered else bytes, bytes)


def _count_until_taken(nbytes: int, context: grpc.aio.ServicerContext, admission: Admission) -> None:
    """A large reply counts until its client has taken it, or has gone: gRPC itself waits for that without an end."""
    admission.body_bytes += nbytes
    context.add_done_callback(lambda _: admission.forget(nbytes))


def _reader(handler: Any, method: str) -> Callable[[bytes], Any]:
    """Bytes to a message, or to the InputError that is told instead."""
    parse = read_infer if method in ("ModelInfer", "ModelStreamInfer") else handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except ProtobufError:
            return InputError(f"the request's {len(data)} bytes are not a {method} message of the protocol")

    return read


async def abort(context: grpc.aio.ServicerContext, error: Exception, request_id: str = "") -> NoReturn:
    """End the call with the code and message of the error table."""
    metadata = tuple(retry_after(error).items())
    await context.abort(outcome(error).grpc_code, message(error, request_id), trailing_metadata=metadata)
    raise AssertionError("abort always raises")
