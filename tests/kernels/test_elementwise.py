"""Norms, the router and SwiGLU against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu
from tenfold.ops.norm import naive_rms_norm

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

EPS = 1e-6
TOLERANCE = 2e-6  # some fp32 roundings and an exponential of 2 ulp, relative to values near 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_centered", [True, False])
def test_rms_norm(isa: str, dim: int, dtype: torch.dtype, zero_centered: bool) -> None:
    x, weight = normal(33, dim), normal(dim, seed=1).to(dtype)
    y = cpu.rms_norm(x, cpu.norm_weight(weight, EPS, zero_centered))
    torch.testing.assert_close(
        y.double(),
        naive_rms_norm(x.double(), weight.double(), EPS, zero_centered),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )


def test_rms_norm_adds_to_the_residual_stream(isa: str) -> None:
    x, delta, weight = normal(5, 64), normal(5, 64, seed=1), cpu.norm_weight(normal(64, seed=2), EPS, True)
    stream = x.clone()
    y = cpu.rms_norm(stream, weight, delta)
    assert torch.equal(stream, x + delta)
    assert torch.equal(y, cpu.rms_norm(x + delta, weight))
    assert torch.equal(y[3:4], cpu.rms_norm((x + delta)[3:4], weight))


@pytest.mark.parametrize("experts", [1, 5, 17, 64, 512])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens", [1, 33])
def test_route(isa: str, experts: int, normalize: bool, tokens: int) -> None:
    k, logits = min(experts, 10), normal(tokens, experts) * 3
    weights, chosen = cpu.route(logits, k, normalize)
    right, order = logits.double().softmax(-1).topk(k)
    if normalize:
        right = right / right.sum(-1, keepdim=True)
    assert torch.equal(chosen.long(), order)
    torch.testing.assert_close(weights.double(), right, rtol=TOLERANCE, atol=0)


def test_of_equal_logits_the_lower_number_wins(isa: str) -> None:
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 1, 2]])
    assert cpu.route(logits, 5, True)[1].tolist() == [[1, 3, 6, 2, 4]]
    assert cpu.route(torch.zeros(1, 40), 3, True)[1].tolist() == [[0, 1, 2]]


def test_the_shared_expert_has_a_place_of_its_own(isa: str) -> None:
    logits, gate = normal(4, 17), normal(4, 1, seed=1)
    weights, chosen = cpu.route(logits, 3, True, gate)
    alone = cpu.route(logits, 3, True)
    assert torch.equal(weights[:, :3], alone[0]) and torch.equal(chosen[:, :3], alone[1])
    assert (chosen[:, 3] == 17).all()
    torch.testing.assert_close(weights[:, 3:], gate.sigmoid(), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_logits_still_choose_experts_that_exist(isa: str, value: float) -> None:
    for columns in ([0], [3], [16], list(range(17))):
        logits = normal(1, 17)
        logits[0, columns] = value
        weights, chosen = cpu.route(logits, 5, True)
        assert len(set(chosen[0].tolist())) == 5 and chosen.min() >= 0 and chosen.max() < 17
        if value != -float("inf") or len(columns) == 17:
            assert weights.isnan().any()


@pytest.mark.parametrize("width", [16, 48, 512])
def test_swiglu(isa: str, width: int) -> None:
    gate, up = normal(19, width) * 4, normal(19, width, seed=1)
    right = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(cpu.swiglu(gate, up).double(), right, rtol=TOLERANCE, atol=TOLERANCE)


def test_bad_arguments_are_refused() -> None:
    x, weight = normal(3, 32), cpu.norm_weight(normal(32), EPS, False)
    refusals = [
        ("x must be float32", lambda: cpu.rms_norm(normal(3, 48), weight)),
        ("x must be float32", lambda: cpu.rms_norm(x.bfloat16(), weight)),
        ("delta must be float32", lambda: cpu.rms_norm(x, weight, x[:2])),
        ("x must be a matrix", lambda: cpu.rms_norm(x[0], weight)),
        ("no gradients", lambda: cpu.rms_norm(x.clone().requires_grad_(), weight)),
        ("multiple of 16, got 20", lambda: cpu.norm_weight(normal(20), EPS, False)),
        (
            "weight must be contiguous float32 or bfloat16",
            lambda: cpu.norm_weight(normal(32).double(), EPS, False),
        ),
        ("of 32 experts 33 cannot be chosen", lambda: cpu.route(x, 33, True)),
        ("of 32 experts 0 cannot be chosen", lambda: cpu.route(x, 0, True)),
        ("shared_gate must be float32", lambda: cpu.route(x, 2, True, normal(3, 2))),
        ("up must be float32", lambda: cpu.swiglu(x, x[:2])),
        ("multiple of 16", lambda: cpu.swiglu(x[:, :20], x[:, :20])),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError, match=message):
            call()
