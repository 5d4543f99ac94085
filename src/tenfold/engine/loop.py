"""The engine in a thread of its own, for a service that is asynchronous."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from typing import Any

from tenfold.engine.engine import Engine, QueueFull, Stats
from tenfold.engine.generation import Generation
from tenfold.engine.request import Request, Update

logger = logging.getLogger(__name__)


class UpdateStream(AsyncGenerator[Update, None]):
    """A request's updates, to the last. Closing it before cancels the request."""

    def __init__(self, engine_loop: EngineLoop, request_id: int) -> None:
        self._engine_loop, self._id = engine_loop, request_id
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._ended = False

    def put(self, update: Update) -> None:
        """From any thread; after the event loop's end nobody listens."""
        try:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)
        except RuntimeError:
            logger.info("request %d: its event loop is closed", self._id)

    async def asend(self, value: None) -> Update:
        if self._ended:
            raise StopAsyncIteration
        update = await self._updates.get()
        self._ended = update.finish is not None
        return update

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> Update:
        if not self._ended:
            self._ended = True
            self._engine_loop.cancel(self._id)
        raise typ if val is None else val


class EngineLoop:
    """Runs steps while there is work. The engine is the thread's alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Generation | int | None] = queue.SimpleQueue()  # to add, to cancel; None wakes
        self._streams: dict[int, UpdateStream] = {}  # of all requests that have a place
        self._arriving: set[int] = set()  # those of them that are on their way to the engine
        self._closed = threading.Event()  # takes no more requests
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> AsyncGenerator[Update, None]:
        """Its updates. Raises QueueFull, and ValueError for what could never be answered."""
        self._engine.check(request)
        stream = self._take_place(request.id)
        try:
            generation = await asyncio.to_thread(self._engine.prepare, request)
        except BaseException:
            self._streams.pop(request.id, None)
            self._arriving.discard(request.id)
            self._inbox.put(None)  # the thread may wait for it
            raise
        self._inbox.put(generation)
        return stream

    def _take_place(self, request_id: int) -> UpdateStream:
        """In the batch or the queue, before anything is awaited: so the engine has room for all that come at once."""
        if request_id in self._streams:
            raise ValueError(f"request {request_id} is under way: another needs another id")
        if self._closed.is_set() or len(self._streams) >= self._engine.settings.places:
            raise QueueFull(self._engine.retry_after)
        self._streams[request_id] = stream = UpdateStream(self, request_id)
        self._arriving.add(request_id)
        return stream

    def cancel(self, request_id: int) -> None:
        """Within a step; what is unknown or has ended is ignored."""
        self._inbox.put(request_id)

    def stats(self) -> Stats:
        return self._engine.stats()

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, lets those that are there end, but no longer than so many seconds, and stops."""
        self._closed.set()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        for request_id in list(self._streams):
            self.cancel(request_id)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while not self._closed.is_set() or self._engine.has_work or self._arriving or not self._inbox.empty():
                self._receive()
                self._deliver(self._engine.step())
        finally:  # whatever ends the thread, nobody is left waiting
            self._closed.set()
            self._engine.close()
            for request_id in list(self._streams):
                self._deliver([Update(request_id=request_id, finish="error", error="the engine has stopped")])

    def _receive(self) -> None:
        """Takes all that has come in; waits for something if there is nothing else to do."""
        wait = not self._engine.has_work and (not self._closed.is_set() or bool(self._arriving))
        while wait or not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                self._take(item)
            wait = False

    def _take(self, item: Generation | int) -> None:
        if isinstance(item, int):
            self._engine.cancel(item)
        else:
            self._engine.start(item)
            self._arriving.discard(item.request.id)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            stream = (
                self._streams.pop(update.request_id, None) if update.finish else self._streams.get(update.request_id)
            )
            if stream:
                stream.put(update)
