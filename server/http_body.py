"""HTTP bodies in and out: limits, compression, uploads, errors as JSON, and callers who leave before their answer."""

import asyncio
import gzip
import io
import logging
import re
import uuid
import zlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import MutableHeaders, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.errors import InputError
from server.admission import Admission
from server.errors import Disconnected, Draining, TooLarge, TooSlow, message, outcome, retry_after
from server.patience import BODY_S

T = TypeVar("T")
log = logging.getLogger("server")

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
READING = ("GET", "HEAD")
MAX_FILES = 1024
MAX_FIELDS = 4096
MIN_COMPRESSED_BYTES = 512
REPLY_BYTES = 1 << 18
"""A larger reply goes out in parts of so many, each when its client has taken most of what was before it."""
LEAST_BYTES = 1 << 17
"""So much more of a body, or the rest of it, has to come each time that `Guard.body_s` has passed: 2 KB a second."""
PART_BYTES, STEP_BYTES = 1 << 15, 1 << 20
"""A compressed body is read in parts of so many bytes, and unpacks to at most so many before they are counted."""


class Guard:
    """ASGI middleware around every route: names the request, bounds its body and all bodies, and turns what it raises into a reply."""

    body_s = BODY_S

    def __init__(self, app: ASGIApp, max_bytes: int, admission: Admission) -> None:
        self.app, self.max_bytes, self.admission = app, max_bytes, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        started, body = False, _Body(self.admission, scope["method"] in READING)
        state["body"] = body

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await (body.answer(send, message) if len(message.get("body", b"")) > REPLY_BYTES else send(message))

        try:
            if _has_no_body(scope):
                body.end()
            await self.app(scope, self._bounded(scope, receive, body), named)
        except ClientDisconnect:
            log.debug("client left", extra={"fields": {"id": request_id}})
        except asyncio.CancelledError:  # the server leaves, and waited long enough for the rest of this request
            if started:
                raise
            await error_reply(Draining("the server is shutting down"), request_id)(scope, receive, named)
        except Exception as error:
            if started:
                raise
            await error_reply(error, request_id)(scope, receive, named)
        finally:
            body.forget()

    def _bounded(self, scope: Scope, receive: Receive, body: "_Body") -> Receive:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = length.isdigit() and int(length) > self.max_bytes
        whole = False  # then the next message is the client's departure, and may take as long as the answer

        async def bounded() -> Message:
            nonlocal too_large, whole
            if not too_large:
                try:
                    async with asyncio.timeout_at(None if whole else body.due_s(self.body_s)):
                        message = await receive()
                except TimeoutError as error:
                    told = f"less than {LEAST_BYTES >> 10} KB of the body came in {self.body_s:g} s; send it again"
                    raise TooSlow(told) from error
                body.receive(len(message.get("body", b"")))
                too_large = body.nbytes > self.max_bytes
                if not (whole or too_large or message.get("more_body", False)):
                    whole = True
                    body.end()
            if too_large:
                raise TooLarge(
                    f"the request body is larger than {self.max_bytes >> 20} MB; send fewer images at a time"
                )
            return message

        return bounded


@dataclass
class _Body:
    """What one holds: as much as has come of it, as much as that was unpacked to, and a large reply until its client has taken it."""

    admission: Admission
    reads: bool
    """Whether the request changes nothing, so that it is answered to the last."""
    nbytes: int = 0
    untaken: int = 0
    working: bool = False
    wanted: int = 0
    wanted_s: float = 0.0

    def due_s(self, body_s: float) -> float:
        """When what is wanted next of it has to be there, in the loop's own time; a byte now and then wins none."""
        if self.nbytes >= self.wanted:
            self.wanted = self.nbytes + LEAST_BYTES
            self.wanted_s = asyncio.get_running_loop().time() + body_s
        return self.wanted_s

    def receive(self, part: int) -> None:
        """Count so many bytes more, until the request is answered. Raises Overloaded."""
        self.nbytes += part
        self.admission.receive(part, self.nbytes)

    def end(self) -> None:
        """It has come whole: from now on a server that leaves waits for the answer. Raises Draining where that came too late."""
        self.working = self.working or self.admission.begin()
        if not (self.working or self.reads):
            raise Draining("the server is shutting down")

    async def answer(self, send: Send, message: Message) -> None:
        """Send a large reply. It counts until it is gone; while such hold too much, nothing more is read."""
        reply: bytes = message["body"]
        self.untaken += len(reply)
        self.admission.body_bytes += len(reply)
        for start in range(0, len(reply), REPLY_BYTES):
            more = message.get("more_body", False) or start + REPLY_BYTES < len(reply)
            await send({**message, "body": reply[start : start + REPLY_BYTES], "more_body": more})

    def forget(self) -> None:
        """The request is answered, or given up."""
        self.admission.forget(self.nbytes + self.untaken)
        if self.working:
            self.admission.end()


def _has_no_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:12]


def error_reply(error: Exception, request_id: str) -> JSONResponse:
    """The error as every route reports it: `{"error": one line}` with the status of the error table."""
    # The rest of a request that was given up on would be taken for the next one.
    closing = {"connection": "close"} if isinstance(error, TooSlow) else {}
    return JSONResponse({"error": message(error, request_id)}, outcome(error).http_status, retry_after(error) | closing)


async def whole(request: Request) -> None:
    """For routes that want no body: one that comes all the same comes to its end before they begin, as others do."""
    await request.body()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, decompressed.

    Raises InputError for broken compression, TooLarge beyond `max_bytes`, Overloaded where all bodies together take too much memory.
    """
    body = await request.body()
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding == "identity":
        return body
    if coding not in ("gzip", "deflate"):
        raise InputError(f"Content-Encoding {coding!r:.40}: wanted gzip, deflate or none")
    plain, steps = io.BytesIO(), _unpacked(body, coding)
    while step := await asyncio.to_thread(next, steps, b""):
        if plain.tell() + len(step) > max_bytes:
            raise TooLarge(f"the decompressed body is larger than {max_bytes >> 20} MB; send fewer images at a time")
        request.state.body.receive(len(step))
        plain.write(step)
    return plain.getvalue()


def _unpacked(body: bytes, coding: str) -> Iterator[bytes]:
    """What a body unpacks to, in steps that are not empty; gzip may have several members (RFC 1952). Raises InputError."""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    for start in range(0, len(body), PART_BYTES):
        rest, full = body[start : start + PART_BYTES], False
        while rest or full:  # what fills a step may go on without anything more to read
            if inflater.eof:
                if coding != "gzip":
                    raise InputError(f"more follows the end of the {coding} body; send nothing after it")
                inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
            try:
                step = inflater.decompress(rest, STEP_BYTES)
            except zlib.error as error:
                raise InputError(f"the body is not {coding}, as its Content-Encoding says ({error})") from error
            rest = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            full = len(step) == STEP_BYTES and not inflater.eof
            if step:
                yield step
    if not inflater.eof:
        raise InputError(f"the {coding} body is cut short")


def compressed(request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
    """The reply's body and headers, compressed where the client asks for exactly one coding that is known here.

    A list of codings is what HTTP libraries send unasked; dense floats barely shrink, so such clients get plain bytes.
    """
    coding = request.headers.get("accept-encoding", "").strip().lower()
    if coding not in ("gzip", "deflate") or len(body) < MIN_COMPRESSED_BYTES:
        return body, {}
    packed = gzip.compress(body, 1) if coding == "gzip" else zlib.compress(body, 1)
    return packed, {"content-encoding": coding}


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it as soon as the client is gone. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected("the client closed the connection")
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class Upload:
    """Images of one request with what came beside them."""

    images: tuple[bytes, ...]
    names: tuple[str, ...]
    """File names as the client gave them; for showing only, never a path."""
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)


class _MemoryParser(MultiPartParser):
    spool_max_size = 1 << 62
    """Never to disk: the body is bounded already."""


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """Images from a multipart form (any file fields, in order) or from a raw image body. Raises InputError."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _read_form(request)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = await read_body(request, max_bytes)
        upload = Upload((body,) if body else (), ("image",))
    else:
        raise InputError(
            f"Content-Type {kind or 'is missing'}: wanted multipart/form-data with image files, or image/*"
        )
    if not upload.images:
        raise InputError("no image came: send one or more files in a multipart form, or an image as the body")
    return upload


async def _read_form(request: Request) -> Upload:
    parser = _MemoryParser(request.headers, request.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InputError(f"the multipart form is broken: {getattr(error, 'message', error)}") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    fields: dict[str, tuple[str, ...]] = {}
    for name, value in form.multi_items():
        _check_text(name, value if isinstance(value, str) else value.filename or "")
        if isinstance(value, str):
            fields[name] = (*fields.get(name, ()), value)
    images = tuple([await file.read() for file in files])
    return Upload(images, tuple(file.filename or "image" for file in files), fields)


def _check_text(name: str, text: str) -> None:
    """Raise InputError for half a character, which some of the encodings that a form may name can say."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"field {name!r:.80} is {text!r:.40}, which is no text; send the form in UTF-8") from error
