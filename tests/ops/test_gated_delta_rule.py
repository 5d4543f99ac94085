"""The fast forms of the gated delta rule are its definition: outputs, final states, every gradient, any length."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from tenfold.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    gated_delta_rule,
    naive_gated_delta_rule,
    recurrent_gated_delta_rule,
)

modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

LENGTHS = [1, 2, 63, 64, 65, 500]
PACKED = [0, 1, 3, 66, 130, 195, 200]  # lengths 1, 2, 63, 64, 65, 5
EXACT = 1e-12  # fp64 sums in another order, over up to 500 tokens; measured: up to 5e-14
SINGLE = 2e-5  # the same in fp32, against fp64; measured: up to 6e-6, as much as transformers' own


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) for x in self))

    def tokens(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, g, beta = (x[:, begin:end] for x in self[:5])
        return q, k, v, g, beta

    def with_grad(self) -> Inputs:
        return Inputs(*(x.detach().clone().requires_grad_() for x in self))


def draw(
    batch: int, length: int, heads: int = 2, repeat: int = 2, dims: tuple[int, int] = (8, 6), sequences: int = 0
) -> Inputs:
    """As a model makes them, in fp64: unit keys and queries, decays from almost none to almost all."""
    key_dim, value_dim = dims
    value_heads = heads * repeat
    q, k = F.normalize(torch.randn(2, batch, length, heads, key_dim, dtype=torch.float64), dim=-1)
    v = torch.randn(batch, length, value_heads, value_dim, dtype=torch.float64)
    g = -torch.randn(batch, length, value_heads, dtype=torch.float64).mul(2).exp() / 10
    beta = torch.randn(batch, length, value_heads, dtype=torch.float64).sigmoid()
    state = torch.randn(sequences or batch, value_heads, value_dim, key_dim, dtype=torch.float64)
    return Inputs(q, k, v, g, beta, state)


def gradients(outputs: tuple[Tensor, Tensor], inputs: Inputs, through: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """Of a fixed random combination of the outputs that count."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    loss = sum((x * w).sum() for x, w, counts in zip(outputs, weights, through, strict=True) if counts)
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_final_state_are_the_definitions(
    length: int, repeat: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = draw(2, length, repeat=repeat)
    expected = naive_gated_delta_rule(*inputs)
    found = gated_delta_rule(*inputs.to(dtype))
    assert all(x.dtype == dtype for x in found)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_the_state_begins_empty_where_none_is_given() -> None:
    inputs = draw(2, 70)
    expected = naive_gated_delta_rule(*inputs[:5], torch.zeros_like(inputs.state))
    for rule in (naive_gated_delta_rule, gated_delta_rule):
        assert_close(rule(*inputs[:5]), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 256])
def test_the_length_of_chunks_does_not_matter(chunk: int) -> None:
    inputs = draw(2, 100)
    found = chunk_gated_delta_rule(*inputs, chunk=chunk)
    assert_close(found, naive_gated_delta_rule(*inputs), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("length", [1, 65])
def test_recurrent_form_is_the_definition_and_leaves_the_given_state_alone(length: int) -> None:
    inputs = draw(3, length, repeat=3)
    before = inputs.state.clone()
    found = recurrent_gated_delta_rule(*inputs)
    assert_close(found, naive_gated_delta_rule(*inputs), rtol=EXACT, atol=EXACT)
    assert torch.equal(inputs.state, before)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("length", [1, 65, 130])
def test_agrees_with_transformers(name: str, length: int) -> None:
    inputs = draw(2, length, repeat=2).to(torch.float32)
    state = inputs.state.transpose(2, 3)  # transformers keeps [K, V]
    o, last = getattr(modeling, name)(*inputs[:5], initial_state=state, output_final_state=True)
    found = gated_delta_rule(*inputs)
    assert_close(found, (o, last.transpose(2, 3)), rtol=2 * SINGLE, atol=2 * SINGLE)  # both are rounded


def test_packed_sequences_are_the_definitions() -> None:
    cu_seqlens = torch.tensor(PACKED)
    inputs = draw(2, PACKED[-1] // 2, sequences=len(PACKED) - 1)
    expected = naive_gated_delta_rule(*inputs, cu_seqlens)
    assert_close(gated_delta_rule(*inputs, cu_seqlens), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("cu_seqlens", [[0, 5], [0, 1, 5]], ids=str)
def test_gradients_of_every_input_are_finite_differences(cu_seqlens: list[int], repeat: int) -> None:
    inputs = draw(1, 5, 1, repeat, (3, 2), sequences=len(cu_seqlens) - 1).with_grad()
    packed = torch.tensor(cu_seqlens)
    assert gradcheck(lambda *x: chunk_gated_delta_rule(*x, cu_seqlens=packed, chunk=2), tuple(inputs))


@pytest.mark.parametrize("through", [(True, False), (False, True), (True, True)], ids=["output", "state", "both"])
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_every_input_are_the_definitions(length: int, through: tuple[bool, bool]) -> None:
    inputs = draw(1, length).with_grad()
    expected = gradients(naive_gated_delta_rule(*inputs), inputs, through)
    assert_close(gradients(gated_delta_rule(*inputs), inputs, through), expected, rtol=EXACT, atol=EXACT)


def test_gradients_of_packed_sequences_are_the_definitions() -> None:
    cu_seqlens = torch.tensor(PACKED)
    inputs = draw(2, PACKED[-1] // 2, repeat=3, sequences=len(PACKED) - 1).with_grad()
    expected = gradients(naive_gated_delta_rule(*inputs, cu_seqlens), inputs, (True, True))
    found = gradients(gated_delta_rule(*inputs, cu_seqlens), inputs, (True, True))
    assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("cuts", [[1], [64], [65, 66, 67], [3, 64, 65, 129]], ids=str)
def test_prefill_and_decode_are_one_pass(cuts: list[int]) -> None:
    inputs = draw(2, 130)
    outputs, state = [], inputs.state
    with torch.no_grad():
        for begin, end in zip([0, *cuts], [*cuts, 130], strict=True):
            o, state = gated_delta_rule(*inputs.tokens(begin, end), state)
            outputs.append(o)
    expected = naive_gated_delta_rule(*inputs)
    assert_close((torch.cat(outputs, 1), state), expected, rtol=EXACT, atol=EXACT)


def test_without_writes_the_memory_only_fades() -> None:
    inputs = draw(2, 70)
    _, state = gated_delta_rule(*inputs._replace(beta=torch.zeros_like(inputs.beta)))
    expected = inputs.g.sum(1).exp()[..., None, None] * inputs.state
    assert_close(state, expected, rtol=EXACT, atol=EXACT)


def test_a_full_write_is_read_back_at_once() -> None:
    """With beta = 1 and q = k, what comes out is the value that went in, whatever the memory held."""
    inputs = draw(2, 70)
    o, _ = gated_delta_rule(*inputs._replace(q=inputs.k * math.sqrt(8), beta=torch.ones_like(inputs.beta)))
    assert_close(o, inputs.v, rtol=EXACT, atol=EXACT)


EXTREMES = {
    "all is forgotten": {"g": -1e4},
    "nothing is forgotten": {"g": 0.0},
    "nothing is written": {"beta": 0.0},
    "all is overwritten": {"beta": 1.0, "g": 0.0},
    "one key for all, overwritten": {"k": 8**-0.5, "beta": 1.0, "g": 0.0},
    "no key": {"k": 0.0},
    "large values": {"v": 1e4},
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_extreme_values_stay_finite_and_right_in_fp32(values: dict[str, float]) -> None:
    drawn = draw(1, 130)
    inputs = drawn._replace(**{name: torch.full_like(getattr(drawn, name), x) for name, x in values.items()})
    expected, found = inputs.with_grad(), inputs.to(torch.float32).with_grad()
    outputs = naive_gated_delta_rule(*expected), gated_delta_rule(*found)
    pairs = [*zip(*outputs, strict=True)]
    pairs += zip(*(gradients(o, x, (True, True)) for o, x in zip(outputs, (expected, found), strict=True)), strict=True)
    for definition, single in pairs:
        size = max(1.0, definition.abs().max().item())
        assert_close(single, definition, rtol=0.0, atol=SINGLE * size, check_dtype=False)


@pytest.mark.parametrize("length", [1, 70])
def test_half_precision_is_computed_in_fp32_with_and_without_autocast(length: int) -> None:
    inputs = draw(2, length).to(torch.bfloat16)
    with torch.no_grad():
        single = gated_delta_rule(*inputs.to(torch.float32))
        plain = gated_delta_rule(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = gated_delta_rule(*inputs)
    for o, state in (plain, autocast):
        assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert torch.equal(o, single[0].bfloat16()) and torch.equal(state, single[1])


WRONG = {
    "k": ((2, 5, 2, 7), r"q \[2, 5, 2, 8\], k \[2, 5, 2, 7\]"),
    "v": ((2, 5, 3, 6), r"a multiple of H.* v \[2, 5, 3, 6\]"),
    "g": ((2, 5, 2), r"must be \[2, 5, 4\], got \[2, 5, 2\]"),
    "beta": ((2, 4, 4), r"must be \[2, 5, 4\], got \[2, 5, 4\] and \[2, 4, 4\]"),
    "state": ((3, 4, 6, 8), r"initial_state must be \[2, 4, 6, 8\], got \[3, 4, 6, 8\]"),
}


@pytest.mark.parametrize("name, shape, message", [(name, *case) for name, case in WRONG.items()], ids=WRONG)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = draw(2, 5)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*inputs._replace(**{name: torch.ones(shape, dtype=torch.float64)}))


def test_a_state_for_every_packed_sequence_is_asked_for() -> None:
    inputs = draw(1, 5)
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 4, 6, 8\], got \[1, 4, 6, 8\]"):
        gated_delta_rule(*inputs, torch.tensor([0, 2, 5]))
