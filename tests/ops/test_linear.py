"""SwiGLU is its definition, in values and gradients, and keeps only its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from tenfold.ops.linear import naive_swiglu, swiglu

EXACT = 1e-14  # fp64, elementwise; measured: up to 2e-16
SINGLE = 1e-6  # fp32, elementwise; measured: up to 1e-7


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 64)], ids=str)
def test_output_is_the_definitions(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    gate, up = torch.randn(2, *shape, dtype=torch.float64)
    found = swiglu(gate.to(dtype), up.to(dtype))
    assert found.dtype == dtype
    assert_close(found, naive_swiglu(gate, up), rtol=tolerance, atol=tolerance, check_dtype=False)


def test_gradients_of_every_input_are_finite_differences() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(swiglu, (gate, up))


def test_halves_of_one_tensor_may_be_given() -> None:
    both = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: swiglu(*x.chunk(2, -1)), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates_stay_finite(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], dtype=dtype, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    y = swiglu(gate, up)
    assert_close(y, gate.clamp(min=0), rtol=0.0, atol=0.0)
    grad_gate, grad_up = torch.autograd.grad(y.sum(), (gate, up))
    assert_close(grad_gate.float(), torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1]), rtol=0.0, atol=0.0)
    assert_close(grad_up, y, rtol=0.0, atol=0.0)


def test_keeps_only_its_inputs_for_backward() -> None:
    kept: list[Tensor] = []
    gate, up = torch.randn(2, 3, 4).requires_grad_().unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
