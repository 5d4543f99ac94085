"""A real server over a socket, before an engine that answers by script. As a script: such a server, until SIGTERM."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from tenfold.engine.engine import QueueFull
from tenfold.engine.request import Request, TokenLogprob, Update, Usage
from tenfold.engine.stopping import Stopping
from tenfold.engine.structure import StructureCompiler
from tenfold.server.app import create_app
from tenfold.server.serve import bound, make_server, serve
from tenfold.server.settings import Settings
from tenfold.tokenizer import Tokenizer

MODEL = "fake"


@dataclass
class FakeStats:
    running: int = 0
    waiting: int = 0
    memory_used: int = 1000
    memory_total: int = 4000


@dataclass
class FakeEngine:
    """Answers with the text that `answers` has for a word of the prompt, else with words made from its hash."""

    tokenizer: Tokenizer
    answers: dict[str, str] = field(default_factory=dict)
    seconds_per_token: float = 0.0
    prefill_seconds: float = 0.0
    places: int = 8
    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: int = 0
    failure: Exception | None = None
    drained: bool = False

    def stats(self) -> FakeStats:
        return FakeStats(running=self.running)

    async def submit(self, request: Request) -> AsyncGenerator[Update, None]:
        if self.failure is not None:
            raise self.failure
        if self.running >= self.places:
            raise QueueFull(3)
        if request.params.structure:
            await asyncio.to_thread(compiler().compile, request.params.structure)
        self.requests.append(request)
        self.running += 1
        return FakeStream(self, request)  # type: ignore[return-value]

    def answer(self, request: Request) -> list[int]:
        prompt = self.tokenizer.decode(request.prompt_ids)
        text = next((answer for word, answer in reversed(self.answers.items()) if word in prompt), None)
        if text is None:
            digest = hashlib.sha256(repr((prompt, request.params.seed)).encode()).hexdigest()
            text = f" {digest[:8]} {digest[8:12]}"
        return self.tokenizer.encode(text)

    async def updates(self, request: Request) -> AsyncGenerator[Update, None]:
        await asyncio.sleep(self.prefill_seconds)
        params, end = request.params, self.tokenizer.eos_id
        decoder = self.tokenizer.stream(skip_special_tokens=True)
        stopping = Stopping((end,), strings=params.stop, decoder=decoder, max_tokens=params.max_tokens)
        ranks: list[Sequence[TokenLogprob]] = [[], *(self.ranked(token) for token in request.prompt_ids[1:])]
        first = None if params.prompt_logprobs is None else ranks
        count = 0
        for token in [*self.answer(request), end] if params.max_tokens else ():
            await asyncio.sleep(self.seconds_per_token)
            verdict = stopping.push(token)
            count += token != end
            yield Update(
                request_id=request.id,
                tokens=verdict.tokens,
                text=verdict.text,
                logprobs=[] if params.logprobs is None else [self.ranked(token) for token in verdict.tokens],
                prompt_logprobs=first,
                usage=Usage(len(request.prompt_ids), 3, count, 2 * count, count),
                finish=verdict.finish,
                stopped_by=verdict.stopped_by,
                stop_logprobs=self.ranked(token) if params.logprobs is not None and token == end else (),
            )
            first = None
            if verdict.finish:
                return
        usage = Usage(len(request.prompt_ids), 3)
        yield Update(request_id=request.id, prompt_logprobs=first, usage=usage, finish="length")

    async def drain(self, seconds: float) -> None:
        self.drained = True

    def ranked(self, token: int) -> list[TokenLogprob]:
        return [TokenLogprob(token, -0.5), TokenLogprob(token, -0.5), TokenLogprob(7, -1.5)]


class FakeStream:
    """The updates of a request; closing them before their end is a cancellation."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._updates, self._open = engine.updates(request), True

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Update:
        update = await anext(self._updates)
        if update.finish:
            self._end()
        return update

    async def aclose(self) -> None:
        await self._updates.aclose()
        if self._open:
            self._engine.cancelled.append(self._request.id)
            self._end()

    def _end(self) -> None:
        self._open = False
        self._engine.running -= 1


@dataclass
class Running:
    """A server in a thread of this process."""

    engine: FakeEngine
    settings: Settings
    host: str
    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def wait_for(self, condition: Callable[[], bool], seconds: float = 5) -> None:
        """Until something has happened in the server."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def connect(self, seconds: float = 10) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=seconds)


@cache
def embedded() -> Tokenizer:
    return Tokenizer.embedded()


@cache
def compiler() -> StructureCompiler:
    return StructureCompiler(embedded())


def start(settings: Settings, tokenizer: Tokenizer | None = None) -> Running:
    engine = FakeEngine(tokenizer or embedded())
    server = make_server(create_app(engine, engine.tokenizer, settings), settings)
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # or megabytes go to a client that never reads
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    host, port = listener.getsockname()

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join(10)

    return Running(engine, settings, host, port, stop)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return embedded()


@pytest.fixture(scope="session")
def _shared() -> Iterator[Running]:
    running = start(Settings(model_names=(MODEL, "alias"), context_length=2000, heartbeat_seconds=0.05))
    yield running
    running.stop()


@pytest.fixture
def server(_shared: Running) -> Running:
    """A server without keys, whose engine knows no answers yet."""
    fresh = FakeEngine(_shared.engine.tokenizer)
    vars(_shared.engine).update(vars(fresh))
    return _shared


@pytest.fixture
def servers() -> Iterator[Callable[[Settings], Running]]:
    """Starts servers with other settings, and ends them."""
    started: list[Running] = []

    def begin(settings: Settings, tokenizer: Tokenizer | None = None) -> Running:
        started.append(start(settings, tokenizer))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


if __name__ == "__main__":
    fake = FakeEngine(embedded(), answers={"long": "word " * 40}, seconds_per_token=0.05)
    settings = Settings(
        model_names=(MODEL,), context_length=2000, drain_seconds=float(sys.argv[1]), api_keys=Path(sys.argv[2])
    )
    with bound("127.0.0.1", 0) as listener:
        serve(create_app(fake, fake.tokenizer, settings), settings, listener)
