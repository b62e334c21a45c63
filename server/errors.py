"""What can go wrong with a request, and the one table that turns it into a gRPC code and an HTTP status.

Everything below the wires raises these (or `data.errors.InputError`); everything on a wire asks `outcome`.
"""

import logging
from dataclasses import dataclass

import grpc

from data.errors import InputError

log = logging.getLogger("server")

MAX_MESSAGE = 1000
"""Bytes of a message. gRPC sends it as a header, three for each that is not ASCII, and refuses replies by chance whose headers have more
than 8 KB."""


class ServerError(Exception):
    """A request that was not answered; the message is one line and is meant for the client."""


class NotFound(ServerError):
    """An unknown model, version, collection, item, evaluation or route."""


class Unauthenticated(ServerError):
    """No token came, or one that is unknown."""


class Forbidden(ServerError):
    """The token's scope does not cover what was asked for."""


class Conflict(ServerError):
    """The request is well formed, but what it names is in the way: other weights, an id that is taken, a busy slot."""


class TooLarge(ServerError):
    """More rows or bytes in one request than will ever be accepted: waiting does not help."""


class Overloaded(ServerError):
    """The queue is full; the same request may succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedLikeTriton(Overloaded):
    """The same in the codes that Triton uses, for clients and load balancers made for it."""


class Expired(ServerError):
    """The deadline that the client gave has passed."""


class TooSlow(ServerError):
    """The client stopped sending in the middle of a request, or nearly so."""


class Disconnected(ServerError):
    """The client left before its answer was ready; nobody reads this message."""


class Draining(ServerError):
    """The server is about to exit and takes no new work."""


class StorageFailed(ServerError):
    """The collections store cannot be read or written, for example because the disk is full."""


class EngineFailed(ServerError):
    """The network, or another part of the server, failed on good input. The cause is in the log, not in the reply."""


@dataclass(frozen=True)
class Outcome:
    """How one kind of error looks on each wire."""

    grpc_code: grpc.StatusCode
    http_status: int
    reason: str
    """Label of the failure counter: REJECTED, CANCELED, BACKEND or OTHER, as Triton names them."""


_TABLE: tuple[tuple[type[BaseException], Outcome], ...] = (
    (NotFound, Outcome(grpc.StatusCode.NOT_FOUND, 404, "OTHER")),
    (Unauthenticated, Outcome(grpc.StatusCode.UNAUTHENTICATED, 401, "REJECTED")),
    (Forbidden, Outcome(grpc.StatusCode.PERMISSION_DENIED, 403, "REJECTED")),
    (Conflict, Outcome(grpc.StatusCode.FAILED_PRECONDITION, 409, "OTHER")),
    (TooLarge, Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "REJECTED")),
    (OverloadedLikeTriton, Outcome(grpc.StatusCode.UNAVAILABLE, 503, "REJECTED")),
    (Overloaded, Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "REJECTED")),
    (Expired, Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "CANCELED")),
    (TooSlow, Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "CANCELED")),
    (Disconnected, Outcome(grpc.StatusCode.CANCELLED, 499, "CANCELED")),
    (Draining, Outcome(grpc.StatusCode.UNAVAILABLE, 503, "REJECTED")),
    (StorageFailed, Outcome(grpc.StatusCode.UNAVAILABLE, 507, "BACKEND")),
    (InputError, Outcome(grpc.StatusCode.INVALID_ARGUMENT, 400, "OTHER")),
    (BaseException, Outcome(grpc.StatusCode.INTERNAL, 500, "BACKEND")),
)


def outcome(error: BaseException) -> Outcome:
    """The row of the table that fits `error`; whatever is not listed is an internal error."""
    return next(row for kind, row in _TABLE if isinstance(error, kind))


def message(error: BaseException, request_id: str = "") -> str:
    """The one line that the client may see.

    An internal error says no more than that it happened and under which request id its traceback was logged.
    """
    if outcome(error).http_status != 500:
        return " ".join(str(error).split()).encode("utf-8", "backslashreplace")[:MAX_MESSAGE].decode(errors="ignore")
    log.error("internal error", exc_info=error, extra={"fields": {"id": request_id}})
    return (
        f"the server failed on this request; its log has the details{f' under id {request_id}' if request_id else ''}"
    )


def retry_after(error: BaseException) -> dict[str, str]:
    """The header (HTTP) or trailing metadata (gRPC) that tells an overloaded client when to come back."""
    return {"retry-after": str(error.retry_after_s)} if isinstance(error, Overloaded) else {}
