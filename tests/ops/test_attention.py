"""Attention is its definition: dense, packed, against a cache, with grouped heads, and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from tenfold.ops.attention import attention, naive_attention

EXACT = 1e-12  # fp64 sums in another order; measured: up to 2e-15
SINGLE = 2e-6  # the same in fp32, against fp64; measured: up to 4e-7
QKV = tuple[Tensor, Tensor, Tensor]
PACKED = [0, 1, 3, 66, 130, 195, 200]  # lengths 1, 2, 63, 64, 65, 5


def draw(batch: int, queries: int, keys: int, heads: int = 4, groups: int = 2, dim: int = 8) -> QKV:
    """q, k and v in fp64."""
    shapes = (queries, heads), (keys, groups), (keys, groups)
    q, k, v = (torch.randn(batch, *shape, dim, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries, keys", [(1, 1), (2, 2), (63, 63), (65, 65), (500, 500), (1, 65), (3, 65)])
def test_output_is_the_definitions(queries: int, keys: int, groups: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = draw(2, queries, keys, groups=groups)
    found = attention(*(x.to(dtype) for x in inputs))
    assert found.dtype == dtype
    assert_close(found, naive_attention(*inputs), rtol=tolerance, atol=tolerance, check_dtype=False)


def test_definition_is_softmax_query_by_query() -> None:
    q, k, v = draw(1, 3, 5, heads=2, groups=1)
    found = naive_attention(q, k, v)
    for t in range(3):
        for head in range(2):
            seen = t + 3
            scores = (k[0, :seen, 0] @ q[0, t, head] / 8**0.5).softmax(0)
            assert_close(found[0, t, head], scores @ v[0, :seen, 0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences_are_the_definitions(batch: int) -> None:
    inputs, cu_seqlens = draw(batch, 200 // batch, 200 // batch), torch.tensor(PACKED)
    found = attention(*inputs, cu_seqlens)
    assert_close(found, naive_attention(*inputs, cu_seqlens), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("queries, keys, cu_seqlens", [(1, 1, None), (4, 4, None), (2, 4, None), (5, 5, [0, 1, 3, 5])])
def test_gradients_of_every_input_are_finite_differences(queries: int, keys: int, cu_seqlens: list[int] | None) -> None:
    inputs = draw(1, queries, keys, heads=2, groups=1, dim=3)
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    assert gradcheck(lambda q, k, v: attention(q, k, v, packed), inputs)


@pytest.mark.parametrize("queries, keys, packed", [(130, 130, False), (3, 130, False), (200, 200, True)])
def test_gradients_of_every_input_are_the_definitions(queries: int, keys: int, packed: bool) -> None:
    inputs, cu_seqlens = draw(1, queries, keys), torch.tensor(PACKED) if packed else None
    weight = torch.randn(inputs[0].shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((form(*inputs, cu_seqlens) * weight).sum(), inputs) for form in (attention, naive_attention)
    )
    assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [64, 65], [3, 64, 69]], ids=str)
def test_prefill_and_decode_are_one_pass(cuts: list[int]) -> None:
    q, k, v = draw(2, 70, 70)
    parts = [
        attention(q[:, begin:end], k[:, :end], v[:, :end]) for begin, end in zip([0, *cuts], [*cuts, 70], strict=True)
    ]
    assert_close(torch.cat(parts, 1), attention(q, k, v), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("size", [0.0, 1e4], ids=["all alike", "large"])
def test_extreme_scores_stay_finite_and_right(size: float) -> None:
    q, k, v = (x.detach() for x in draw(1, 66, 66))
    expected = naive_attention(q * size, k * size, v)
    single = [x.float().requires_grad_() for x in (q * size, k * size, v)]
    found = attention(*single)
    assert_close(found, expected, rtol=0.0, atol=SINGLE, check_dtype=False)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), single))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 9]], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype_packed_or_not(dtype: torch.dtype, cu_seqlens: list[int] | None) -> None:
    q, k, v = (x.to(dtype) for x in draw(1, 9, 9))
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    assert attention(q, k, v, packed).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v, packed).dtype == torch.bfloat16


WRONG = {
    "3 heads over 2": ([(2, 5, 3, 8), (2, 5, 2, 8), (2, 5, 2, 8)], r"q \[2, 5, 3, 8\], k \[2, 5, 2, 8\]"),
    "fewer keys than queries": ([(2, 5, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)], r"S >= T.* k \[2, 4, 2, 8\]"),
    "other values": ([(2, 5, 2, 8), (2, 5, 2, 8), (2, 6, 2, 8)], r"v \[2, 6, 2, 8\]"),
    "other head dim": ([(2, 5, 2, 8), (2, 5, 2, 4), (2, 5, 2, 4)], r"k \[2, 5, 2, 4\]"),
    "other batch": ([(2, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], r"k \[1, 5, 2, 8\]"),
}


@pytest.mark.parametrize("shapes, message", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_are_named(shapes: list[tuple[int, ...]], message: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v)


def test_packed_sequences_have_no_cache() -> None:
    with pytest.raises(ValueError, match="as many keys as queries, got 2 queries and 5 keys"):
        attention(*draw(1, 2, 5), torch.tensor([0, 2]))
