"""The engine's promise on the native kernels: a request gets the tokens that it gets alone, bit for bit.

The reference is generation from a cache of its own: the prompt in one pass, then one token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine.budget import Budget
from tenfold.engine.engine import Engine, EngineSettings
from tenfold.engine.llm import generate
from tenfold.engine.request import Request, Update
from tenfold.engine.sampler import SamplingParams
from tenfold.engine.step_cost import DraftLength, StepCost
from tenfold.kernels import cpu
from tenfold.models.native import NativeModel
from tenfold.models.native_cache import PAGE
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tests.engine.reference import run, tokens_of

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

VOCAB, CONTEXT = 100, 320
MIXED = Qwen3NextConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    full_attention_interval=2,
    mlp_only_layers=(1,),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    num_nextn_predict_layers=1,
    max_position_embeddings=CONTEXT,
)
Format = Literal["bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")
PROMPT = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(autouse=True, scope="module")
def one_native_thread() -> Iterator[None]:
    before = cpu.threads()
    cpu.set_threads(1)
    yield
    cpu.set_threads(before)


@pytest.fixture(autouse=True)
def drafts_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of all lengths are made, whether they pay or not, and the clock decides nothing."""
    lengths = iter(range(1 << 30))
    monkeypatch.setattr(DraftLength, "choose", lambda *args: next(lengths) % (args[-1] + 1))
    monkeypatch.setattr(StepCost, "seconds", lambda _, tokens: 1 + 0.1 * tokens)


@cache
def weights() -> Qwen3Next:
    model = Qwen3Next(MIXED)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():  # larger, so that tokens have favourites
            parameter += (0.2 if parameter.ndim == 1 else 0.05) * torch.randn(parameter.shape, generator=generator)
    return model


def new_model(format: Format) -> NativeModel:
    return NativeModel.pack(MIXED, weights().named_parameters(), format)


@cache
def lone_model(format: Format) -> NativeModel:
    return new_model(format)


def alone(format: Format, one: Request) -> list[int]:
    params = one.params
    return _alone(format, tuple(one.prompt_ids), params.max_tokens, params.temperature, params.seed)


@cache
def _alone(format: Format, prompt: tuple[int, ...], max_tokens: int, temperature: float, seed: int) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return list(generate(lone_model(format), prompt, params))


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What must not change a token."""

    step_tokens: int = 256
    max_batch: int = 8
    max_drafts: int = 3
    pages: int = 60
    slots: int = 24

    def engine(self, model: NativeModel, disk: Path | None = None) -> Engine:
        chosen = EngineSettings(
            step_tokens=self.step_tokens, max_batch=self.max_batch, max_drafts=self.max_drafts, disk=disk
        )
        return Engine(model, chosen, budget=Budget(pages=self.pages, slots=self.slots, disk_buffer=1 << 22))


def request(prompt: Sequence[int], max_tokens: int = 24, temperature: float = 0.0, seed: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return Request(prompt_ids=list(prompt), params=params)


def ask(engine: Engine, format: Format, requests: Sequence[Request]) -> list[Update]:
    """The last updates of requests that run together; each answer is that of the request alone."""
    updates = run(engine, requests)
    for one in requests:
        assert tokens_of(updates[one.id]) == alone(format, one)
        assert updates[one.id][-1].finish == "length"
    return [updates[one.id][-1] for one in requests]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("step_tokens", [5, 32, 256])
def test_in_company_and_in_chunks(format: Format, temperature: float, step_tokens: int) -> None:
    engine = Knobs(step_tokens=step_tokens).engine(new_model(format))
    lengths = (1, 31, 32, 33, 70, 150)
    ask(engine, format, [request(PROMPT[-n:], temperature=temperature, seed=n) for n in lengths])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_drafts", [0, 1, 4])
def test_a_conversation_on_the_cache_and_after_a_restart(
    format: Format, temperature: float, max_drafts: int, tmp_path: Path
) -> None:
    """The second turn starts behind an answer that was decoded; cold, all of it is prefilled."""
    knobs = Knobs(max_drafts=max_drafts)
    engine = knobs.engine(new_model(format), tmp_path)
    first = request(PROMPT, temperature=temperature)
    ask(engine, format, [first])
    said = [*PROMPT, *alone(format, first)]
    second = request([*said, 7, 8, 9], temperature=temperature, seed=1)
    edited = request([*PROMPT, 50, 51], temperature=temperature)
    cached = [update.usage.cached_tokens for one in (second, edited) for update in ask(engine, format, [one])]
    assert cached == [len(said) - 1, len(PROMPT)]
    engine.close()
    again = knobs.engine(new_model(format), tmp_path)
    warm = [replace(one, id=one.id + 1_000_000) for one in (second, edited, first)]
    assert all(update.usage.cached_tokens >= len(PROMPT) for one in warm for update in ask(again, format, [one]))
    again.close()


@pytest.mark.parametrize("interval", [1, 9])
def test_models_of_one_kind_of_layer(interval: int, tmp_path: Path) -> None:
    """Without states every page has all there is; without pages a state has."""
    config = replace(MIXED, full_attention_interval=interval, mlp_only_layers=(), num_nextn_predict_layers=0)
    model = Qwen3Next(config)
    model.init_weights(torch.Generator().manual_seed(0))
    packed = NativeModel.pack(config, model.named_parameters(), "int8")
    for cached in (0, len(PROMPT)):
        engine = Engine(packed, EngineSettings(memory_bytes=8_000_000, disk=tmp_path))
        one = request(PROMPT)
        updates = run(engine, [one])[one.id]
        assert tokens_of(updates) == list(generate(packed, PROMPT, one.params))
        assert updates[-1].usage.cached_tokens == cached
        engine.close()


def test_drafts_are_accepted_and_rejected() -> None:
    """Sampled from flat distributions, the noise that they share makes the draft and the token agree now and then."""
    engine = Knobs().engine(new_model("int8"))
    usages = [u.usage for t in (0.0, 1.0, 3.0) for u in ask(engine, "int8", [request(PROMPT, 60, temperature=t)])]
    assert sum(usage.accepted_tokens for usage in usages) > 20
    assert all(usage.accepted_tokens < usage.drafted_tokens for usage in usages)


@st.composite
def scenes(draw: st.DrawFn) -> list[list[Request]]:
    """Waves of requests that extend, cut and repeat each other's prompts and answers."""
    texts, waves = [PROMPT], []
    for _ in range(draw(st.integers(1, 3))):
        wave = []
        for _ in range(draw(st.integers(1, 4))):
            known = draw(st.sampled_from(texts))
            tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
            prompt = [*known[: draw(st.integers(0, len(known)))], *tail][:250]
            temperature, seed = draw(st.sampled_from([0.0, 1.0, 3.0])), draw(st.integers(0, 2))
            wave.append(request(prompt, draw(st.integers(1, 40)), temperature, seed))
            texts.append([*prompt, *alone("int4", wave[-1])])
        waves.append(wave)
    return waves


KNOBS = st.builds(
    Knobs,
    step_tokens=st.sampled_from([1, 7, 33, 256]),
    max_batch=st.integers(1, 4),
    max_drafts=st.integers(0, 4),
    pages=st.sampled_from([-(-CONTEXT // PAGE), 14, 60]),
    slots=st.integers(1, 12),
)


@settings(max_examples=25)
@given(waves=scenes(), knobs=st.lists(KNOBS, min_size=3, max_size=3), on_disk=st.booleans())
def test_whatever_comes_together(waves: list[list[Request]], knobs: list[Knobs], on_disk: bool) -> None:
    """Every wave meets an engine of other knobs, and the disk's cache of those before."""
    with TemporaryDirectory() as folder:
        for wave, chosen in zip(waves, knobs, strict=False):
            engine = chosen.engine(new_model("int4"), Path(folder) if on_disk else None)
            ask(engine, "int4", wave)
            ask(engine, "int4", [replace(one, id=one.id + 1_000_000) for one in wave[:2]])  # warm
            engine.close()
            stats = engine.stats()
            assert stats.pages_held == stats.slots_held == 0
