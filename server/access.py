"""Who is asking, what they may do, and how much: bearer tokens in two scopes, and a rate for each client. For both wires.

Without a token file everyone may do everything, which is why the server then listens on this machine only. Read in this order: Access,
needed_on_http, needed_on_grpc, AccessGuard, Rates. gRPC's guard is in `grpc_calls`.
"""

import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from starlette.types import ASGIApp, Receive, Scope, Send

from data.errors import InputError
from server.errors import Forbidden, Overloaded, Unauthenticated
from server.http_body import error_reply
from server.tracing import parent

Role = Literal["use", "admin"]
MIN_TOKEN = 16
"""Characters of a token; shorter ones can be guessed."""
client: ContextVar[str] = ContextVar("client", default="")
"""Who sent the request at hand: the name of its token, else its address. Set by both wires, read by the rate and the log."""

_OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
_OPEN_METHODS = frozenset({"ServerLive", "ServerReady", "Check", "Watch"})
_ADMIN_METHODS = frozenset(
    {"RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"}
)
_READING_POSTS = re.compile(r"/v1/collections/[^/]+/(search|classify)")
_ADMIN_PATHS = ("/v1/collections", "/v1/evaluations", "/v2/repository/models", "/v2/systemsharedmemory")
_MAX_CLIENTS = 10_000
_COMMENT = re.compile(r"(?:^|\s)#")
"""Where a comment begins; within a word # belongs to a token."""


@dataclass(frozen=True)
class Token:
    """One line of the token file; the token itself is not kept."""

    name: str
    role: Role
    digest: bytes


class Access:
    """The tokens of a server. None: everyone may do everything."""

    def __init__(self, tokens: Sequence[Token] | None = None) -> None:
        self._tokens = tokens

    @property
    def wants_tokens(self) -> bool:
        """Whether anything is closed to those without one."""
        return self._tokens is not None

    @staticmethod
    def from_file(path: Path) -> "Access":
        """Lines `NAME use|admin TOKEN`, and comments after #. Raises InputError, which never shows a token."""
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {path}: cannot be read ({type(error).__name__})") from error
        tokens = []
        for number, line in enumerate(lines, start=1):
            words = _COMMENT.split(line)[0].split()
            if not words:
                continue
            good = len(words) == 3 and words[1] in get_args(Role) and len(words[2]) >= MIN_TOKEN
            if not good or not words[2].isascii():  # headers carry nothing else, as each client thinks best
                raise InputError(
                    f"--token-file {path}, line {number}: wanted NAME, use or admin, and a token of {MIN_TOKEN} ASCII characters or more"
                )
            role: Role = "admin" if words[1] == "admin" else "use"
            tokens.append(Token(words[0], role, _digest(words[2])))
        if not tokens:
            raise InputError(f"--token-file {path}: holds no token; wanted lines of NAME, use or admin, TOKEN")
        if len({token.name for token in tokens}) < len(tokens):
            raise InputError(f"--token-file {path}: a name stands in two lines; give each token its own")
        return Access(tokens)

    def check(self, authorization: str | None, needed: Role | None, address: str) -> str:
        """The client's name for the rate and the log. Raises Unauthenticated or Forbidden.

        Every token is compared, in constant time, so that the time taken tells nothing.
        """
        if self._tokens is None or needed is None:
            return address
        kind, _, given = (authorization or "").partition(" ")
        digest, found = _digest(given.strip()), None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        if kind.lower() != "bearer" or found is None:
            raise Unauthenticated(
                "this server wants a token that it knows, in the header 'authorization: Bearer TOKEN'"
            )
        if needed == "admin" and found.role != "admin":
            raise Forbidden(f"the token {found.name!r} may use models and search; this wants one with the scope admin")
        return found.name


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def needed_on_http(method: str, path: str) -> Role | None:
    """What a route asks for; None where it is open to everyone."""
    if path in _OPEN_PATHS:
        return None
    reads = method in ("GET", "HEAD") or _READING_POSTS.fullmatch(path)
    return "admin" if path.startswith(_ADMIN_PATHS) and not reads else "use"


def needed_on_grpc(method: str) -> Role | None:
    """The same for an RPC, by its name without the service."""
    if method in _OPEN_METHODS:
        return None
    return "admin" if method in _ADMIN_METHODS else "use"


class AccessGuard:
    """ASGI middleware: nobody gets past it without the token that the route asks for."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        address = (scope.get("client") or ("unknown",))[0]
        given = headers.get(b"authorization")
        try:
            name = self.access.check(
                given and given.decode("latin-1"), needed_on_http(scope["method"], scope["path"]), address
            )
        except (Unauthenticated, Forbidden) as error:
            reply = error_reply(error, scope.get("state", {}).get("request_id", ""))
            if isinstance(error, Unauthenticated):
                reply.headers["www-authenticate"] = "Bearer"
            await reply(scope, receive, send)
            return
        client.set(name)
        parent.set(headers.get(b"traceparent", b"").decode("latin-1"))
        await self.app(scope, receive, send)


class Rates:
    """Rows a second for each client, as a bucket that refills: a burst of ten seconds' worth, then the rate."""

    def __init__(self, rows_per_s: float | None) -> None:
        self._rate = rows_per_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, rows: int) -> None:
        """Count rows of a client. Raises Overloaded, which says when they would be taken."""
        if self._rate is None:
            return
        most, now = max(10 * self._rate, 1.0), time.monotonic()
        left, since = self._buckets.pop(name, (most, now))
        left = min(most, left + (now - since) * self._rate)
        # A request larger than the bucket passes when it is full, and leaves a debt.
        enough = left >= min(rows, most)
        self._buckets[name] = (left - rows if enough else left, now)
        while len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not enough:
            wait_s = math.ceil((min(rows, most) - left) / self._rate)
            raise Overloaded(f"this client sends more than {self._rate:g} rows a second; try again later", wait_s)
