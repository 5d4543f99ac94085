"""What the routes share: the engine, how requests enter it, and how their updates become text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tenfold.engine.request import FinishReason, Request, TokenLogprob, Update, Usage
from tenfold.engine.sampler import SamplingParams
from tenfold.server.backend import Engine, QueueFull
from tenfold.server.chat import ChatFormat, check_length, encode
from tenfold.server.errors import ApiError, invalid
from tenfold.server.keys import Caller
from tenfold.server.metrics import Metrics
from tenfold.server.parts import Part, Reader, held_back
from tenfold.server.reasoning import ReasoningReader
from tenfold.server.settings import Settings
from tenfold.tokenizer import Tokenizer

ENCODERS = 2  # threads that turn text into tokens, so that long prompts leave a core to the others


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


class Service:
    """The engine behind the routes."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.tokenizer, self.settings, self.metrics = engine, tokenizer, settings, metrics
        self.chat = ChatFormat(tokenizer)
        self.began = int(time.time())
        self.draining = False
        self.running: set[Generation] = set()
        self._encoders = asyncio.Semaphore(ENCODERS)

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not here."""
        if name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            message = f"model {name[:100]!r} is not served here, but {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str) -> list[int]:
        """A prompt as tokens, which leave room for one more. Raises ApiError."""
        async with self._encoders:
            return await asyncio.to_thread(encode, self.tokenizer, text, self.settings.context_length - 1)

    def check_ids(self, ids: list[int]) -> list[int]:
        """A prompt that came as tokens. Raises ApiError."""
        check_length(ids, self.settings.context_length - 1)
        last = self.tokenizer.vocab_size - 1
        bad = next((token for token in ids if not 0 <= token <= last), None)
        if bad is not None:
            raise invalid(f"prompt: token {bad} is unknown, there are 0 to {last}", param="prompt")
        return ids

    def max_tokens(self, asked: int | None, prompt: Sequence[int]) -> int:
        """As many tokens as the request wants and the context has room for."""
        room = self.settings.context_length - len(prompt)
        wanted = self.settings.max_tokens if asked is None else asked
        return room if wanted is None else min(wanted, room)

    async def start(self, asked: Sequence[Asked], caller: Caller | None) -> Generation:
        """Hands requests to the engine. Raises ApiError, with none of them left in it."""
        if self.draining:
            raise stopping()
        if caller is not None:
            caller.take_tokens(sum(len(one.prompt_ids) for one in asked))
        generation = Generation(self, asked, caller)
        try:
            for one in asked:
                generation.streams.append(await self.engine.submit(self._request(one, caller)))
        except QueueFull as error:
            await generation.close()
            self.metrics.refused.inc()
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        except ValueError as error:
            await generation.close()
            raise invalid(str(error)) from None
        except BaseException:
            await generation.close()
            raise
        return generation

    async def start_choices(
        self,
        ids: Sequence[int],
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        count: int,
        caller: Caller | None,
    ) -> Generation:
        """Several answers to a conversation, each with a seed of its own. Raises ApiError."""
        if count > self.settings.max_choices:
            raise invalid(f"n: {count} answers are asked for, at most {self.settings.max_choices} are given", param="n")
        borders = self.chat.borders(ids)
        asked = [
            Asked(
                prompt_ids=ids,
                params=replace(params, seed=params.seed + i),
                reader=self.chat.reader(prompt, tools),
                borders=borders,
            )
            for i in range(count)
        ]
        return await self.start(asked, caller)

    def _request(self, asked: Asked, caller: Caller | None) -> Request:
        isolated = caller is not None and self.settings.isolate_cache
        return Request(
            prompt_ids=asked.prompt_ids,
            params=replace(asked.params, stop_ids=self.tokenizer.stop_ids),
            borders=asked.borders,
            isolation=caller.isolation if caller is not None and isolated else "",
        )

    def stop_all(self) -> None:
        """Ends all answers where they are."""
        for generation in list(self.running):
            generation.stop()


class Generation:
    """Answers on their way. It has to be closed, which cancels what still runs."""

    def __init__(self, service: Service, asked: Sequence[Asked], caller: Caller | None) -> None:
        self.streams: list[AsyncGenerator[Update, None]] = []
        self.prompt_ids = [one.prompt_ids for one in asked]
        self.usages = [Usage() for _ in asked]
        self.reasoning_tokens = [0] * len(asked)
        self._service, self._caller = service, caller
        self._texts = [AnswerText(service.tokenizer, one) for one in asked]
        self._queue: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._watch = service.metrics.watch(len(asked))
        self._began = asyncio.get_running_loop().time()
        service.running.add(self)

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
        settings = self._service.settings
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
        if self not in self._service.running:
            return
        self._service.running.discard(self)
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
