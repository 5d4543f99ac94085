"""The convolution is its definition, and torch's own: outputs, final states, every gradient, any width and length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from tenfold.ops.causal_conv import causal_conv1d, naive_causal_conv1d

EXACT = 1e-13  # fp64, a sum of four in another order; measured: up to 1e-15
SINGLE = 2e-6  # the same in fp32, against fp64; measured: up to 3e-7
XWS = tuple[Tensor, Tensor, Tensor]
PACKED = [0, 1, 3, 6, 10, 74, 80]  # lengths 1, 2, 3, 4, 64, 6


def draw(batch: int, length: int, width: int = 4, sequences: int = 0, channels: int = 6) -> XWS:
    """x, weight and initial state in fp64."""
    shapes = (batch, length, channels), (channels, width), (sequences or batch, channels, width - 1)
    x, weight, state = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, weight, state


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 500])
def test_output_and_final_state_are_the_definitions(
    length: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = draw(2, length, width)
    found = causal_conv1d(*(x.to(dtype) for x in inputs))
    assert all(x.dtype == dtype for x in found)
    assert_close(found, naive_causal_conv1d(*inputs), rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("length", [1, 3, 65])
def test_agrees_with_torchs_padded_convolution(length: int) -> None:
    x, weight, _ = draw(2, length)
    y, state = causal_conv1d(x, weight)
    convolved = F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=6)[..., :length]
    assert_close(y, F.silu(convolved).transpose(1, 2), rtol=EXACT, atol=EXACT)
    assert torch.equal(state, F.pad(x.transpose(1, 2), (3, 0))[..., -3:])


def test_packed_sequences_are_the_definitions() -> None:
    inputs, cu_seqlens = draw(2, 40, sequences=len(PACKED) - 1), torch.tensor(PACKED)
    expected = naive_causal_conv1d(*inputs, cu_seqlens)
    assert_close(causal_conv1d(*inputs, cu_seqlens), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("cu_seqlens", [[0, 1], [0, 2], [0, 6], [0, 1, 6]], ids=str)
def test_gradients_of_every_input_are_finite_differences(cu_seqlens: list[int]) -> None:
    inputs = draw(1, cu_seqlens[-1], sequences=len(cu_seqlens) - 1, channels=2)
    assert gradcheck(lambda x, weight, state: causal_conv1d(x, weight, state, torch.tensor(cu_seqlens)), inputs)


def test_gradients_of_packed_sequences_are_the_definitions() -> None:
    inputs, cu_seqlens = draw(2, 40, sequences=len(PACKED) - 1), torch.tensor(PACKED)
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in (inputs[0], inputs[2])]
    found, expected = (
        torch.autograd.grad(form(*inputs, cu_seqlens), inputs, weights) for form in (causal_conv1d, naive_causal_conv1d)
    )
    assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("cuts", [[1], [2, 3, 4], [64, 65]], ids=str)
def test_prefill_and_decode_are_one_pass(cuts: list[int]) -> None:
    x, weight, state = draw(2, 70)
    expected = causal_conv1d(x, weight, state)
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, 70], strict=True):
        y, state = causal_conv1d(x[:, begin:end], weight, state)
        outputs.append(y)
    assert_close((torch.cat(outputs, 1), state), expected, rtol=EXACT, atol=EXACT)


def test_extreme_values_stay_finite() -> None:
    inputs = [(1e4 * x).detach().float().requires_grad_() for x in draw(1, 10)]
    y, state = causal_conv1d(*inputs)
    assert y.isfinite().all() and state.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum() + state.sum(), inputs))


def test_half_precision_stays_half_and_takes_an_fp32_weight_and_state() -> None:
    x, weight, state = (x.detach().float() for x in draw(2, 9))
    y, last = causal_conv1d(x.bfloat16(), weight, state)
    assert y.dtype == last.dtype == torch.bfloat16
    rounded = [t.bfloat16().float() for t in (x, weight, state)]
    assert_close(y.float(), causal_conv1d(*rounded)[0], rtol=2**-7, atol=2**-7)  # bf16 has 8 bits, rounded twice


@pytest.mark.parametrize("shape", [(5, 4), (6,), (6, 1, 4)], ids=str)
def test_a_weight_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight must be \[6, width\], got \[") as error:
        causal_conv1d(torch.zeros(2, 5, 6), torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(3, 6, 3), (2, 6, 2), (2, 3, 6)], ids=str)
def test_a_state_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 6, 3\], got \[") as error:
        causal_conv1d(torch.zeros(2, 5, 6), torch.zeros(6, 4), torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
