"""The feed-forward non-linearity.

Shape letters: F expert or feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gate * sigmoid(gate) * up`."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only its inputs; autograd would keep `silu(gate)` as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)  # type: ignore[attr-defined]
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise; both `[..., F]`."""
    return _SwiGLU.apply(gate, up)
