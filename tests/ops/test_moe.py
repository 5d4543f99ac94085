"""Sparse experts are their definition, whoever is idle; and the router chooses what the definition chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from tenfold.ops.linear import naive_swiglu
from tenfold.ops.moe import naive_experts, route, sparse_experts

EXACT = 1e-12  # fp64 sums in another order; measured: up to 6e-15
SINGLE = 5e-6  # the same in fp32, against fp64; measured: up to 8e-7

CHOICES: dict[str, list[list[int]]] = {
    "idle experts": [[4, 0], [0, 4], [4, 2], [2, 0], [0, 2]],
    "all experts": [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]],
    "one token": [[3, 1]],
    "all tokens to one expert": [[2]] * 6,
    "every expert for each token": [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]],
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def draw(choice: list[list[int]], hidden: int = 6, width: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weights, experts, gate_up and down in fp64, for five experts."""
    experts = torch.tensor(choice)
    shapes = (len(choice), hidden), experts.shape, (5, 2 * width, hidden), (5, hidden, width)
    x, weights, gate_up, down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, weights, experts, gate_up, down


@every_choice
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
def test_output_is_the_definitions(choice: list[list[int]], dtype: torch.dtype, tolerance: float) -> None:
    x, weights, experts, gate_up, down = draw(choice)
    found = sparse_experts(x.to(dtype), weights.to(dtype), experts, gate_up.to(dtype), down.to(dtype))
    assert found.dtype == dtype
    expected = naive_experts(x, weights, experts, gate_up, down)
    assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_is_all_experts_at_once_with_weight_zero_for_the_others() -> None:
    choice = [torch.randperm(5)[:3].tolist() for _ in range(70)]
    x, weights, experts, gate_up, down = draw(choice)
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, -1)
    dense = torch.zeros(70, 5, dtype=torch.float64).scatter(1, experts, weights)
    expected = torch.einsum("te,tef,edf->td", dense, naive_swiglu(gate, up), down)
    assert_close(sparse_experts(x, weights, experts, gate_up, down), expected, rtol=EXACT, atol=EXACT)


@every_choice
def test_gradients_of_every_input_are_finite_differences(choice: list[list[int]]) -> None:
    x, weights, experts, gate_up, down = draw(choice, hidden=3, width=2)
    assert gradcheck(lambda x, w, a, b: sparse_experts(x, w, experts, a, b), (x, weights, gate_up, down))


def test_gradients_of_every_input_are_the_definitions() -> None:
    choice = [torch.randperm(5)[:2].tolist() for _ in range(65)]
    x, weights, experts, gate_up, down = draw(choice)
    inputs, direction = (x, weights, gate_up, down), torch.randn_like(x)
    found, expected = (
        torch.autograd.grad((form(x, weights, experts, gate_up, down) * direction).sum(), inputs)
        for form in (sparse_experts, naive_experts)
    )
    assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_idle_experts_get_a_gradient_of_zero() -> None:
    x, weights, experts, gate_up, down = draw(CHOICES["idle experts"])
    sparse_experts(x, weights, experts, gate_up, down).sum().backward()
    for matrix in (gate_up, down):
        assert matrix.grad is not None
        assert [bool(g.any()) for g in matrix.grad] == [True, False, True, False, True]


def test_no_tokens_are_no_rows() -> None:
    x, weights, experts, gate_up, down = draw([[0, 1]])
    assert sparse_experts(x[:0], weights[:0], experts[:0], gate_up, down).shape == (0, 6)


def test_autocast_multiplies_in_half_precision_and_returns_the_inputs_dtype() -> None:
    x, weights, experts, gate_up, down = (t.detach() for t in draw(CHOICES["all experts"]))
    single = x.float(), weights.float(), experts, gate_up.float(), down.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sparse_experts(*single)
    half = (t if t is experts else t.bfloat16() for t in single)
    assert found.dtype == torch.float32 and torch.equal(found, sparse_experts(*half).float())


WRONG: dict[str, tuple[int, tuple[int, ...], str]] = {
    "x": (0, (5, 7), r"with D 7, got \[5, 8, 6\] and \[5, 6, 4\]"),
    "x of three dims": (0, (1, 5, 6), r"x must be \[T, D\].* got \[1, 5, 6\]"),
    "weights": (1, (5, 3), r"weights and experts \[T, k\], got \[5, 6\], \[5, 3\] and \[5, 2\]"),
    "tokens": (0, (4, 6), r"weights and experts \[T, k\], got \[4, 6\], \[5, 2\] and \[5, 2\]"),
    "gate_up": (3, (5, 6, 6), r"gate_up must be \[E, 2F, D\].* got \[5, 6, 6\] and \[5, 6, 4\]"),
    "down": (4, (5, 7, 4), r"got \[5, 8, 6\] and \[5, 7, 4\]"),
    "number of experts": (4, (6, 6, 4), r"got \[5, 8, 6\] and \[6, 6, 4\]"),
}


@pytest.mark.parametrize("place, shape, message", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_are_named(place: int, shape: tuple[int, ...], message: str) -> None:
    x, weights, experts, gate_up, down = (
        torch.zeros(shape, dtype=torch.float64) if i == place else t for i, t in enumerate(draw(CHOICES["all experts"]))
    )
    with pytest.raises(ValueError, match=message):
        sparse_experts(x, weights, experts, gate_up, down)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_router_takes_the_k_most_probable_experts(k: int, normalize: bool) -> None:
    logits = torch.randn(20, 5)
    weights, experts, load = route(logits, k, normalize)
    probabilities = logits.double().softmax(-1)
    assert experts.tolist() == probabilities.argsort(-1, descending=True)[:, :k].tolist()
    expected = probabilities.gather(1, experts)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    assert_close(weights, expected, rtol=SINGLE, atol=SINGLE, check_dtype=False)
    assert load.counts.tolist() == [int((experts == e).sum()) for e in range(5)]
    assert_close(load.probabilities, probabilities.sum(0), rtol=SINGLE, atol=SINGLE, check_dtype=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_weights_and_load_are_finite_differences(normalize: bool) -> None:
    def outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, load = route(logits, 2, normalize)
        return weights, load.probabilities

    assert gradcheck(outputs, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))


def test_loads_of_parts_add_up_to_the_load_of_all() -> None:
    logits = torch.randn(20, 5, dtype=torch.float64)
    loads = [route(part, 2, True)[2] for part in (logits[:7], logits[7:], logits)]
    assert_close(loads[0].probabilities + loads[1].probabilities, loads[2].probabilities, rtol=EXACT, atol=EXACT)
    assert torch.equal(loads[0].counts + loads[1].counts, loads[2].counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_decides_in_fp32_and_bears_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    weights, experts, load = route(logits, 2, True)
    assert weights.dtype == load.probabilities.dtype == torch.float32
    assert experts.dtype == load.counts.dtype == torch.int64
    assert weights[0].tolist() == [1.0, 0.0] and weights[1].tolist() == [0.5, 0.5] and experts[0, 0] == 0
    (gradient,) = torch.autograd.grad(weights[:, 0].sum() + load.probabilities[0], logits)
    assert gradient.isfinite().all()
