"""Index tables name every token once, and no op looks across the border of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from tenfold.ops.attention import attention
from tenfold.ops.causal_conv import causal_conv1d
from tenfold.ops.gated_delta_rule import gated_delta_rule
from tenfold.ops.sequences import (
    Bounds,
    chunk_table,
    gather_rows,
    length_buckets,
    positions,
    prefixed_rows,
    sequence_bounds,
)

CPU = torch.device("cpu")
SINGLE = 2e-6  # fp32 sums in another order; measured: up to 2e-7
packings = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(lambda n: tuple(accumulate(n, initial=0)))


def test_rows_are_the_sequences_where_nothing_is_packed() -> None:
    assert sequence_bounds(None, 3, 4) == (0, 4, 8, 12)
    assert sequence_bounds(None, 3, 0) == (0,)


@given(packings)
def test_bounds_are_what_was_given(bounds: Bounds) -> None:
    for dtype in (torch.int32, torch.int64):
        assert sequence_bounds(torch.tensor(bounds, dtype=dtype), 1, bounds[-1]) == bounds


@pytest.mark.parametrize("wrong", [[], [0], [0, 5], [1, 6], [0, 3, 3, 6], [0, 4, 2, 6], [0, 7]], ids=str)
def test_bounds_that_do_not_rise_from_zero_to_the_end_are_named(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rise strictly from 0 to 6 \(batch 2 x length 3\), got \("):
        sequence_bounds(torch.tensor(wrong, dtype=torch.int32), 2, 3)


@given(packings)
def test_positions_count_from_zero_in_every_sequence(bounds: Bounds) -> None:
    assert positions(bounds, CPU).tolist() == [t for a, b in pairwise(bounds) for t in range(b - a)]


@given(packings, st.integers(0, 5))
def test_prefixed_rows_lay_prefix_and_tokens_of_each_sequence_side_by_side(bounds: Bounds, prefix: int) -> None:
    tokens, heads, tails = prefixed_rows(bounds, prefix, CPU)
    laid: list[int] = []
    for n, (a, b) in enumerate(pairwise(bounds)):
        own = heads[n].tolist() + tokens[a:b].tolist()
        assert tails[n].tolist() == own[len(own) - prefix :]
        laid += own
    assert laid == list(range(bounds[-1] + prefix * (len(bounds) - 1)))


@given(packings, st.integers(1, 9))
def test_chunks_name_every_token_once_in_order_from_its_sequences_start(bounds: Bounds, size: int) -> None:
    table, total = chunk_table(bounds, size, CPU), bounds[-1]
    assert table.rows[table.places].tolist() == list(range(total))
    chunks, lengths = table.rows.view(-1, size).tolist(), [b - a for a, b in pairwise(bounds)]
    assert sorted(table.order.tolist()) == list(range(len(lengths)))
    assert [lengths[n] for n in table.order] == sorted(lengths, reverse=True)
    first = 0
    for step, (begin, count) in enumerate(table.steps):
        assert begin == first and count > 0
        for n, chunk in zip(table.order[:count].tolist(), chunks[begin : begin + count], strict=True):
            tokens = range(bounds[n], bounds[n + 1])[step * size : (step + 1) * size]
            assert chunk == [*tokens, *[total] * (size - len(tokens))]
        first += count
    assert first == len(chunks)


@given(packings)
def test_buckets_name_every_token_once_and_pad_less_than_they_hold(bounds: Bounds) -> None:
    found: dict[int, list[int]] = {}
    named: list[int] = []
    for tokens, places in length_buckets(bounds, CPU):
        named += tokens.flatten()[places].tolist()
        for row in tokens.tolist():
            own = [t for t in row if t < bounds[-1]]
            assert row == own + [bounds[-1]] * (len(row) - len(own)) and len(row) < 2 * len(own)
            found[own[0]] = own
    assert sorted(named) == list(range(bounds[-1]))
    assert found == {a: list(range(a, b)) for a, b in pairwise(bounds)}


def test_the_row_after_the_last_reads_zeros_and_takes_no_gradient() -> None:
    x, rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([2, 3, 0, 2, 3])
    assert_close(gather_rows(x, rows), torch.stack((x[2], 0 * x[0], x[0], x[2], 0 * x[0])), rtol=0.0, atol=0.0)
    assert gradcheck(lambda x: gather_rows(x, rows), x)


Op = Callable[[list[Tensor], list[Tensor], Tensor | None], tuple[Tensor, ...]]


def run_attention(tokens: list[Tensor], states: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in tokens[0].split((32, 16, 16), -1))
    return (attention(q, k, v, cu_seqlens),)


def run_conv(tokens: list[Tensor], states: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, 64 * 4).view(64, 4)
    return causal_conv1d(tokens[0], weight, states[0].flatten(1)[:, : 64 * 3].unflatten(1, (64, 3)), cu_seqlens)


def run_delta_rule(tokens: list[Tensor], states: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in tokens[0].split((16, 16, 32), -1))
    g, beta = tokens[1].split((4, 4), -1)
    return gated_delta_rule(q / 3, k / 3, v, -g.square(), beta.sigmoid(), states[0], cu_seqlens)


OPS: dict[str, tuple[Op, float]] = {
    "attention": (run_attention, SINGLE),  # padded to the longest of a bucket, so blocked otherwise
    "causal convolution": (run_conv, 0.0),
    "gated delta rule": (run_delta_rule, 0.0),
}


def with_gradients(op: Op, tokens: list[Tensor], states: list[Tensor], cu_seqlens: Tensor | None) -> list[list[Tensor]]:
    """The op's output and the gradients of all tokens; its final state, if any, and the gradient of the first."""
    inputs = [x.detach().clone().requires_grad_() for x in (*tokens, *states)]
    output, *last = op(inputs[: len(tokens)], inputs[len(tokens) :], cu_seqlens)
    loss = (output.square().sum() + sum(x.square().sum() for x in last)).requires_grad_()
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [[output, *gradients[: len(tokens)]], [*last, *gradients[len(tokens) :]]]


@pytest.mark.parametrize("op, tolerance", OPS.values(), ids=OPS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("lengths", [[3, 1, 63, 2, 64, 65, 140, 2], [50, 50], [1, 1]], ids=str)
def test_packed_sequences_are_what_they_are_alone(lengths: list[int], rows: int, op: Op, tolerance: float) -> None:
    bounds = list(accumulate(lengths, initial=0))
    tokens, states = [torch.randn(1, bounds[-1], size) for size in (64, 8)], torch.randn(len(lengths), 4, 8, 8)
    alone = [
        with_gradients(op, [x[:, a:b] for x in tokens], [states[n : n + 1]], None)
        for n, (a, b) in enumerate(pairwise(bounds))
    ]
    of_tokens = [torch.cat(parts, 1).flatten(0, 1) for parts in zip(*(part[0] for part in alone), strict=True)]
    of_states = [torch.cat(parts) for parts in zip(*(part[1] for part in alone), strict=True)]
    in_rows = [x.view(rows, -1, x.shape[-1]) for x in tokens]
    packed = with_gradients(op, in_rows, [states], torch.tensor(bounds))
    found = [x.flatten(0, 1) for x in packed[0]], packed[1]
    assert_close(found, (of_tokens, of_states), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", [op for op, _ in OPS.values()], ids=OPS)
def test_tables_made_in_inference_mode_serve_training(op: Op) -> None:
    tokens, states, cu_seqlens = (
        [torch.randn(1, 7, size) for size in (64, 8)],
        torch.randn(2, 4, 8, 8),
        torch.tensor([0, 2, 7]),
    )
    for table in (prefixed_rows, chunk_table, length_buckets):
        table.cache_clear()
    with torch.inference_mode():
        op(tokens, [states], cu_seqlens)
    with_gradients(op, tokens, [states], cu_seqlens)
