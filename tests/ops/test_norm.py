"""The norms are their definitions, torch's and transformers', in values and gradients, for rows of any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from tenfold.ops.norm import gated_rms_norm, l2_norm, naive_l2_norm, naive_rms_norm, rms_norm

modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

EPS = 1e-6
EXACT = 1e-13  # fp64, a sum of a dozen in another order; measured: up to 2e-16
SINGLE = 1e-6  # the same in fp32, against fp64; measured: up to 2e-7
SHAPES = [(8,), (1, 8), (0, 8), (2, 3, 2, 8)]
Form = Callable[[Tensor, Tensor], Tensor]

FORMS: dict[str, tuple[Form, Form]] = {
    "rms": (lambda x, w: rms_norm(x, w, EPS), lambda x, w: naive_rms_norm(x, w, EPS)),
    "zero-centred rms": (lambda x, w: rms_norm(x, w, EPS, True), lambda x, w: naive_rms_norm(x, w, EPS, True)),
    "gated rms": (
        lambda x, w: gated_rms_norm(x, x.cos(), w, EPS),
        lambda x, w: naive_rms_norm(x, w, EPS) * F.silu(x.cos()),
    ),
    "l2": (lambda x, w: l2_norm(x * w), lambda x, w: naive_l2_norm(x * w)),
}
every_norm = pytest.mark.parametrize("norm, naive", FORMS.values(), ids=FORMS)


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    """x and weight in fp64."""
    x, weight = (torch.randn(size, dtype=torch.float64) for size in (shape, shape[-1:]))
    return x.requires_grad_(), weight.requires_grad_()


@every_norm
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_the_definitions(
    norm: Form, naive: Form, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    x, weight = draw(*shape)
    found = norm(x.to(dtype), weight.to(dtype))
    assert found.dtype == dtype
    assert_close(found, naive(x, weight), rtol=tolerance, atol=tolerance, check_dtype=False)


def test_agrees_with_torch() -> None:
    x, weight = draw(4, 12)
    assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (12,), weight, EPS), rtol=EXACT, atol=EXACT)
    assert_close(l2_norm(x, 0.0), F.normalize(x, dim=-1), rtol=EXACT, atol=EXACT)


def test_agrees_with_transformers() -> None:
    x, weight, gate = (torch.randn(size) for size in ((4, 12), (12,), (4, 12)))
    plain, gated = modeling.Qwen3NextRMSNorm(12), modeling.Qwen3NextRMSNormGated(12)
    with torch.no_grad():
        plain.weight.copy_(weight)
        gated.weight.copy_(weight)
        assert_close(rms_norm(x, weight, EPS, zero_centered=True), plain(x), rtol=SINGLE, atol=SINGLE)
        assert_close(gated_rms_norm(x, gate, weight, EPS), gated(x, gate), rtol=SINGLE, atol=SINGLE)
        assert_close(l2_norm(x), modeling.l2norm(x), rtol=SINGLE, atol=SINGLE)


@every_norm
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 2, 5)], ids=str)
def test_gradients_of_every_input_are_finite_differences(norm: Form, naive: Form, shape: tuple[int, ...]) -> None:
    assert gradcheck(norm, draw(*shape))


def test_gradient_of_the_gate_is_finite_differences() -> None:
    (x, weight), (gate, _) = draw(2, 2, 5), draw(2, 2, 5)
    assert gradcheck(lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), (x, gate, weight))


@every_norm
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e4, 1e15], ids=str)
def test_rows_of_any_size_stay_finite_and_right_in_fp32(norm: Form, naive: Form, size: float) -> None:
    drawn = draw(3, 8)
    x, weight = (size * drawn[0]).detach().float().requires_grad_(), drawn[1].detach().float().requires_grad_()
    found, expected = norm(x, weight), naive(x.double(), weight.double())
    assert_close(found, expected, rtol=SINGLE, atol=SINGLE, check_dtype=False)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (x, weight)))


def test_half_precision_is_computed_in_fp32_and_rounded_once() -> None:
    x, weight = (t.detach().bfloat16() for t in draw(50, 300))
    for zero_centered in (False, True):
        expected = rms_norm(x.float(), weight.float(), EPS, zero_centered)
        assert torch.equal(rms_norm(x, weight, EPS, zero_centered), expected.bfloat16())
    assert torch.equal(l2_norm(x), l2_norm(x.float()).bfloat16())


def test_gated_half_precision_rounds_norm_gate_and_product() -> None:
    x, gate, weight = (t.detach().bfloat16() for t in (*draw(2, 50, 300)[0], draw(300)[1]))
    found, expected = gated_rms_norm(x, gate, weight, EPS), gated_rms_norm(x.float(), gate.float(), weight.float(), EPS)
    assert found.dtype == torch.bfloat16
    assert_close(
        found.float(), expected, rtol=3.1 * 2**-8, atol=0.0
    )  # three roundings to 8 bits, a little more compound


def test_an_fp32_weight_leaves_half_precision_half_and_gets_an_fp32_gradient() -> None:
    x, weight = draw(4, 8)
    x, weight = x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    y = rms_norm(x, weight, EPS)
    grad_x, grad_weight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert y.dtype == grad_x.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32


def test_keeps_the_input_and_one_number_a_row_for_backward() -> None:
    kept: list[Tensor] = []
    x = torch.randn(4, 3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        l2_norm(x)
    assert [tuple(t.shape) for t in kept] == [(4, 3, 8), (4, 3, 1)] and kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", ["rms_norm", "gated_rms_norm"])
def test_a_weight_that_does_not_fit_is_named(name: str) -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(7)
    with pytest.raises(ValueError, match=rf"{name}: weight must have shape \[8\].* got \[7\]"):
        rms_norm(x, weight, EPS) if name == "rms_norm" else gated_rms_norm(x, x, weight, EPS)


def test_a_gate_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"gated_rms_norm: gate must be \[2, 8\] like x, got \[1, 8\]"):
        gated_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8), EPS)
