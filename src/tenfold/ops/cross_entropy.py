"""Output head and cross-entropy in one, chunk by chunk: the logits of all tokens never exist at once.

Shape letters: T tokens, D hidden, C vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from tenfold.ops.precision import autocast_dtype

IGNORE = -100
CHUNK_BYTES = 16 * 2**20  # of fp32 logits held at a time: they stay in cache through the passes over them


def naive_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition: the sum over tokens of `-log softmax(hidden weight^T)[label]`, labels of -100 left out."""
    return F.cross_entropy((hidden @ weight.T).to(_wide(hidden)), labels, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's probabilities are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: bool) -> Tensor:
        rows = max(1, min(len(hidden), CHUNK_BYTES // (4 * weight.shape[0])))
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if needs_grad else None
        total = hidden.new_zeros((), dtype=_wide(hidden))
        buffer = hidden.new_empty(rows, weight.shape[0])
        for begin in range(0, len(hidden), rows):
            chunk = slice(begin, begin + rows)
            x, kept = hidden[chunk], labels[chunk] != IGNORE
            target = labels[chunk].masked_fill(~kept, 0)[:, None]
            p = torch.mm(x, weight.T, out=buffer[: len(x)]).to(total.dtype)
            chosen, largest = p.gather(1, target), p.amax(-1, keepdim=True)
            mass = p.sub_(largest).exp_().sum(-1, keepdim=True)
            total += ((mass.log() + largest - chosen)[:, 0] * kept).sum()
            if grad_hidden is not None and grad_weight is not None:
                p.mul_(kept[:, None] / mass)
                p.scatter_add_(1, target, -kept[:, None].to(p.dtype))
                p = p.to(weight.dtype)
                torch.mm(p, weight, out=grad_hidden[chunk])
                grad_weight.addmm_(p.T, x) if p.dtype == grad_weight.dtype else grad_weight.add_(p.T @ x)
        ctx.save_for_backward(grad_hidden, grad_weight)  # type: ignore[attr-defined]
        ctx.weight_dtype = weight.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        scaled = (grad_weight * grad).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return grad_hidden * grad.to(grad_hidden.dtype), scaled, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats of `hidden [T, D] @ weight [C, D]^T` against int64 labels `[T]` (-100: none).

    A sum, not a mean: micro-batches and ranks add up, and the caller divides by the labels of the whole batch.
    Returns an fp32 scalar. Raises ValueError where shapes do not fit.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or weight.shape != (len(weight), hidden.shape[1]):
        raise ValueError(
            "linear_cross_entropy: hidden must be [T, D], weight [C, D] and labels [T], "
            f"got {list(hidden.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    dtype = autocast_dtype(hidden)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels, needs_grad)
