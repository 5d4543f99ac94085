"""Answers on the wire: whole, or as server-sent events; either way the work ends when the client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tenfold.server.callers import Caller
from tenfold.server.errors import ApiError, error_body
from tenfold.server.generation import Generation

T = TypeVar("T")
HEARTBEAT = ": still working\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # a proxy is to pass each event on at once
log = logging.getLogger("tenfold")


def event(data: object, name: str | None = None) -> str:
    """A server-sent event; its data is JSON, or a word."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


class EventStream(Response):
    """Sends events while a generation makes them. What fails after the first of them is told as an event, too."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], generation: Generation, fail: Callable[[ApiError], str]) -> None:
        """fail: the event that tells of an error."""
        self.status_code, self.background = 200, None
        self.body = b""
        self.init_headers({**HEADERS})
        self._events, self._generation, self._fail = events, generation, fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await until_gone(receive, self._send(send), self._generation)

    async def _send(self, send: Send) -> None:
        async for text in self._told():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _told(self) -> AsyncIterator[str]:
        try:
            async for text in self._events:
                yield text
        except ApiError as error:
            yield self._fail(error)
        except Exception:
            log.exception("an answer failed")
            yield self._fail(ApiError(500, "the service failed; its log says why"))


def openai_failure(error: ApiError) -> str:
    return event(error_body(error, anthropic=False)) + event("[DONE]")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], generation: Generation) -> T | None:
    """The result of work on a generation, which is closed after it; None where the client hung up before."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        for task in (working, gone):
            with suppress(asyncio.CancelledError, Exception):
                await task
        await generation.close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Coroutine[Any, Any, T], generation: Generation) -> T:
    """As `until_gone`, for an answer that is sent in one piece. Raises ApiError."""
    result = await until_gone(request.receive, work, generation)
    if result is None:
        raise ApiError(499, "the client hung up")
    return result


def caller_of(request: Request) -> Caller | None:
    """The key with which a request came; None where none is needed."""
    return getattr(request.state, "caller", None)
