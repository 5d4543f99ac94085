"""Many sequences in the native model's pool: the same bits as each one alone, and nothing of what a block held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.engine.model_runner import EngineModel, Span
from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.native import NativeModel, thrifty_tokens
from tenfold.models.native_cache import KV_FORMATS, PAGE
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tests.models import native_models
from tests.models.native_models import one_native_thread

__all__ = ["one_native_thread"]  # a fixture for all tests of this file

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

NEXT = Qwen3NextConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    full_attention_interval=2,
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
)
DENSE = Qwen3Config(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
PAGES, SLOTS = 24, 12

# Relative error of logits: six products of bf16 weights (test_native.py) follow one another, and the head.
DRAFT_TOLERANCE = 0.0025 * 10**0.5


def new_model(config: Config = NEXT, kv_format: str = "fp16", format: str = "int8") -> NativeModel:
    """With a pool that others have used: all blocks hold NaN, or large integers."""
    model = NativeModel.pack(config, native_models.new_model(config).named_parameters(), format, kv_format)
    model.allocate(PAGES, SLOTS)
    for page in range(PAGES):
        model.write_page(page, torch.full((model.page_bytes,), 255, dtype=torch.uint8))
    for slot in range(SLOTS):
        model.write_state(slot, torch.full((model.state_bytes,), 255, dtype=torch.uint8))
    return model


def random_tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: NativeModel, tokens: Sequence[int]) -> Tensor:
    return model.hidden_states(tokens, model.new_cache())


def satisfies(model: EngineModel) -> EngineModel:
    """For the type checker: the native model is what the engine asks for."""
    return model


@pytest.fixture(scope="module")
def shared_model() -> NativeModel:
    return new_model()


# ---- company ---------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps of (sequence, tokens): up to four sequences of up to 70 tokens, cut anywhere, in any company."""
    left = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    steps = []
    while any(left):
        waiting = [n for n, count in enumerate(left) if count]
        chosen = draw(st.permutations(waiting))[: draw(st.integers(1, len(waiting)))]
        cut = st.sampled_from((1, 2, 3, 31, 32, 33, 70))
        steps.append([(n, min(draw(cut), left[n])) for n in chosen])
        for n, count in steps[-1]:
            left[n] -= count
    return steps


def run_schedule(model: NativeModel, steps: list[list[tuple[int, int]]]) -> list[tuple[list[int], Tensor]]:
    """Each sequence's tokens and hidden states."""
    count = 1 + max(n for step in steps for n, _ in step)
    tokens = [random_tokens(70, seed=n) for n in range(count)]
    pages = torch.randperm(PAGES, generator=torch.Generator().manual_seed(3)).tolist()
    tables, done = [pages[3 * n : 3 * n + 3] for n in range(count)], [0] * count
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for n in range(count):
        model.clear_state(SLOTS - 1 - n)
    for step in steps:
        spans = [
            Span(tokens=tokens[n][done[n] : done[n] + size], slot=SLOTS - 1 - n, past=done[n], pages=tables[n])
            for n, size in step
        ]
        for (n, size), hidden in zip(step, model.forward(spans).split([size for _, size in step]), strict=True):
            found[n].append(hidden)
            done[n] += size
    return [(tokens[n][: done[n]], torch.cat(found[n])) for n in range(count)]


@settings(max_examples=25)
@given(steps=schedules())
def test_cuts_and_company_do_not_change_bits(shared_model: NativeModel, steps: list[list[tuple[int, int]]]) -> None:
    for tokens, hidden in run_schedule(shared_model, steps):
        assert torch.equal(hidden, alone(shared_model, tokens))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("config", [NEXT, DENSE], ids=["next", "dense"])
def test_every_format_of_keys_and_values(config: Config, kv_format: str) -> None:
    model = new_model(config, kv_format)
    for tokens, hidden in run_schedule(model, [[(0, 33), (1, 1)], [(1, 1), (0, 1), (2, 40)], [(2, 1), (1, 30)]]):
        assert torch.equal(hidden, alone(model, tokens))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown format of keys and values 'fp8': fp32, fp16, bf16, int8"):
        new_model(kv_format="fp8")


# ---- blocks ----------------------------------------------------------------------------------------------------


def test_sequences_share_the_pages_of_their_common_beginning(shared_model: NativeModel) -> None:
    model, start = shared_model, random_tokens(PAGE)
    model.clear_state(0)
    model.forward([Span(tokens=start, slot=0, past=0, pages=[5])])
    model.copy_state(0, 1)
    ends = random_tokens(4, seed=8), random_tokens(9, seed=9)
    spans = [Span(tokens=end, slot=n, past=PAGE, pages=[5, 6 + n]) for n, end in enumerate(ends)]
    for end, hidden in zip(ends, model.forward(spans).split([4, 9]), strict=True):
        assert torch.equal(hidden, alone(model, start + end)[PAGE:])


def test_a_sequence_goes_on_from_copies(shared_model: NativeModel) -> None:
    model, tokens = shared_model, random_tokens(50)
    model.clear_state(0)
    model.forward([Span(tokens=tokens[:40], slot=0, past=0, pages=[1, 2])])
    model.copy_page(2, 7)
    model.copy_state(0, 3)
    model.forward([Span(tokens=random_tokens(10, seed=2), slot=0, past=40, pages=[1, 2])])  # another end
    found = model.forward([Span(tokens=tokens[40:], slot=3, past=40, pages=[1, 7])])
    assert torch.equal(found, alone(model, tokens)[40:])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_blocks_may_leave_and_come_back(kv_format: str) -> None:
    model, tokens = new_model(kv_format=kv_format), random_tokens(50)
    model.clear_state(0)
    model.forward([Span(tokens=tokens[:40], slot=0, past=0, pages=[1, 2])])
    held = model.read_page(1), model.read_page(2), model.read_state(0)
    assert [len(content) for content in held] == [model.page_bytes] * 2 + [model.state_bytes]
    other = new_model(kv_format=kv_format)
    other.write_page(9, held[0])
    other.write_page(3, held[1])
    other.write_state(4, held[2])
    assert all(torch.equal(*pair) for pair in zip(held[1:], (other.read_page(3), other.read_state(4)), strict=True))
    found = other.forward([Span(tokens=tokens[40:], slot=4, past=40, pages=[9, 3])])
    assert torch.equal(found, alone(model, tokens)[40:])


def test_bytes_are_those_of_the_shapes() -> None:
    model, quarter = new_model(kv_format="fp16"), new_model(DENSE, "int8")
    assert model.page_bytes == 2 * PAGE * 32 * 2 * (1 + 1)  # keys and values of a layer and the MTP module
    assert model.state_bytes == 2 * 4 * (2 * 32 * 16 + 3 * (2 * 16 + 2 * 32))
    assert quarter.page_bytes == 2 * 2 * PAGE * (16 + 4) and quarter.state_bytes == 0
    assert satisfies(model).can_draft and not satisfies(quarter).can_draft


def test_steps_are_worth_reading_the_experts_for() -> None:
    assert thrifty_tokens(Qwen3NextConfig()) == 16 * 512 // 10
    assert thrifty_tokens(NEXT) == thrifty_tokens(DENSE) == 160


def test_foreign_content_is_refused(shared_model: NativeModel) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[\d+\], got torch.uint8 \[3\]"):
        shared_model.write_page(0, torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        shared_model.write_state(0, torch.zeros(shared_model.state_bytes))


def test_too_much_memory_is_an_error() -> None:
    model = NativeModel.pack(NEXT, native_models.new_model(NEXT).named_parameters(), "int8")
    with pytest.raises(MemoryError):
        model.allocate(1 << 40, 1)


# ---- saved states ----------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(past=st.integers(0, 40), count=st.integers(1, 20), saved=st.integers(0, 8), company=st.booleans())
def test_saved_states_are_those_of_shorter_runs(
    shared_model: NativeModel, past: int, count: int, saved: int, company: bool
) -> None:
    model, tokens = shared_model, random_tokens(past + count)
    model.clear_state(0)
    model.clear_state(SLOTS - 1)
    if past:
        model.forward([Span(tokens=tokens[:past], slot=0, past=0, pages=[0, 1])])
    model.copy_state(0, 1)
    model.copy_page(0, 5)
    model.copy_page(1, 6)
    saves = [2 + i for i in range(min(saved, count))]
    spans = [Span(tokens=tokens[past:], slot=0, past=past, pages=[0, 1], saves=saves)]
    if company:
        spans.insert(0, Span(tokens=[1, 2, 3], slot=SLOTS - 1, past=0, pages=[9], saves=[SLOTS - 2, SLOTS - 1]))
    found = model.forward(spans)
    assert torch.equal(found[-count:], alone(model, tokens)[past:])
    for i in range(count):
        model.forward([Span(tokens=[tokens[past + i]], slot=1, past=past + i, pages=[5, 6])])
        if (place := i - (count - len(saves))) >= 0:
            assert torch.equal(model.read_state(saves[place]), model.read_state(1))
    assert torch.equal(model.read_state(0), model.read_state(1))


def test_the_last_saved_state_may_be_the_slots_own(shared_model: NativeModel) -> None:
    model, tokens = shared_model, random_tokens(5)
    for slot in (0, 1):
        model.clear_state(slot)
    model.forward([Span(tokens=tokens, slot=0, past=0, pages=[0], saves=[2, 3])])
    model.forward([Span(tokens=tokens, slot=1, past=0, pages=[1], saves=[4, 1])])
    assert torch.equal(model.read_state(2), model.read_state(4))
    assert torch.equal(model.read_state(0), model.read_state(3))
    assert torch.equal(model.read_state(0), model.read_state(1))


@pytest.mark.parametrize("saves", [[0, 3], [2, 2], [1], [SLOTS]])
def test_states_that_share_a_slot_are_refused(shared_model: NativeModel, saves: list[int]) -> None:
    spans = [
        Span(tokens=[1, 2, 3], slot=0, past=0, pages=[0], saves=saves),
        Span(tokens=[4], slot=1, past=0, pages=[1]),
    ]
    with pytest.raises(ValueError, match=r"share slot|there are 12 slots"):
        shared_model.forward(spans)


def test_more_saved_states_than_tokens_are_refused(shared_model: NativeModel) -> None:
    with pytest.raises(ValueError, match="sequence 0 of 1 tokens has no 2 states to save"):
        shared_model.forward([Span(tokens=[1], slot=0, past=0, pages=[0], saves=[1, 2])])


# ---- drafts ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drafts_are_those_that_torch_was_trained_to_make() -> None:
    config = replace(NEXT, head_dim=64, partial_rotary_factor=0.5)
    model, reference, tokens = new_model(config, "fp32", "bf16"), native_models.new_model(config), random_tokens(45)
    assert isinstance(reference, Qwen3Next)
    hidden, _ = reference.hidden_states(torch.tensor([tokens]))
    [(state, _)] = reference.draft_states(torch.tensor([tokens]), hidden, 1)
    right = model.logits(state[0, :-1].contiguous())  # the last one has no token after it
    spans = [Span(tokens=tokens[1:], slot=0, past=0, pages=[3, 4])]
    found = model.logits(model.draft(spans, hidden[0, :-1]))
    assert (found - right).norm() / right.norm() < DRAFT_TOLERANCE


@torch.no_grad()
def test_a_chain_of_drafts_goes_on_from_its_own_states() -> None:
    """Against torch's module over the whole chain at once: one more token and state at a time, positions going on."""
    model, reference, tokens = new_model(NEXT, "fp32", "bf16"), native_models.new_model(NEXT), random_tokens(40)
    assert isinstance(reference, Qwen3Next) and reference.mtp
    hidden = alone(model, tokens)
    states = [model.draft([Span(tokens=tokens[1:], slot=0, past=0, pages=[3, 4])], hidden[:-1])]
    drafts = [11, 22, 33]
    for i, draft in enumerate(drafts):
        states.append(model.draft([Span(tokens=[draft], slot=0, past=39 + i, pages=[3, 4])], states[-1][-1:]))
    found = torch.cat(states)
    inputs = torch.cat((hidden[:-1], found[38:-1]))
    ids = torch.tensor([tokens[1:] + drafts])
    rotation = reference.rotation(ids, None, None)
    right, _ = reference.mtp(reference.model.embed_tokens(ids), inputs[None], rotation, None)
    assert (found - right[0]).norm() / right.norm() < DRAFT_TOLERANCE


def test_drafts_have_the_same_bits_in_any_cuts_and_company(shared_model: NativeModel) -> None:
    model, tokens = shared_model, random_tokens(45)
    hidden = alone(model, tokens)[:-1]
    whole = model.draft([Span(tokens=tokens[1:], slot=0, past=0, pages=[3, 4])], hidden)
    cut, past = [], 0
    for size in (1, 30, 2, 1, 10):
        spans = [
            Span(tokens=[7, 8], slot=1, past=0, pages=[9]),
            Span(tokens=tokens[1 + past : 1 + past + size], slot=0, past=past, pages=[5, 6]),
        ]
        cut.append(model.draft(spans, torch.cat((hidden[:2], hidden[past : past + size])))[2:])
        past += size
    assert torch.equal(torch.cat(cut), whole)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_what_only_follows_leaves_the_keys_and_values_of_drafts(kv_format: str) -> None:
    """In pieces, with company, and behind drafts that were not right: every bit of the pages."""
    model, tokens = new_model(kv_format=kv_format), random_tokens(41)
    hidden = alone(model, tokens)[:-1]
    model.draft([Span(tokens=tokens[1:], slot=0, past=0, pages=[3, 4])], hidden)
    model.draft([Span(tokens=tokens[1:4], slot=0, past=0, pages=[5, 6])], hidden[:3])
    model.draft([Span(tokens=[7, 8], slot=0, past=3, pages=[5, 6])], hidden[:2])
    past = 3
    for size in (1, 30, 6):
        spans = [
            Span(tokens=[7, 8], slot=1, past=0, pages=[9]),
            Span(tokens=tokens[1 + past : 1 + past + size], slot=0, past=past, pages=[5, 6]),
        ]
        model.follow(spans, torch.cat((hidden[:2], hidden[past : past + size])))
        past += size
    for drafted, followed in ((3, 5), (4, 6)):
        assert torch.equal(model.read_page(drafted), model.read_page(followed))


def test_drafting_leaves_the_body_alone(shared_model: NativeModel) -> None:
    """Its keys and values lie in the same pages, but not where the body's do."""
    model, tokens = shared_model, random_tokens(40)
    model.clear_state(0)
    hidden = model.forward([Span(tokens=tokens[:36], slot=0, past=0, pages=[3, 4])])
    before = model.read_state(0)
    drafted = model.draft([Span(tokens=tokens[1:37], slot=0, past=0, pages=[3, 4])], hidden)
    model.draft([Span(tokens=[int(model.logits(drafted[-1:]).argmax())], slot=0, past=36, pages=[3, 4])], drafted[-1:])
    assert torch.equal(model.read_state(0), before)
    found = model.forward([Span(tokens=tokens[36:], slot=0, past=36, pages=[3, 4])])
    assert torch.equal(found, alone(model, tokens)[36:])


# ---- fingerprints ----------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart() -> None:
    model = native_models.new_model(NEXT)
    first = NativeModel.pack(NEXT, model.named_parameters(), "int8")
    same = NativeModel.pack(NEXT, reversed(list(model.named_parameters())), "int8")
    assert first.fingerprint == same.fingerprint
    others = [
        NativeModel.pack(NEXT, model.named_parameters(), "int4").fingerprint,
        NativeModel.pack(NEXT, model.named_parameters(), "int8", "int8").fingerprint,
        NativeModel.pack(replace(NEXT, rope_theta=5e6), model.named_parameters(), "int8").fingerprint,
    ]
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.q_norm.weight")[3] += 1
    others.append(NativeModel.pack(NEXT, model.named_parameters(), "int8").fingerprint)
    assert len({first.fingerprint, *others}) == 5


def test_a_fingerprint_tells_instruction_sets_apart() -> None:
    before = cpu.isa()
    found = set()
    for isa in cpu.isas():
        cpu.use_isa(isa)
        found.add(new_model().fingerprint)
    cpu.use_isa(before)
    assert len(found) == len(cpu.isas())
