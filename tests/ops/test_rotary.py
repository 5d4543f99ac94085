"""Rotation is multiplication by complex numbers: it keeps lengths, and products depend on distances only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from tenfold.ops.rotary import naive_rotary, rotary, rotary_table

modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

EXACT = 1e-14  # fp64, sums of two products; measured: up to 2e-16
SINGLE = 1e-6  # the same in fp32; measured: up to 1e-7


def frequencies(pairs: int) -> Tensor:
    return 100.0 ** -(torch.arange(pairs) / pairs)


def table(length: int, pairs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_table(torch.arange(length), frequencies(pairs))
    return cos.to(dtype), sin.to(dtype)


@pytest.mark.parametrize("pairs", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 2, 8), (2, 5, 3, 8)], ids=str)
def test_output_is_the_definitions_and_the_rest_of_the_head_is_untouched(shape: tuple[int, ...], pairs: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    cos, sin = table(shape[-3], pairs)
    found = rotary(x, cos, sin)
    assert_close(found, naive_rotary(x, cos, sin), rtol=EXACT, atol=EXACT)
    assert torch.equal(found[..., 2 * pairs :], x[..., 2 * pairs :])


def test_agrees_with_transformers() -> None:
    q, k = torch.randn(2, 2, 5, 3, 8)
    cos, sin = table(5, 2, torch.float32)
    doubled = (torch.cat((x, x), -1)[None] for x in (cos, sin))
    expected = modeling.apply_rotary_pos_emb(q, k, *doubled, unsqueeze_dim=2)
    assert_close((rotary(q, cos, sin), rotary(k, cos, sin)), expected, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize("pairs", [1, 3])
def test_gradients_are_finite_differences(pairs: int) -> None:
    cos, sin = table(3, pairs)
    assert gradcheck(lambda x: rotary(x, cos, sin), torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True))


def test_lengths_are_kept_and_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = table(50, 4)
    turned_q, turned_k = (rotary(x.expand(50, 1, 8), cos, sin)[:, 0] for x in (q, k))
    assert_close(turned_q.norm(dim=-1), q.norm().expand(50), rtol=SINGLE, atol=SINGLE)  # the table is fp32
    products = turned_q @ turned_k.T
    for distance in range(-49, 50):
        along = products.diagonal(distance)
        assert_close(along, along[:1].expand_as(along), rtol=10 * SINGLE, atol=10 * SINGLE)  # angles up to 50


@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_table_holds_cosines_and_sines_of_the_angles(scaling: float) -> None:
    at = torch.tensor([[0, 1, 7], [1000, 3, 2]])
    cos, sin = rotary_table(at, frequencies(4), scaling)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (2, 3, 4)
    angles = at.double()[..., None] * frequencies(4).double()
    rounding = 1000 * 2.0**-24 * scaling  # of the largest angle in fp32
    expected = (angles.cos() * scaling, angles.sin() * scaling)
    assert_close((cos, sin), expected, rtol=0.0, atol=2 * rounding, check_dtype=False)


def test_every_row_of_a_batch_may_have_its_own_positions() -> None:
    x, at = torch.randn(2, 3, 2, 8), torch.tensor([[0, 1, 2], [9, 0, 1]])
    together = rotary(x, *rotary_table(at, frequencies(2)))
    for row in range(2):
        assert torch.equal(together[row], rotary(x[row], *rotary_table(at[row], frequencies(2))))


def test_half_precision_stays_half() -> None:
    assert rotary(torch.randn(3, 2, 8).bfloat16(), *table(3, 2, torch.float32)).dtype == torch.bfloat16


def test_a_head_narrower_than_the_rotated_part_is_refused() -> None:
    with pytest.raises(ValueError, match="rotary: 10 dims to rotate, but heads of 8"):
        rotary(torch.zeros(3, 2, 8), *table(3, 5))
