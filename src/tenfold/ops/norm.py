"""Normalisation over the last dimension, computed in fp32 whatever the input's dtype.

Shape letters: D the normalised dimension, `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w`, with `w = 1 + weight` where zero-centred."""
    x32 = x if x.dtype == torch.float64 else x.float()
    scale = weight.to(x32.dtype) + (1.0 if zero_centered else 0.0)
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def naive_l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)`."""
    x32 = x if x.dtype == torch.float64 else x.float()
    return (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


class _Normalize(torch.autograd.Function):
    """`y = x * rsqrt(share * sum(x^2) + eps) * scale`.

    Keeps x and one number a row, where autograd would keep four tensors.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor | None, share: float, eps: float) -> Tensor:
        x32 = x if x.dtype == torch.float64 else x.float()
        inverse = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().mul_(share).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)  # type: ignore[attr-defined]
        ctx.share = share  # type: ignore[attr-defined]
        y = x32 * inverse
        return (y if scale is None else y.mul_(scale)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        unit = x.to(inverse.dtype) * inverse
        grad32 = grad.to(inverse.dtype)
        grad_scale = None
        if scale is not None:
            grad_scale = (grad32 * unit).sum_to_size(scale.shape)
            grad32 = grad32 * scale
        along = (grad32 * unit).sum(-1, keepdim=True).mul_(ctx.share)  # type: ignore[attr-defined]
        grad_x = torch.addcmul(grad32, unit, along, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_scale, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """RMSNorm of x `[..., D]` with weight `[D]`; zero-centred multiplies by `1 + weight`. Keeps x's dtype."""
    _check_last_dim("rms_norm", x, weight)
    scale = weight if x.dtype == torch.float64 else weight.float()
    return _Normalize.apply(x, scale + 1.0 if zero_centered else scale, 1.0 / x.shape[-1], eps)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) * silu(gate)`, norm before gate: the output norm of Gated DeltaNet. x and gate `[..., D]`."""
    _check_last_dim("gated_rms_norm", x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate must be {list(x.shape)} like x, got {list(gate.shape)}")
    return rms_norm(x, weight, eps) * F.silu(gate)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x `[..., D]` scaled to unit length, `x * rsqrt(sum(x^2) + eps)`. Keeps x's dtype."""
    return _Normalize.apply(x, None, 1.0, eps)


def _check_last_dim(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight must have shape [{x.shape[-1]}] like the last dim of x, got {list(weight.shape)}"
        )
