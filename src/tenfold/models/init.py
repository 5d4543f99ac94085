"""How each tensor of a new model begins, by its name: one rule for a model in memory and for one streamed to disk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DT_RANGE = (
    1e-3,
    1e-1,
)  # time steps at which a head may begin: median decay 0.94, where dt_bias = 1 would give 3e-5
A_RANGE = (1.0, 16.0)  # away from zero: A = 0 means A_log = -inf, a head dead for ever


def init_tensor(
    name: str, shape: Sequence[int], generator: torch.Generator, std: float = 0.02, zero_centered: bool = True
) -> Tensor:
    """A fresh fp32 tensor for the parameter `name` (Hugging Face's name).

    Norms start at their identity, router rows at one common length so that no expert is favoured, `A_log` and `dt_bias`
    spread over the time scales, the conv as a small uniform filter, all else normal with standard deviation `std`.
    """
    if name.endswith("A_log"):
        return torch.empty(*shape).uniform_(*A_RANGE, generator=generator).log_()
    if name.endswith("dt_bias"):
        dt = torch.empty(*shape).uniform_(*map(math.log, DT_RANGE), generator=generator).exp_()
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if name.endswith("conv1d.weight"):
        bound = shape[-1] ** -0.5
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    if is_norm(name):
        return (
            torch.zeros(*shape)
            if zero_centered and not name.endswith("linear_attn.norm.weight")
            else torch.ones(*shape)
        )
    weight = torch.empty(*shape).normal_(0.0, std, generator=generator)
    if is_router(name):
        weight *= std * shape[-1] ** 0.5 / weight.norm(dim=-1, keepdim=True)
    return weight


def is_norm(name: str) -> bool:
    """Whether the parameter is the weight of a normalisation."""
    owner = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return "norm" in owner


def is_router(name: str) -> bool:
    """Whether the parameter is a router, whose rows are one expert each."""
    return name.endswith("mlp.gate.weight")
