"""What stands before the routes: limits of headers and bodies, keys, and the time that a request has to arrive."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenfold.server.callers import Caller, Callers
from tenfold.server.errors import ApiError, error_response
from tenfold.server.metrics import Metrics
from tenfold.server.settings import Settings

log = logging.getLogger("tenfold")


class Gate:
    """Refuses what is too large, too slow or without a key, before any of the body is read where that can be told."""

    def __init__(
        self, app: ASGIApp, settings: Settings, callers: Callers | None, metrics: Metrics, public: frozenset[str]
    ) -> None:
        """public: the paths that need no key; all others do."""
        self._app, self._settings, self._callers, self._metrics, self._public = app, settings, callers, metrics, public
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(send, self._metrics)
        self._open += 1
        self._metrics.open.set(self._open)
        try:
            await self._answer(scope, receive, answer.send)
        except Exception as error:
            if answer.begun:
                raise  # the connection is closed in the middle of the answer: there is no other way to tell
            if not isinstance(error, ApiError):
                log.exception("a request failed")
                error = ApiError(500, "the service failed; its log says why")
            await error_response(error, scope)(scope, receive, answer.send)
        finally:
            self._open -= 1
            self._metrics.open.set(self._open)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError before the answer has begun."""
        self._check_head(scope)
        caller = self._caller(scope)
        scope.setdefault("state", {})["caller"] = caller
        posts = scope["method"] == "POST"
        with caller.request() if caller is not None and posts else nullcontext():
            if posts:
                receive = replay(await self._body(scope, receive), receive)
            await self._app(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        if self._open > self._settings.max_connections:
            raise ApiError(429, f"{self._open - 1} requests are open already; ask again later", retry_after=5)
        headers = scope["headers"]
        if len(headers) > self._settings.max_headers:
            raise ApiError(431, f"{len(headers)} headers came, at most {self._settings.max_headers} are read")
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(a) + len(b) for a, b in headers)
        if size > self._settings.max_header_kb * 1024:
            limit = self._settings.max_header_kb
            raise ApiError(431, f"address and headers have {size >> 10} KB, at most {limit} KB are read")
        length = Headers(scope=scope).get("content-length", "0")
        if int(length) > self._limit:  # the parser has checked that it is a number
            raise self._too_large(int(length))

    def _caller(self, scope: Scope) -> Caller | None:
        if self._callers is None or scope["path"] in self._public:
            return None
        headers = Headers(scope=scope)
        kind, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not secret:
            message = "no API key came: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            raise ApiError(401, message, code="missing_api_key")
        caller = self._callers.find(secret)
        if caller is None:
            raise ApiError(401, "the API key is not known here; tenfold keys add makes one", code="invalid_api_key")
        return caller

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b""
                    chunks.append(message.get("body", b""))
                    size, more = size + len(chunks[-1]), message.get("more_body", False)
                    if size > self._limit:
                        raise self._too_large(size)
        except TimeoutError:
            limit = self._settings.body_seconds
            raise ApiError(408, f"the body did not arrive within {limit:g} s; send it faster") from None
        return b"".join(chunks)

    @property
    def _limit(self) -> int:
        return int(self._settings.max_body_mb * 1e6)

    def _too_large(self, size: int) -> ApiError:
        limit = self._settings.max_body_mb
        return ApiError(413, f"the body has {size / 1e6:.1f} MB or more, at most {limit:g} MB are read: send less")


class Answer:
    """Counts an answer, and knows whether it has begun."""

    def __init__(self, send: Send, metrics: Metrics) -> None:
        self._send, self._metrics, self.begun = send, metrics, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._metrics.responses.labels(message["status"]).inc()
        await self._send(message)


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what follows it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
