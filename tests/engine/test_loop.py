"""The engine behind an event loop: streams, closing, full queues, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence

import pytest
from torch import Tensor

from tenfold.engine.budget import Budget
from tenfold.engine.engine import Engine, EngineSettings, QueueFull
from tenfold.engine.loop import EngineLoop
from tenfold.engine.model_runner import Span
from tenfold.engine.request import Request, Update
from tenfold.engine.sampler import SamplingParams
from tenfold.engine.structure import Structure
from tests.engine.fake_model import FakeModel
from tests.engine.reference import answer, request, tokens_of

VOCAB, CONTEXT = 24, 200


class Paced(FakeModel):
    """Waits before each step until it is let go."""

    def __init__(self) -> None:
        super().__init__(eos=None)
        self.go = threading.Event()
        self.go.set()

    def forward(self, spans: Sequence[Span]) -> Tensor:
        assert self.go.wait(20)
        return super().forward(spans)


def start(model: FakeModel | None = None, max_waiting: int = 20) -> EngineLoop:
    knobs = EngineSettings(max_batch=3, max_waiting=max_waiting, step_tokens=16)
    return EngineLoop(Engine(model or Paced(), knobs, budget=Budget(pages=100, slots=12)))


async def read(stream: AsyncGenerator[Update, None]) -> list[Update]:
    return [update async for update in stream]


def correct(one: Request, updates: Sequence[Update]) -> bool:
    return (tokens_of(updates), updates[-1].finish) == answer(one, VOCAB, CONTEXT, None)


def test_many_streams_at_once() -> None:
    async def scene() -> None:
        loop = start()
        requests = [request([seed, 2, 3, 4] * 3, max_tokens=20, seed=seed, temperature=1.0) for seed in range(1, 9)]
        answers = await asyncio.gather(*[read(await loop.submit(one)) for one in requests])
        assert all(correct(one, updates) for one, updates in zip(requests, answers, strict=True))
        await loop.drain(5)

    asyncio.run(scene())


def test_closing_a_stream_cancels_its_request_within_a_step() -> None:
    async def scene() -> None:
        model = Paced()
        loop = start(model)
        stream = await loop.submit(request([1, 2, 3], max_tokens=150))
        await anext(stream)
        await stream.aclose()
        steps = len(model.steps)
        while loop.stats().running or loop.stats().waiting:
            await asyncio.sleep(0.001)
        assert len(model.steps) <= steps + 2
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await loop.drain(5)

    asyncio.run(scene())


def test_waiting_for_an_update_may_be_given_up() -> None:
    """A service that says now and then that it is alive waits for each update with a time limit."""

    async def scene() -> None:
        model = Paced()
        loop = start(model)
        model.go.clear()
        one = request([1, 2, 3])
        stream = await loop.submit(one)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.02)
        model.go.set()
        assert correct(one, await read(stream))
        await loop.drain(5)

    asyncio.run(scene())


def test_a_full_queue_and_bad_requests_are_refused_at_once() -> None:
    async def scene() -> None:
        model = Paced()
        loop = start(model, max_waiting=3)
        model.go.clear()
        first = []
        with pytest.raises(QueueFull):
            for seed in range(1, 3 + 3 + 2):  # as many run, as many wait, and one too many
                first.append(await loop.submit(request([seed] * 3)))
        assert len(first) == 6
        with pytest.raises(ValueError, match="the prompt has token 99"):
            await loop.submit(request([99]))
        model.go.set()
        for stream in first:
            assert (await read(stream))[-1].finish == "length"
        await loop.drain(5)

    asyncio.run(scene())


@pytest.mark.parametrize("max_waiting", [0, 1, 3, 5])
def test_all_that_come_at_once_are_answered_or_refused(max_waiting: int) -> None:
    """While the grammar of one is read, others come; whoever was let in has a place, in the batch or in the queue."""

    async def scene() -> None:
        model = Paced()
        loop = start(model, max_waiting=max_waiting)
        model.go.clear()
        requests = [request([seed] * 3, seed=seed) for seed in range(1, 13)]
        results = await asyncio.gather(*[loop.submit(one) for one in requests], return_exceptions=True)
        streams = [
            (one, stream) for one, stream in zip(requests, results, strict=True) if isinstance(stream, AsyncGenerator)
        ]
        refused = [error for error in results if isinstance(error, QueueFull)]
        assert len(streams) + len(refused) == len(requests) and len(streams) == 3 + max_waiting
        model.go.set()
        for one, stream in streams:
            assert correct(one, await read(stream))
        await loop.drain(5)

    asyncio.run(scene())


def test_a_request_that_could_not_be_prepared_leaves_its_place() -> None:
    async def scene() -> None:
        loop, params = start(max_waiting=0), SamplingParams(structure=Structure("regex", "a"))
        for _ in range(5):
            with pytest.raises(ValueError, match="structured output needs a tokenizer"):
                await loop.submit(Request(prompt_ids=[1, 2, 3], params=params))
        requests = [request([seed] * 3, seed=seed) for seed in range(1, 4)]
        answers = await asyncio.gather(*[read(await loop.submit(one)) for one in requests])
        assert all(correct(one, updates) for one, updates in zip(requests, answers, strict=True))
        await loop.drain(5)

    asyncio.run(scene())


def test_a_request_that_comes_while_the_loop_ends_is_not_forgotten() -> None:
    async def scene() -> None:
        loop = start()
        one = request([1, 2, 3])
        coming = asyncio.create_task(loop.submit(one))
        await asyncio.sleep(0)  # it has its place
        await loop.drain(20)
        assert correct(one, await read(await coming))

    asyncio.run(scene())


def test_draining_lets_answers_end_and_takes_no_more() -> None:
    async def scene() -> None:
        loop = start()
        one = request([1, 2, 3], max_tokens=100)
        reading = asyncio.create_task(read(await loop.submit(one)))
        await asyncio.sleep(0)
        await loop.drain(20)
        assert correct(one, await reading)
        with pytest.raises(QueueFull):
            await loop.submit(one)

    asyncio.run(scene())


def test_draining_ends_what_takes_too_long() -> None:
    class Slow(FakeModel):
        def forward(self, spans: Sequence[Span]) -> Tensor:
            time.sleep(0.02)
            return super().forward(spans)

    async def scene() -> None:
        loop = start(Slow(eos=None))
        stream = await loop.submit(request([1, 2, 3], max_tokens=190))
        await anext(stream)
        await loop.drain(0.05)
        assert (await read(stream))[-1].finish == "cancelled"

    asyncio.run(scene())


def test_a_model_that_breaks_does_not_end_the_loop() -> None:
    async def scene() -> None:
        model = Paced()
        loop = start(model)
        model.fails_in = 1
        updates = await read(await loop.submit(request([1, 2, 3])))
        assert (updates[-1].finish, updates[-1].error) == ("error", "RuntimeError: the model broke")
        one = request([1, 2, 3])
        assert correct(one, await read(await loop.submit(one)))
        await loop.drain(5)

    asyncio.run(scene())
