"""Who may enter: the one bound, in rows and in bytes, on everything the server has accepted and not yet answered.

Before that a flood must fit into memory too: the bytes of HTTP's bodies are counted as they come, those of gRPC's messages once they are
there, as gRPC tells no size before; therefore its calls are counted as well.
"""

import math
from contextvars import ContextVar
from dataclasses import dataclass

from server.errors import Overloaded, OverloadedLikeTriton, TooLarge
from server.statistics import Times


@dataclass(frozen=True, kw_only=True)
class AdmissionSpec:
    """The bounds."""

    max_rows: int = 256
    """Rows that may be decoded, queued or running at once; also the largest request."""
    max_bytes: int = 1 << 30
    """Bytes of encoded images, pixels and outputs that those rows may take."""
    max_reply_bytes: int = 64 << 20
    """Bytes of one reply's outputs, as they are before a wire writes them."""
    triton_codes: bool = False
    """Refuse with Triton's codes, UNAVAILABLE and 503, instead of RESOURCE_EXHAUSTED and 429."""


LEAST_CALLS = 64
accepted: ContextVar[bool] = ContextVar("accepted", default=False)
"""Whether the request at hand had come whole while the server took work: then it is finished, even if the server leaves."""


class Admission:
    """Counts what is inside. Requests beyond the bounds are refused at once, not queued."""

    def __init__(self, spec: AdmissionSpec) -> None:
        self.spec = spec
        self.rows = 0
        self.bytes = 0
        self.calls = 0
        self.streams = 0
        """Of these calls: an idle one may stay for as long as its client likes, so that they have half of the places."""
        self.max_calls = max(LEAST_CALLS, 2 * spec.max_rows)
        """Of gRPC, from a call's head to the end of its answer: twice as many as could be accepted with a row each."""
        self.body_bytes = 0
        """Of requests that are not answered yet: HTTP bodies, as far as they have come, and gRPC messages that are whole; and of replies
        that are not taken yet: large ones, and all of gRPC's streams."""
        self.working = 0
        """Requests of any kind that had come whole while the server took work, and are not answered yet."""
        self.open = True
        """Whether it does; who leaves finishes only what had come before."""
        self.rejected = 0
        self._row_s = 0.05

    def hold(self, rows: int, nbytes: int) -> "_Held":
        """Be inside for the length of the block. Raises TooLarge (never fits) or Overloaded (not now)."""
        spec = self.spec
        if rows > spec.max_rows or nbytes > spec.max_bytes:
            self.rejected += 1
            raise TooLarge(
                f"a request of {rows} rows and about {nbytes >> 20} MB is larger than this server ever takes: "
                f"{spec.max_rows} rows, {spec.max_bytes >> 20} MB; send fewer images at a time"
            )
        if self.rows + rows > spec.max_rows or self.bytes + nbytes > spec.max_bytes:
            raise self._overloaded(
                f"the queue is full: {self.rows} of {spec.max_rows} rows, {self.bytes >> 20} of {spec.max_bytes >> 20} MB"
            )
        return _Held(self, rows, nbytes)

    def begin(self) -> bool:
        """Count a request in that has come whole, unless it came too late; `end` follows where this says that it did not."""
        self.working += self.open
        accepted.set(self.open)
        return self.open

    def end(self) -> None:
        """Count it out."""
        self.working -= 1

    def enter(self, stream: bool = False) -> None:
        """Count a call in, whose message was not read yet; `leave` follows in any case. Raises Overloaded, and then it does not."""
        if self.calls >= self.max_calls:
            raise self._overloaded(f"{self.calls} calls are being answered, and more are not taken at once")
        if stream and self.streams >= self.max_calls // 2:
            raise self._overloaded(f"{self.streams} streams are open, and more are not taken at once")
        if self.body_bytes >= self.spec.max_bytes:
            raise self._too_many_bytes()
        self.calls += 1
        self.streams += stream

    def leave(self, stream: bool = False) -> None:
        """Count a call out."""
        self.calls -= 1
        self.streams -= stream

    def receive(self, nbytes: int, of_request: int) -> None:
        """Count a part of a request in, of which so much is there now; `forget` follows.

        Raises Overloaded where all requests together hold more than `max_bytes`; one that is alone may be as large as a message.
        """
        self.body_bytes += nbytes
        if self.body_bytes > max(self.spec.max_bytes, of_request):
            raise self._too_many_bytes()

    def forget(self, nbytes: int) -> None:
        """Count a request out."""
        self.body_bytes -= nbytes

    def _too_many_bytes(self) -> Overloaded:
        return self._overloaded(f"requests and replies of {self.body_bytes >> 20} MB are being read")

    def _overloaded(self, why: str) -> Overloaded:
        self.rejected += 1
        kind = OverloadedLikeTriton if self.spec.triton_codes else Overloaded
        return kind(f"{why}; try again later", self.retry_after_s())

    def learn(self, times: Times, copies: int) -> None:
        """Keep a running mean of how long a row takes where so many copies of the network share the work."""
        if times.executions:
            row_ns = sum(one.run_ns / one.batch_rows for one in times.executions) / len(times.executions)
            self._row_s += 0.1 * (row_ns / 1e9 / copies - self._row_s)

    def retry_after_s(self) -> int:
        """When what is inside now should be done: whole seconds, 1 to 60."""
        return min(60, max(1, math.ceil(self.rows * self._row_s)))


class _Held:
    """Rows and bytes that are inside for the length of a `with` block. A generator would do, and costs each request ten times as much."""

    __slots__ = ("_admission", "_nbytes", "_rows")

    def __init__(self, admission: Admission, rows: int, nbytes: int) -> None:
        self._admission, self._rows, self._nbytes = admission, rows, nbytes

    def __enter__(self) -> None:
        self._admission.rows += self._rows
        self._admission.bytes += self._nbytes

    def __exit__(self, *_: object) -> None:
        self._admission.rows -= self._rows
        self._admission.bytes -= self._nbytes
