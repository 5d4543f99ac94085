"""Connections: those that send nothing, too much or no HTTP, and those that never read, are ended by the clock."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from starlette.exceptions import HTTPException
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from tenfold.server.errors import ApiError, error_response
from tenfold.server.settings import Settings

LINGER_SECONDS = 2.0  # what a refused client still sends is thrown away for so long, or it would not read the refusal
EARLY = {"type": "http", "path": "/", "headers": []}  # a request of which nothing is known


class Connection(H11Protocol):
    """Timers: `_arrival` until the head of a request is there, `_stuck` while the client does not read."""

    settings: ClassVar[Settings]

    def __init__(
        self,
        config: Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._arrival: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arrival = self.loop.call_later(self.settings.body_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self.settings.body_seconds, self._head_is_late)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _head_is_late(self) -> None:
        self._arrival = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            limit = self.settings.body_seconds
            self._refuse(ApiError(408, f"the head of the request did not arrive within {limit:g} s"))

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, in the form of the APIs."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # half of another answer is on its way
            return
        message = f"no HTTP that can be read, or more than {self.settings.max_header_kb} KB of headers"
        self._refuse(ApiError(400, message))

    def _refuse(self, error: HTTPException) -> None:
        response = error_response(error, EARLY)
        headers = [*response.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            events = [
                h11.Response(status_code=error.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._linger()

    def _linger(self) -> None:
        """Closes once the client has had time to read, without looking at what it sends."""
        self.data_received = _ignore  # type: ignore[method-assign]
        self.transport.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        """A body that was not read to its end is thrown away for a while, then the connection ends."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._linger()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.settings.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # it would wait for the client to read, for ever
        else:
            super().timeout_keep_alive_handler()


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's protocol with the time limits of these settings."""
    return type("ServiceConnection", (Connection,), {"settings": settings})


def _ignore(data: bytes) -> None:
    """Of a client that was refused."""
