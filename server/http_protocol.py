"""What the HTTP port does before the application sees a request: HTTP that is broken, or is a smuggler's, is refused like all errors."""

import json
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from data.errors import InputError
from server.errors import message

_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(.*)", re.IGNORECASE)


class _Connection(h11.Connection):
    """h11's, which lets through what is read in one way only, and remembers what was wrong with the rest."""

    problem = ""

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_length(event)
                return _in_origin_form(event)
            return event
        except h11.RemoteProtocolError as error:
            self.problem = str(error)
            raise


class HttpProtocol(H11Protocol):
    """uvicorn's protocol, which refuses broken HTTP in plain text and without a reason."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _Connection = _Connection(h11.SERVER)

    def send_400_response(self, msg: str) -> None:
        """Refuse, and read no more: where the next request begins is unknown. A reply that has begun is the last."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reason = message(InputError(f"this is no HTTP request that can be answered: {self.conn.problem}"))
            body = json.dumps({"error": reason}).encode()
            head = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self.transport.write(head % len(body) + body)
        self.transport.close()


def _check_length(request: h11.Request) -> None:
    """Raise RemoteProtocolError for two lengths: a proxy that counts by the other one sees another next request (RFC 9112, 6.3)."""
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding; send one of them")


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The request as if its target were a path and its host a header, where it is a whole URL, as proxies send (RFC 9112, 3.2.2).

    All that looks at it sees the same path, whoever checks tokens too.
    """
    found = _ABSOLUTE.fullmatch(request.target)
    if found is None:
        return request
    host, rest = found.groups()
    headers = [(b"host", host), *(pair for pair in request.headers if pair[0] != b"host")]
    target = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
