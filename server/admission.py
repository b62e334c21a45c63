"""Who may enter: the one bound, in rows and in bytes, on everything the server has accepted and not yet answered."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import Overloaded, OverloadedLikeTriton, TooLarge


@dataclass(frozen=True, kw_only=True)
class AdmissionSpec:
    """The bounds."""

    max_rows: int = 256
    """Rows that may be decoded, queued or running at once; also the largest request."""
    max_bytes: int = 1 << 30
    """Bytes of encoded images, pixels and outputs that those rows may take."""
    triton_codes: bool = False
    """Refuse with Triton's codes, UNAVAILABLE and 503, instead of RESOURCE_EXHAUSTED and 429."""


class Admission:
    """Counts what is inside. Requests beyond the bounds are refused at once, not queued."""

    def __init__(self, spec: AdmissionSpec) -> None:
        self.spec = spec
        self.rows = 0
        self.bytes = 0
        self.rejected = 0
        self._row_s = 0.05

    @contextmanager
    def hold(self, rows: int, nbytes: int) -> Iterator[None]:
        """Be inside for the length of the block. Raises TooLarge (never fits) or Overloaded (not now)."""
        spec = self.spec
        if rows > spec.max_rows or nbytes > spec.max_bytes:
            self.rejected += 1
            raise TooLarge(
                f"a request of {rows} rows and about {nbytes >> 20} MB is larger than this server ever takes: "
                f"{spec.max_rows} rows, {spec.max_bytes >> 20} MB; send fewer images at a time"
            )
        if self.rows + rows > spec.max_rows or self.bytes + nbytes > spec.max_bytes:
            self.rejected += 1
            kind = OverloadedLikeTriton if spec.triton_codes else Overloaded
            raise kind(
                f"the queue is full: {self.rows} of {spec.max_rows} rows, {self.bytes >> 20} of "
                f"{spec.max_bytes >> 20} MB; try again later",
                self.retry_after_s(),
            )
        self.rows += rows
        self.bytes += nbytes
        try:
            yield
        finally:
            self.rows -= rows
            self.bytes -= nbytes

    def learn(self, rows: int, infer_ns: int) -> None:
        """Keep a running mean of what one row costs."""
        self._row_s += 0.1 * (infer_ns / 1e9 / rows - self._row_s)

    def retry_after_s(self) -> int:
        """When what is inside now should be done: whole seconds, 1 to 60."""
        return min(60, max(1, math.ceil(self.rows * self._row_s)))
