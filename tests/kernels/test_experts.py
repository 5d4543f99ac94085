"""The expert layer: right against float64, and the same bits whatever the company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.kernels import cpu

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

EXPERTS, HIDDEN, WIDTH, CHOICES = 17, 96, 64, 4
# Relative error (Frobenius): x, and the activations between, are rounded as in test_linear.py.
ROUNDING = {"int8": 0.02, "int4": 0.02, "bf16": 0.005}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choice(tokens: int, hit: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Experts of each token, among the first `hit`, each once if there are enough; and their weights."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(tokens, max(hit, CHOICES), generator=generator).argsort(-1)[:, :CHOICES] % hit
    return chosen, torch.rand(tokens, CHOICES, generator=generator)


def weights() -> tuple[Tensor, Tensor]:
    return normal(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5, normal(EXPERTS, HIDDEN, WIDTH, seed=1) / WIDTH**0.5


def expected_output(x: Tensor, experts: cpu.PackedExperts, chosen: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for token, numbers, factors in zip(x.double(), chosen.tolist(), weights.double(), strict=True):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for number, factor in zip(numbers, factors, strict=True):
            gate, up, down = (w.double() for w in cpu.unpack_expert(experts, number))
            row += factor * (down @ (F.silu(gate @ token) * (up @ token)))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("format", cpu.FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 31, 65])
@pytest.mark.parametrize("hit", [1, 3, EXPERTS])
def test_layer_is_near_float64(isa: str, format: str, tokens: int, hit: int) -> None:
    experts = cpu.pack_experts(*weights(), format)
    x = normal(tokens, HIDDEN, seed=3)
    chosen, factors = choice(tokens, hit)
    y = cpu.expert_layer(x, experts, chosen, factors)
    expected = expected_output(x, experts, chosen, factors)
    assert (y - expected).norm() / expected.norm() < ROUNDING[format]


@pytest.mark.parametrize("format", cpu.FORMATS)
def test_rows_have_the_same_bits_in_any_company(isa: str, format: str) -> None:
    experts = cpu.pack_experts(*weights(), format)
    x = normal(200, HIDDEN, seed=3)
    chosen, factors = choice(200)
    cpu.set_threads(1)
    rows = zip(x.split(1), chosen.split(1), factors.split(1), strict=True)
    alone = torch.cat([cpu.expert_layer(row, experts, c, f) for row, c, f in rows])
    for threads in (1, 2, 3):
        cpu.set_threads(threads)
        for tokens in (1, 2, 14, 33, 200):
            y = cpu.expert_layer(x[:tokens], experts, chosen[:tokens], factors[:tokens])
            assert torch.equal(y, alone[:tokens])


def test_the_order_of_the_choice_does_not_matter(isa: str) -> None:
    experts = cpu.pack_experts(*weights(), "int4")
    x = normal(9, HIDDEN, seed=3)
    chosen, factors = choice(9)
    assert torch.equal(
        cpu.expert_layer(x, experts, chosen, factors),
        cpu.expert_layer(x, experts, chosen.flip(1).contiguous(), factors.flip(1).contiguous()),
    )


def test_output_in_bf16_is_the_rounded_output(isa: str) -> None:
    experts = cpu.pack_experts(*weights(), "int8")
    x = normal(9, HIDDEN, seed=3)
    chosen, factors = choice(9)
    y = cpu.expert_layer(x, experts, chosen, factors)
    assert torch.equal(cpu.expert_layer(x, experts, chosen, factors, torch.bfloat16), y.to(torch.bfloat16))


def test_nothing_to_do(isa: str) -> None:
    experts = cpu.pack_experts(*weights(), "int8")
    assert cpu.expert_layer(normal(0, HIDDEN), experts, *choice(0)).shape == (0, HIDDEN)
    none = cpu.expert_layer(normal(2, HIDDEN), experts, torch.empty(2, 0), torch.empty(2, 0))
    assert torch.equal(none, torch.zeros(2, HIDDEN))


def test_bad_arguments_are_refused() -> None:
    experts = cpu.pack_experts(*weights(), "int4")
    x = normal(2, HIDDEN)
    chosen, factors = choice(2)
    with pytest.raises(ValueError, match="there are 17 experts, got number 17"):
        cpu.expert_layer(x, experts, torch.full_like(chosen, EXPERTS), factors)
    with pytest.raises(ValueError, match="got number -1"):
        cpu.expert_layer(x, experts, torch.full_like(chosen, -1), factors)
    with pytest.raises(ValueError, match="hidden size"):
        cpu.expert_layer(normal(2, 64), experts, chosen, factors)
    with pytest.raises(ValueError, match=r"weights must be contiguous float32 \[2, 4\]"):
        cpu.expert_layer(x, experts, chosen, factors[:1])
