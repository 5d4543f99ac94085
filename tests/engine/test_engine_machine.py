"""The engine's promise under everything at once: answers are those of a request alone, and no memory is lost.

Requests share, extend and edit each other's prompts; they are cancelled, engines are restarted and changed; caches are
so small that requests are preempted and snapshots evicted all the time. Hypothesis looks for a short way to trouble,
and long random runs for a rare one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tenfold.engine.budget import Budget
from tenfold.engine.engine import Engine, EngineSettings, QueueFull
from tenfold.engine.model_runner import Span
from tenfold.engine.request import Request, Update, Usage
from tenfold.engine.sampler import SamplingParams
from tests.engine.fake_model import FakeModel
from tests.engine.reference import answer, tokens_of

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

VOCAB, CONTEXT, EOS = 12, 48, 0
ENGINES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "can_draft": st.booleans(),
        "quality": st.sampled_from([0.0, 0.6, 1.0]),
        "max_drafts": st.integers(0, 3),
        "max_batch": st.integers(1, 4),
        "step_tokens": st.sampled_from([1, 5, 16]),
        "more_pages": st.sampled_from([0, 3, 20]),
        "slots": st.integers(1, 12),
    }
)


class Watched(FakeModel):
    """Remembers what it computed for whom."""

    engine: Engine

    def forward(self, spans: Sequence[Span]) -> Tensor:
        owners = {generation.slot: generation for generation in self.engine._scheduler.running}
        for span in spans:
            generation = owners[span.slot]
            computed = self.computed.setdefault(generation.request.id, [])
            computed += range(span.past, min(span.past + len(span.tokens), generation.prompt_tokens))
        return super().forward(spans)

    def watch(self, engine: Engine) -> None:
        self.engine, self.computed = engine, dict[int, list[int]]()


class World:
    """One engine after the other, on one folder, and what is expected of them."""

    def __init__(self, page_tokens: int, state_bytes: int, folder: Path | None) -> None:
        self.page_tokens, self.state_bytes, self.folder = page_tokens, state_bytes, folder
        self.requests: dict[int, Request] = {}
        self.updates: dict[int, list[Update]] = {}
        self.texts: list[list[int]] = [[1, 2, 3, 4, 5, 6, 7, 8] * 2]

    def start(
        self,
        *,
        can_draft: bool,
        quality: float,
        max_drafts: int,
        max_batch: int,
        step_tokens: int,
        more_pages: int,
        slots: int,
    ) -> None:
        self.model = Watched(
            page_tokens=self.page_tokens,
            state_bytes=self.state_bytes,
            can_draft=can_draft,
            quality=quality,
            context=CONTEXT,
            vocab_size=VOCAB,
            eos=EOS,
        )
        knobs = EngineSettings(
            max_batch=max_batch, max_waiting=6, step_tokens=step_tokens, max_drafts=max_drafts, disk=self.folder
        )
        pages = -(-CONTEXT // self.page_tokens) + more_pages
        self.engine = Engine(self.model, knobs, budget=Budget(pages=pages, slots=slots, disk_buffer=1 << 20))
        self.engine._costs.seconds = lambda tokens: 1 + 0.1 * tokens  # so that the clock decides nothing
        self.engine._costs.observe_draft = lambda seconds: None
        self.model.watch(self.engine)

    def add(self, prompt: list[int], params: SamplingParams, borders: list[int], isolation: str) -> None:
        self.texts.append(prompt)
        request = Request(prompt_ids=prompt, params=params, borders=borders, isolation=isolation)
        try:
            self.engine.add(request)
        except QueueFull as full:
            assert full.retry_after >= 1
        else:
            self.requests[request.id], self.updates[request.id] = request, []

    def step(self) -> None:
        for update in self.engine.step():
            self.updates[update.request_id].append(update)
            if update.finish:
                self.check_answer(update.request_id)
        self.engine.check_integrity()

    def close(self) -> None:
        self.engine.close()
        self.step()
        assert not self.requests, "closing ends every request"

    def finish(self) -> None:
        """Runs all requests to their ends."""
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.requests, "not all came to an end"
        stats = self.engine.stats()
        assert stats.pages_held == stats.slots_held == 0
        self.engine.close()

    def check_answer(self, request_id: int) -> None:
        request, updates = self.requests.pop(request_id), self.updates.pop(request_id)
        tokens, finish, usage = tokens_of(updates), updates[-1].finish, updates[-1].usage
        expected, reason = answer(request, VOCAB, CONTEXT, EOS)
        if finish == "cancelled" or updates[-1].error == "RuntimeError: the model broke":
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, finish) == (expected, reason)
            self.check_cached(request, usage)
        assert finish == "error" or usage.completion_tokens == len(tokens)
        assert usage.accepted_tokens <= usage.drafted_tokens
        self.texts.append([*request.prompt_ids, *tokens])

    def check_cached(self, request: Request, usage: Usage) -> None:
        computed = self.model.computed.get(request.id, [])
        spared = len(request.prompt_ids) - len(set(computed))
        assert usage.cached_tokens <= spared
        if computed == list(range(spared, len(request.prompt_ids))):  # in one go, not preempted within the prompt
            assert usage.cached_tokens == spared


class Machine(RuleBasedStateMachine):
    """The world in Hypothesis's hands."""

    @initialize(
        page_tokens=st.sampled_from([1, 2, 4]),
        state_bytes=st.sampled_from([16, 800]),
        on_disk=st.booleans(),
        data=st.data(),
    )
    def begin(self, page_tokens: int, state_bytes: int, on_disk: bool, data: st.DataObject) -> None:
        self.folder = tempfile.TemporaryDirectory() if on_disk else None
        self.world = World(page_tokens, state_bytes, Path(self.folder.name) if self.folder else None)
        self.world.start(**data.draw(ENGINES))

    @rule(
        data=st.data(),
        tail=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12),
        max_tokens=st.integers(0, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        isolation=st.sampled_from(["", "a"]),
        copies=st.sampled_from([1, 3]),
    )
    def add(
        self, data: st.DataObject, tail: list[int], max_tokens: int, temperature: float, isolation: str, copies: int
    ) -> None:
        known = data.draw(st.sampled_from(self.world.texts))
        prompt = (known[: data.draw(st.integers(0, len(known)))] + tail)[:CONTEXT]
        borders = data.draw(st.lists(st.integers(1, CONTEXT), max_size=2))
        for seed in range(copies):
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, top_p=0.9)
            self.world.add(prompt, params, borders, isolation)

    @precondition(lambda self: self.world.engine.has_work)
    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.engine.cancel(data.draw(st.sampled_from(sorted(self.world.requests))))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        self.world.close()
        self.world.start(**data.draw(ENGINES))

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "world"):
            self.world.engine.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()
            if self.folder:
                self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
test_answers_are_those_of_a_request_alone = Machine.TestCase


@pytest.mark.parametrize("seed", range(40))
def test_long_runs(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    world = World(random.choice([1, 2, 4]), random.choice([16, 64, 800]), tmp_path if seed % 2 else None)
    for _ in range(3):
        world.start(
            can_draft=random.random() < 0.7,
            quality=random.choice([0.0, 0.6, 1.0]),
            max_drafts=random.randrange(4),
            max_batch=random.randint(1, 6),
            step_tokens=random.choice([1, 5, 16]),
            more_pages=random.choice([0, 3, 20, 100]),
            slots=random.choice([1, 2, 5, 12, 40]),
        )
        for _ in range(50):
            for _ in range(random.choice([0, 0, 1, 2])):
                add_at_random(world, random)
            if world.requests and random.random() < 0.05:
                world.engine.cancel(random.choice(sorted(world.requests)))
            if seed % 5 == 0 and random.random() < 0.05:
                world.model.fails_in = random.randint(1, 5)
            world.step()
        world.close() if random.random() < 0.5 else world.finish()


def add_at_random(world: World, random: Random) -> None:
    known = random.choice(world.texts[-8:])
    prompt = known[: random.randint(0, len(known))] + [random.randrange(1, VOCAB) for _ in range(random.randint(1, 8))]
    params = SamplingParams(
        max_tokens=random.randrange(20), temperature=random.choice([0.0, 1.0]), seed=random.randrange(3), top_p=0.9
    )
    borders = [random.randint(1, CONTEXT) for _ in range(random.randrange(3))]
    for _ in range(random.choice([1, 1, 1, 3])):
        world.add(prompt[:CONTEXT], params, borders, random.choice(["", "", "a"]))
