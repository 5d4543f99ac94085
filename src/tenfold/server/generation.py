"""Answers on their way: what the engine's updates become, until they end or nobody wants them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tenfold.engine.request import Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.server.callers import Caller
from tenfold.server.errors import ApiError
from tenfold.server.metrics import Metrics
from tenfold.server.parts import Part, Reader
from tenfold.server.reasoning import ReasoningReader
from tenfold.server.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answer to be given: a prompt, how to continue it, and who reads the answer."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    reader: Reader
    borders: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an update of the engine adds to one of the answers."""

    choice: int
    parts: Sequence[Part] = ()
    update: Update
    reasoning_tokens: int = 0  # so far


class Generations:
    """All that are on their way."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.running: set[Generation] = set()

    def stop_all(self) -> None:
        """Ends all answers where they are."""
        for generation in list(self.running):
            generation.stop()


class Generation:
    """Answers on their way. It has to be closed, which cancels what still runs."""

    def __init__(self, home: Generations, asked: Sequence[Asked], caller: Caller | None) -> None:
        self.streams: list[AsyncGenerator[Update, None]] = []
        self.prompt_ids = [one.prompt_ids for one in asked]
        self.params = [one.params for one in asked]
        self.usages = [Usage() for _ in asked]
        self.reasoning_tokens = [0] * len(asked)
        self._ended: set[int] = set()
        self._home, self._caller = home, caller
        self._parts = [AnswerParts(one.reader) for one in asked]
        self._queue: asyncio.Queue[tuple[int, Update | Exception]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._watch = home.metrics.watch(len(asked))
        self._began = asyncio.get_running_loop().time()
        home.running.add(self)

    async def steps(self) -> AsyncIterator[Step | None]:
        """All steps of all answers as they come; None is a sign of life. Raises ApiError for one that fails."""
        self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(self.streams)]
        left = len(self._pumps)
        while left:
            item = await self._next()
            if item is None:
                yield None
                continue
            choice, update = item
            if choice in self._ended:
                continue
            if isinstance(update, Exception):
                raise update
            step = self._step(choice, update)
            if step.update.finish is not None:
                left -= 1
                await self._end(choice)
            yield step

    async def _next(self) -> tuple[int, Update | Exception] | None:
        settings = self._home.settings
        left = self._began + settings.request_seconds - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(settings.heartbeat_seconds, max(left, 0))):
                return await self._queue.get()
        except TimeoutError:
            if left <= settings.heartbeat_seconds:
                limit = settings.request_seconds
                raise ApiError(504, f"the answer took longer than the {limit:g} s that it may take") from None
            return None

    def _step(self, choice: int, update: Update) -> Step:
        if update.finish == "error":
            raise ApiError(500, update.error or "the engine failed")
        if update.finish == "cancelled":
            raise stopping()
        self._watch.tokens(choice, len(update.tokens))
        step = self._parts[choice].step(choice, update)
        self.usages[choice] = update.usage
        self.reasoning_tokens[choice] = step.reasoning_tokens
        return step

    async def _pump(self, choice: int, stream: AsyncGenerator[Update, None]) -> None:
        try:
            async for update in stream:
                self._queue.put_nowait((choice, update))
            self._queue.put_nowait((choice, ApiError(500, "the engine has left the answer without an end")))
        except Exception as error:
            self._queue.put_nowait((choice, error))

    async def _end(self, choice: int) -> None:
        """Cancels an answer, if it has not ended by itself."""
        self._ended.add(choice)
        if self._pumps:
            self._pumps[choice].cancel()
            with suppress(asyncio.CancelledError):
                await self._pumps[choice]
        await self.streams[choice].aclose()

    def stop(self) -> None:
        """Makes the steps end with an error."""
        self._queue.put_nowait((-1, stopping()))

    async def close(self) -> None:
        if self not in self._home.running:
            return
        self._home.running.discard(self)
        for choice in range(len(self.streams)):
            await self._end(choice)
        self._watch.done(self.usages)
        if self._caller is not None:
            self._caller.owe_tokens(sum(usage.completion_tokens for usage in self.usages))

    def usage(self) -> tuple[Usage, int]:
        """Of all answers together, each prompt counted once; and how many of the tokens were reasoning."""
        firsts = {id(ids): i for i, ids in reversed(list(enumerate(self.prompt_ids)))}.values()
        total = Usage(
            prompt_tokens=sum(len(self.prompt_ids[i]) for i in firsts),
            cached_tokens=sum(self.usages[i].cached_tokens for i in firsts),
            completion_tokens=sum(usage.completion_tokens for usage in self.usages),
            drafted_tokens=sum(usage.drafted_tokens for usage in self.usages),
            accepted_tokens=sum(usage.accepted_tokens for usage in self.usages),
        )
        return total, sum(self.reasoning_tokens)


def stopping() -> ApiError:
    return ApiError(503, "the service is stopping; ask again in a moment", retry_after=5)


class AnswerParts:
    """Tells the parts of one answer apart."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._reasoning_tokens = 0

    def step(self, choice: int, update: Update) -> Step:
        if isinstance(self._reader, ReasoningReader) and self._reader.reasoning:
            self._reasoning_tokens += len(update.tokens)
        parts = self._reader.push(update.text)
        return Step(
            choice=choice,
            parts=[*parts, *(self._reader.finish() if update.finish else ())],
            update=update,
            reasoning_tokens=self._reasoning_tokens,
        )
