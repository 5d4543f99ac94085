"""What the service needs of an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from tenfold.engine.request import Request, Update


class Stats(Protocol):
    """The engine at this moment."""

    running: int  # requests with memory of their own
    waiting: int
    memory_used: int  # bytes of pages and slots, those of the prefix cache included
    memory_total: int


class Engine(Protocol):
    """Turns requests into tokens."""

    async def submit(self, request: Request) -> AsyncGenerator[Update, None]:
        """The updates of a request, with their text, to its last; closing it cancels the request.

        Raises QueueFull, and ValueError for what could never be answered, such as a grammar that is none.
        """
        ...

    def stats(self) -> Stats: ...

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, cancels those that last longer, keeps what is to be kept, and stops."""
        ...
