"""The process of the service: from a model to a socket, and to a good end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tenfold.server.settings import Settings
from tenfold.server.wire import protocol

BACKLOG = 1024  # connections that wait to be taken
CLOSING_SECONDS = 5.0  # for answers to tell that they were cut off


def serve(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT; then takes no more, and lets those on their way end.

    listener: of `bound`. Raises OSError where another process has begun to listen at its address since.
    """
    host, port = listener.getsockname()[:2]
    with _naming(host, port):
        listener.listen(BACKLOG)
    print(f"listening on http://{_shown(host)}:{port}", file=sys.stderr, flush=True)
    make_server(app, settings).run([listener])


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the address; connections are refused until it listens.

    Raises OSError where the address can't be had.
    """
    with _naming(host, port):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart would have to wait a minute
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # systems differ in what they take it for
        with _naming(host, port):
            listener.bind(address)
        yield listener


@contextmanager
def _naming(host: str, port: int) -> Iterator[None]:
    """Errors of sockets, with the address and what to do."""
    try:
        yield
    except OSError as error:
        advice = f"{error.strerror}; choose another with --host and --port"
        raise OSError(error.errno, advice, f"{_shown(host)}:{port}") from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def make_server(app: FastAPI, settings: Settings) -> DrainingServer:
    config = uvicorn.Config(
        app,
        http=protocol(settings),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_kb * 1024,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.drain_seconds + CLOSING_SECONDS) + 1,
    )
    return DrainingServer(config, app, settings.drain_seconds)


class DrainingServer(uvicorn.Server):
    """Ends with what it has begun, and then with exit code 0."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = app.state.service, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second SIGINT ends it at once. The signals are not raised again afterwards: this is a good end."""
        self._service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(self._drain_seconds, self._service.generations.stop_all)
        await super().shutdown(sockets)
        cut.cancel()
        await self._service.engine.drain(0)
