"""What the engine does for a request, seen from outside: where it starts, whom it lets wait, how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.engine.budget import Budget, divide
from tenfold.engine.cache_manager import Claim, common_prefix, snapshot_points
from tenfold.engine.engine import Engine, EngineSettings, QueueFull
from tenfold.engine.request import Request, Update
from tenfold.engine.sampler import SamplingParams
from tenfold.engine.scheduler import share
from tenfold.engine.step_cost import StepCost
from tenfold.engine.structure import Constraint
from tenfold.tokenizer import Tokenizer
from tests.engine.fake_model import FakeModel, link_logits
from tests.engine.reference import answer, chain, request, run, tokens_of

VOCAB, CONTEXT = 24, 200
SYSTEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


def start(
    model: FakeModel | None = None,
    pages: int = 200,
    slots: int = 40,
    max_batch: int = 4,
    step_tokens: int = 16,
    max_drafts: int = 3,
    max_waiting: int = 10,
) -> Engine:
    knobs = EngineSettings(
        max_batch=max_batch, step_tokens=step_tokens, max_drafts=max_drafts, max_waiting=max_waiting, step_seconds=100
    )
    return Engine(model or fake(), knobs, budget=Budget(pages=pages, slots=slots))


def fake(can_draft: bool = True, quality: float = 0.7, context: int = CONTEXT) -> FakeModel:
    """Its states are as large as those of real models: 200 tokens' keys and values."""
    return FakeModel(can_draft=can_draft, quality=quality, context=context, eos=None, state_bytes=4800)


@pytest.fixture(autouse=True)
def steady_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step costs as much as ten tokens, and the clock decides nothing."""
    monkeypatch.setattr(StepCost, "seconds", lambda _, tokens: 1 + 0.1 * tokens)
    monkeypatch.setattr(StepCost, "observe_draft", lambda *_: None)


def ask(engine: Engine, one: Request) -> Update:
    """The last update; the answer is checked."""
    updates = run(engine, [one])[one.id]
    assert (tokens_of(updates), updates[-1].finish) == answer(one, VOCAB, engine.context, None)
    return updates[-1]


def cached(engine: Engine, prompt: Sequence[int], borders: Sequence[int] = ()) -> int:
    return ask(engine, request(prompt, borders=borders)).usage.cached_tokens


# ---- the prefix cache


def test_a_repeated_prompt_costs_no_step_of_the_model() -> None:
    model = fake()
    engine = start(model, max_drafts=0)
    ask(engine, request(SYSTEM, max_tokens=1))
    steps = len(model.steps)
    assert ask(engine, request(SYSTEM, max_tokens=1, seed=1, temperature=1.0)).usage.cached_tokens == len(SYSTEM)
    assert len(model.steps) == steps


@pytest.mark.parametrize("can_draft", [False, True])
def test_a_conversation_goes_on_where_it_was(can_draft: bool) -> None:
    engine = start(fake(can_draft=can_draft))
    first = request(SYSTEM, max_tokens=20)
    ask(engine, first)
    said, _ = answer(first, VOCAB, engine.context, None)
    assert cached(engine, [*SYSTEM, *said, 7, 7, 7]) == len(SYSTEM) + len(said) - 1


def test_an_edited_last_message_starts_at_its_border() -> None:
    engine = start()
    border = len(SYSTEM)
    cached(engine, [*SYSTEM, 7, 8, 9, 10, 11, 12, 13], borders=[border])
    assert cached(engine, [*SYSTEM, 11, 8, 9, 10], borders=[border]) == border
    assert cached(engine, [*SYSTEM, 12], borders=[border]) == border


def test_a_branch_once_seen_is_kept() -> None:
    """The second request computes what it shares with the first, and leaves its state there for the third."""
    engine = start()
    assert cached(engine, [*SYSTEM, 7, 8, 9, 10, 11]) == 0
    assert cached(engine, [*SYSTEM, 8, 9, 10, 11, 12]) == 0
    assert cached(engine, [*SYSTEM, 9, 10, 11, 12, 13]) == len(SYSTEM)


@pytest.mark.parametrize("parted", [0, 9])
def test_requests_at_once_compute_a_shared_prompt_once(parted: int) -> None:
    model = fake()
    engine = start(model, max_drafts=0)
    requests = [request([*SYSTEM, *[seed] * parted], max_tokens=2, seed=seed, temperature=1.0) for seed in range(1, 5)]
    updates = run(engine, requests)
    for one in requests:
        assert tokens_of(updates[one.id]) == answer(one, VOCAB, engine.context, None)[0]
    assert sum(updates[one.id][-1].usage.cached_tokens for one in requests) == 3 * len(SYSTEM)


def test_isolation_words_share_nothing() -> None:
    engine = start()
    for isolation, expected in [("a", 0), ("b", 0), ("a", len(SYSTEM)), ("", 0)]:
        assert ask(engine, request(SYSTEM, isolation=isolation)).usage.cached_tokens == expected


def test_snapshots_of_use_outlive_others() -> None:
    """Twelve prompts pass through a cache for six; the one that is asked again and again stays."""
    engine = start(slots=6, max_drafts=0)
    cached(engine, SYSTEM)
    for other in range(1, 13):
        cached(engine, [other] * 20)
        assert cached(engine, SYSTEM) == len(SYSTEM)


def test_where_snapshots_are_made() -> None:
    knobs = {"common": 0, "borders": [300, 1000, 7000, 7900, 7997], "state_tokens": 3200, "near": 32}
    points = snapshot_points(0, 8000, **knobs)  # pyright: ignore[reportArgumentType]
    assert points == [300, 3200, 7000, 7900, 7997], "the end is too near the last border, 1000 too near the first"
    assert snapshot_points(0, 99, common=50, borders=[], state_tokens=3200, near=32) == [50, 99]
    assert snapshot_points(90, 99, common=95, borders=[97], state_tokens=1, near=32) == []
    long = snapshot_points(0, 200_000, common=0, borders=[], state_tokens=3200, near=32)
    assert len(long) == 8 and long[-1] == 200_000


def test_how_many_tokens_are_shared() -> None:
    for a, b in [([], []), ([1], []), ([1, 2, 3], [1, 2, 4]), ([1, 2], [1, 2, 3]), ([1] * 50, [1] * 49 + [2])]:
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_prefix(a, b) == expected


# ---- scheduling


def test_a_long_prompt_never_stops_the_others() -> None:
    engine = start(max_drafts=0)
    talking, reading = request(SYSTEM, max_tokens=40), request([5] * 150, max_tokens=2)
    engine.add(talking)
    while not any(update.tokens for update in engine.step()):
        pass
    engine.add(reading)
    for _ in range(9):  # as many steps of 16 tokens as the long prompt needs at least
        assert [update.request_id for update in engine.step()] == [talking.id]


@pytest.mark.parametrize(("alone_seconds", "expected"), [(0.1, 16), (1 + 0.1 * 32, 32), (100, 64)])
def test_prompts_alone_are_read_in_steps_that_a_newcomer_can_wait_for(alone_seconds: float, expected: int) -> None:
    """But not in so small ones that they take longer in all: 16 tokens, says this model."""
    model = fake()
    knobs = EngineSettings(step_tokens=64, alone_seconds=alone_seconds)
    engine = Engine(model, knobs, budget=Budget(pages=200, slots=40))
    engine._costs.observe(64, 1.0)
    engine.add(request([5] * 150, max_tokens=1))
    engine.step()
    assert [len(span.tokens) for span in model.steps[0]] == [expected]


def test_a_short_prompt_passes_a_long_one_which_goes_on() -> None:
    model = fake()
    engine = start(model)
    long, short = request([5] * 150, max_tokens=1), request([6] * 12, max_tokens=1)
    engine.add(long)
    engine.step()
    engine.add(short)
    assert [update.request_id for update in engine.step()] == [short.id]
    assert sorted(len(span.tokens) for span in model.steps[-1]) == [4, 12]


def test_shares_of_a_step() -> None:
    assert share(16, [], []) == []
    assert share(16, [100], [100]) == [16]
    assert share(16, [100, 100], [300, 200]) == [4, 12]
    assert share(16, [100, 5, 100], [300, 5, 200]) == [2, 5, 0]  # the short one is not kept waiting for more
    assert share(1, [100, 5], [300, 5]) == [1, 0]
    assert share(16, [2, 5], [2, 5]) == [2, 5]


def test_the_latest_gives_way_and_loses_nothing() -> None:
    """Two answers grow beyond what there is room for."""
    engine = start(fake(context=80), pages=20, max_drafts=0)
    requests = [request([seed] * 20, max_tokens=50) for seed in (1, 2)]
    updates = run(engine, requests)
    for one in requests:
        assert tokens_of(updates[one.id]) == answer(one, VOCAB, 80, None)[0]
    assert engine.stats().preempted > 0


def test_cached_is_what_was_never_computed_however_often_a_request_starts() -> None:
    """One that gives way before it has computed anything may find more in the cache the next time."""
    generation = start().prepare(request(range(1, 11)))

    def begin(length: int) -> int:
        generation.start(Claim(length=length, pages=[], slot=0, hidden=None), points=[])
        return generation.usage.cached_tokens

    def park() -> int:
        generation.stop_holding()
        return generation.usage.cached_tokens

    assert (begin(4), park(), begin(6)) == (4, 0, 6)
    generation.advance(torch.zeros(2, 8))
    assert (park(), begin(8), park(), begin(2), park(), begin(8)) == (0, 6, 0, 2, 0, 6)
    generation.advance(torch.zeros(4, 8))
    assert generation.usage.cached_tokens == 6


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = start(max_batch=2, max_waiting=1)
    for _ in range(3):
        engine.add(request(SYSTEM, max_tokens=1))
    with pytest.raises(QueueFull, match=r"the queue is full; try again in \d+ s") as full:
        engine.add(request(SYSTEM))
    assert full.value.retry_after >= 1
    while not any(update.finish for update in engine.step()):
        pass
    engine.add(request(SYSTEM))


# ---- ends


def test_cancelling_at_any_time() -> None:
    for steps in range(6):
        engine = start(step_tokens=5)
        one, other = request(SYSTEM, max_tokens=9), request([9] * 30, max_tokens=9)
        engine.add(one)
        engine.add(other)
        updates = [update for _ in range(steps) for update in engine.step()]
        engine.cancel(one.id)
        engine.cancel(12345678)
        updates += engine.step()
        mine = [update for update in updates if update.request_id == one.id]
        assert mine[-1].finish == "cancelled"
        engine.check_integrity()
        while engine.has_work:
            updates += engine.step()
        assert tokens_of([u for u in updates if u.request_id == other.id]) == answer(other, VOCAB, CONTEXT, None)[0]


def test_a_model_that_breaks_ends_what_was_in_the_step_only() -> None:
    model = fake()
    engine = start(model, max_batch=1)
    first, second = request(SYSTEM), request([9] * 30)
    model.fails_in = 2
    updates = run(engine, [first, second])
    assert (updates[first.id][-1].finish, updates[first.id][-1].error) == ("error", "RuntimeError: the model broke")
    assert tokens_of(updates[second.id]) == answer(second, VOCAB, CONTEXT, None)[0]


class Parity:
    """A structure of odd tokens only, three of them; it fails after `patience`."""

    def __init__(self, patience: int = 100) -> None:
        self.tokens: list[int] = []
        self.patience = patience

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == 3

    def mask(self) -> NDArray[np.bool_]:
        if len(self.tokens) >= self.patience:
            raise ValueError("too complex")
        return np.arange(VOCAB) % 2 == 1

    def advance(self, token: int) -> None:
        assert token % 2 == 1
        self.tokens.append(token)

    def rollback(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]


@pytest.mark.parametrize("max_drafts", [0, 3])
def test_structure_and_its_errors_are_one_requests_own(max_drafts: int) -> None:
    engine = start(fake(quality=1.0), max_drafts=max_drafts)
    requests = [request([seed] * 10, max_tokens=9) for seed in (1, 2, 3)]
    for one, structure in zip(requests, [Parity(), Parity(patience=2), None], strict=True):
        generation = engine.prepare(one)
        generation.constraint = cast("Constraint | None", structure)
        engine.start(generation)
    updates = [update for _ in range(30) for update in engine.step()]
    good, bad, free = ([u for u in updates if u.request_id == one.id] for one in requests)
    link, expected = chain((1,) * 10), []
    for _ in range(3):
        expected.append(max(range(1, VOCAB, 2), key=lambda token: float(link_logits(link, VOCAB)[token])))
        link = chain((*[1] * 10, *expected))
    assert (tokens_of(good), good[-1].finish) == (expected, "stop")
    assert len(tokens_of(bad)) <= 2 and (bad[-1].finish, bad[-1].error) == ("error", "ValueError: too complex")
    assert tokens_of(free) == answer(requests[2], VOCAB, CONTEXT, None)[0]
    engine.check_integrity()


@pytest.mark.parametrize("quality", [0.0, 1.0])
def test_a_stop_string_ends_an_answer_within_the_drafts(quality: float) -> None:
    tokenizer = Tokenizer.embedded()  # its first tokens are single characters
    engine = Engine(fake(quality=quality), EngineSettings(), tokenizer, Budget(pages=200, slots=40))
    said, _ = answer(request(SYSTEM, max_tokens=30), VOCAB, CONTEXT, None)
    text = tokenizer.decode(said)
    stop = text[14:17]
    params = SamplingParams(max_tokens=30, temperature=0, stop=("?!?", stop), logprobs=0)
    one = Request(prompt_ids=SYSTEM, params=params)
    updates = run(engine, [one])[one.id]
    assert "".join(update.text for update in updates) == text[: text.index(stop)]
    assert tokens_of(updates) == said[: text.index(stop)]
    assert (updates[-1].finish, updates[-1].stopped_by) == ("stop", stop)
    assert [[line[0].token for line in update.logprobs] for update in updates] == [list(u.tokens) for u in updates]


def test_the_context_ends_an_answer() -> None:
    engine = start(fake(context=30))
    for prompt in (SYSTEM, [1] * 30):
        last = ask(engine, request(prompt, max_tokens=99))
        assert (last.finish, last.usage.completion_tokens) == ("length", 30 - len(prompt))


# ---- logprobs


def test_logprobs_of_prompt_and_answer() -> None:
    engine = start()
    cached(engine, SYSTEM)
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=0)
    one = Request(prompt_ids=SYSTEM, params=params)
    updates = run(engine, [one])[one.id]
    said = answer(one, VOCAB, CONTEXT, None)[0]
    prompt = updates[0].prompt_logprobs
    assert prompt is not None and all(update.prompt_logprobs is None for update in updates[1:])
    told = [*prompt, *(line for update in updates for line in update.logprobs)]
    assert updates[-1].usage.cached_tokens == 0, "all of the prompt had to be computed"
    assert [line[0].token for line in told] == [*SYSTEM[1:], *said]
    for index, line in enumerate(told):
        table = logits_after([*SYSTEM, *said], index + 1).log_softmax(-1)
        assert line[0].logprob == pytest.approx(float(table[line[0].token]), abs=1e-6)
    assert [len(line) for line in told] == [1] * (len(SYSTEM) - 1) + [3] * 5


def test_the_logprobs_of_the_token_that_ends_an_answer() -> None:
    said = answer(request(SYSTEM, max_tokens=5), VOCAB, CONTEXT, None)[0]
    params = SamplingParams(max_tokens=9, temperature=0, logprobs=1, stop_ids=(said[4],))
    one = Request(prompt_ids=SYSTEM, params=params)
    *before, last = run(start(), [one])[one.id]
    assert (last.finish, last.stopped_by, len(last.logprobs)) == ("stop", said[4], len(last.tokens))
    assert all(not update.stop_logprobs for update in before)
    table = logits_after([*SYSTEM, *said], len(SYSTEM) + 4).log_softmax(-1)
    assert [entry.token for entry in last.stop_logprobs] == [said[4], said[4]]
    assert last.stop_logprobs[0].logprob == pytest.approx(float(table[said[4]]), abs=1e-6)
    silent = Request(prompt_ids=SYSTEM, params=replace(params, logprobs=None))
    assert not run(start(), [silent])[silent.id][-1].stop_logprobs


def logits_after(tokens: list[int], length: int) -> Tensor:
    return link_logits(chain(tuple(tokens[:length])), VOCAB)


def test_the_prompts_logprobs_alone() -> None:
    engine = start()
    one = Request(prompt_ids=SYSTEM, params=SamplingParams(max_tokens=0, prompt_logprobs=1))
    (update,) = run(engine, [one])[one.id]
    assert update.finish == "length" and update.prompt_logprobs is not None
    assert len(update.prompt_logprobs) == len(SYSTEM) - 1


# ---- errors


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 99], {}, "the prompt has token 99, the model knows 0 to 23"),
        ([1] * 201, {}, "the prompt has 201 tokens, the model takes 200"),
        ([1] * 90, {}, "the prompt has 90 tokens, the caches hold 80: shorten it, or give more memory"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias has token 99"),
    ],
)
def test_what_could_never_be_answered_is_refused(prompt: list[int], params: dict, message: str) -> None:
    engine = start(pages=20)
    with pytest.raises(ValueError, match=message):
        engine.add(Request(prompt_ids=prompt, params=SamplingParams(**params)))
    assert not engine.has_work


def test_memory_is_divided_and_too_little_of_it_refused() -> None:
    model = FakeModel(state_bytes=3200, context=2000, page_tokens=4)  # a page has 96 bytes
    with pytest.raises(ValueError, match=r"0\.0 MB for caches is too little, this model needs 0\.0 MB at least"):
        divide(model, 256 * 96 + 3199, max_batch=4, max_drafts=3)
    least = divide(model, 256 * 96 + 3200, max_batch=4, max_drafts=3)
    assert least == Budget(pages=256, slots=1) and least.context(model) == 1024
    for memory in (40_000, 100_000, 1_000_000, 10**9):
        budget = divide(model, memory, max_batch=4, max_drafts=3)
        assert budget.pages * 96 + budget.slots * 3200 <= memory
        assert budget.slots >= min(8, (memory - 256 * 96) // 3200)
    assert divide(model, 10**9, max_batch=4, max_drafts=3) == Budget(pages=500 * 1024, slots=1024)


def test_with_a_disk_its_records_are_part_of_the_memory() -> None:
    model = FakeModel(state_bytes=3200, context=2000, page_tokens=4)
    record, least = 3200 + 96 + 4 * 8, 256 * 96 + 3200
    with pytest.raises(ValueError, match="is too little"):
        divide(model, least + 2 * record - 1, max_batch=4, max_drafts=3, disk=True)
    for memory in (least + 2 * record, 100_000, 1_000_000, 10**8):
        budget = divide(model, memory, max_batch=4, max_drafts=3, disk=True)
        assert 2 * record <= budget.disk_buffer <= 2 * record + memory // 8
        assert budget.pages * 96 + budget.slots * 3200 + budget.disk_buffer <= memory


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="step_tokens must be 1 or more, got 0"):
        EngineSettings(step_tokens=0)
    with pytest.raises(ValueError, match="max_drafts must be 0 or more, got -1"):
        EngineSettings(max_drafts=-1)


# ---- speculation


def test_good_drafts_spare_steps_and_bad_ones_are_given_up() -> None:
    steps: dict[float, int] = {}
    for quality in (1.0, 0.0):
        model = fake(quality=quality, context=400)
        engine = start(model)
        one = request(SYSTEM, max_tokens=300)
        usage = run(engine, [one])[one.id][-1].usage
        steps[quality] = len(model.steps)
        if quality:
            assert usage.accepted_tokens == usage.drafted_tokens > 100
        else:
            assert usage.accepted_tokens < 5 and usage.drafted_tokens < 60, "some are right by chance"
    assert steps[1.0] < 0.6 * steps[0.0]


def test_sampled_drafts_are_drawn_with_the_same_noise() -> None:
    """A draft module that is always right is then always believed, whatever the temperature."""
    engine = start(fake(quality=1.0))
    usage = ask(engine, request(SYSTEM, max_tokens=60, temperature=1.5, seed=3)).usage
    assert usage.accepted_tokens == usage.drafted_tokens > 10


def test_results_are_finite() -> None:
    """A model whose logits are no numbers ends the request, in one line."""
    model = fake()
    model.logits = lambda hidden: torch.full((len(hidden), VOCAB), float("nan"))
    engine = start(model)
    one = request(SYSTEM)
    (update,) = run(engine, [one])[one.id]
    assert update.finish == "error" and update.error and "no token can be drawn" in update.error
