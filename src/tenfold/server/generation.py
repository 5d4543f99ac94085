"""Answers on their way: what the engine's updates become, until they end or nobody wants them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tenfold.engine.request import FinishReason, TokenLogprob, Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.server.errors import ApiError
from tenfold.server.keys import Caller
from tenfold.server.metrics import Metrics
from tenfold.server.parts import Part, Reader, held_back
from tenfold.server.reasoning import ReasoningReader
from tenfold.server.settings import Settings
from tenfold.tokenizer import Tokenizer


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
    tokens: Sequence[int] = ()
    logprobs: Sequence[Sequence[TokenLogprob]] = ()
    prompt_logprobs: Sequence[Sequence[TokenLogprob]] | None = None
    usage: Usage = field(default_factory=Usage)
    reasoning_tokens: int = 0  # so far
    finish: FinishReason | None = None
    stopped_by: str | int | None = None


class Generations:
    """All that are on their way."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, metrics: Metrics) -> None:
        self.tokenizer, self.settings, self.metrics = tokenizer, settings, metrics
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
        self.usages = [Usage() for _ in asked]
        self.reasoning_tokens = [0] * len(asked)
        self._home, self._caller = home, caller
        self._texts = [AnswerText(home.tokenizer, one) for one in asked]
        self._queue: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()
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
            elif item[1] is None:
                left -= 1
            elif isinstance(item[1], BaseException):
                raise item[1]
            else:
                yield self._step(*item)  # type: ignore[arg-type]

    async def _next(self) -> tuple[int, Update | BaseException | None] | None:
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
        self.usages[choice] = update.usage
        self._watch.tokens(choice, len(update.tokens))
        step = self._texts[choice].step(choice, update)
        self.reasoning_tokens[choice] = step.reasoning_tokens
        return step

    async def _pump(self, choice: int, stream: AsyncGenerator[Update, None]) -> None:
        try:
            async for update in stream:
                self._queue.put_nowait((choice, update))
            self._queue.put_nowait((choice, None))
        except Exception as error:
            self._queue.put_nowait((choice, error))

    def stop(self) -> None:
        """Makes the steps end with an error."""
        self._queue.put_nowait((0, stopping()))

    async def close(self) -> None:
        if self not in self._home.running:
            return
        self._home.running.discard(self)
        for pump in self._pumps:
            pump.cancel()
        for pump in self._pumps:
            with suppress(asyncio.CancelledError):
                await pump
        for stream in self.streams:
            await stream.aclose()
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


class AnswerText:
    """Turns the tokens of one answer into parts: whole characters, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, asked: Asked) -> None:
        self._decoder = tokenizer.stream(skip_special_tokens=True)
        self._reader = asked.reader
        self._stop = StopCutter(asked.params.stop)
        self._reasoning_tokens = 0

    def step(self, choice: int, update: Update) -> Step:
        text = "".join(self._decoder.push(token) for token in update.tokens)
        if update.finish is not None:
            text += self._decoder.finish()
        if isinstance(self._reader, ReasoningReader) and self._reader.reasoning:
            self._reasoning_tokens += len(update.tokens)
        parts = list(self._reader.push(self._stop.push(text)))
        if update.finish is not None:
            parts += [*self._reader.push(self._stop.finish()), *self._reader.finish()]
        return Step(
            choice=choice,
            parts=parts,
            tokens=update.tokens,
            logprobs=update.logprobs,
            prompt_logprobs=update.prompt_logprobs,
            usage=update.usage,
            reasoning_tokens=self._reasoning_tokens,
            finish=update.finish,
            stopped_by=update.stopped_by,
        )


class StopCutter:
    """Passes a text on to where the first stop string begins, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._buffer, self._stopped = "", False

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        if self._stopped:
            return ""
        self._buffer += text
        found = [at for stop in self._stops if (at := self._buffer.find(stop)) >= 0]
        if found:
            self._stopped = True
            return self._buffer[: min(found)]
        size = len(self._buffer) - held_back(self._buffer, self._stops)
        passed, self._buffer = self._buffer[:size], self._buffer[size:]
        return passed

    def finish(self) -> str:
        return "" if self._stopped else self._buffer
