"""How long the HTTP port waits for a client that has begun to speak: connections that stall are closed, or they would add up."""

import asyncio
from typing import Any

import h11

from server.http_protocol import HttpProtocol

HEAD_S = 30.0
"""From a connection's first moment, or from a further request's first byte, to the end of its head; and for the rest of a request that was
answered before it had come whole, as one without its token is."""
BODY_S = 60.0
"""For each 128 KB of a body to come, and for a client to take what is there of its reply: no more than 320 KB, 5 KB a second."""
KEEP_ALIVE_S = 75
"""Between requests: longer than the minute of most proxies, so that it is they who close, and not we while a request is on its way."""


class PatientProtocol(HttpProtocol):
    """A protocol that minds more than connections which idle between requests, as uvicorn's does by itself."""

    head_s, reply_s = HEAD_S, BODY_S
    _giving_up: asyncio.TimerHandle | None = None
    _rest_due = False
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A head is due."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """A head is due, or has come; more bytes of it win no time."""
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        """A further head is due if some of it came along with the last request, or the rest of that request, which nobody reads.

        Where this reply is the last, it is due to be taken.
        """
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_taking()
        if self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_waiting()
        self._taken()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        self._expect_taking()

    def send_400_response(self, msg: str) -> None:
        """What came is the last that is read."""
        super().send_400_response(msg)
        self._expect_taking()

    def pause_writing(self) -> None:
        """More of a reply is there than the client has taken."""
        super().pause_writing()
        self._expect_taking()

    def resume_writing(self) -> None:
        """It has taken most of it; at the end it must take all, or the connection would never close."""
        if not self.transport.is_closing():
            self._taken()
        super().resume_writing()

    def _expect_taking(self) -> None:
        if self._untaken is None:
            self._untaken = self.loop.call_later(self.reply_s, self.transport.abort)

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _expect_head(self) -> None:
        rest_due = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        due = self.conn.their_state is h11.IDLE or rest_due
        if not due or rest_due is not self._rest_due:
            self._stop_waiting()
        self._rest_due = rest_due
        if due and self._giving_up is None:
            self._giving_up = self.loop.call_later(self.head_s, self._give_up)

    def _give_up(self) -> None:
        self.transport.close()
        self._expect_taking()

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
