"""Sparse experts: a router picks k of E small feed-forward networks for each token.

Shape letters: T tokens, D hidden, E experts, F expert width, k experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from tenfold.ops.linear import naive_swiglu
from tenfold.ops.precision import autocast_dtype


class RouterLoad(NamedTuple):
    """What the balance loss of one layer needs, summed over tokens so that micro-batches and ranks add up.

    probabilities: fp32 `[E]`, carries gradients; counts: int64 `[E]`, tokens that chose each expert.
    """

    probabilities: Tensor
    counts: Tensor


def naive_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, token by token: `sum_j w_j down_j swiglu(gate_j x, up_j x)`. Shapes as in `sparse_experts`."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], experts[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            row = row + weight * (down[e] @ naive_swiglu(gate, up))
        rows.append(row)
    return torch.stack(rows)


def route(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor, RouterLoad]:
    """Choice of experts from router logits `[T, E]`: softmax over all in fp32, the k largest, renormalised if asked.

    Returns weights fp32 `[T, k]`, experts int64 `[T, k]` in order of falling weight, and the layer's load.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32 if logits.dtype != torch.float64 else torch.float64)
    weights, experts = probabilities.topk(k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = experts.flatten().bincount(minlength=logits.shape[-1])
    return weights, experts, RouterLoad(probabilities.sum(0), counts)


def sparse_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token's experts, weighted and summed.

    x `[T, D]`, weights `[T, k]`, experts int64 `[T, k]`, gate_up `[E, 2F, D]` (gate rows first), down `[E, D, F]`;
    returns `[T, D]` in x's dtype. Products run in autocast's dtype where that is on. Raises ValueError on shapes.
    """
    _check_shapes(x, weights, experts, gate_up, down)
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = _GroupedExperts.apply(x.to(dtype), weights.to(dtype), experts, gate_up.to(dtype), down.to(dtype))
    return y.to(x.dtype)


class _GroupedExperts(torch.autograd.Function):
    """Tokens sorted by expert, then one product per expert over its own rows.

    The routing weight multiplies the narrow activation (F wide) instead of the output (D wide), so that the gradient of
    the weights falls out of the same tensor and no output has to be kept: only sorted tokens, choice and gate/up are.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(down)).tolist()
        x = x.index_select(0, order // experts.shape[1])
        h = _grouped(x, gate_up.mT, counts)
        gate, up = h.chunk(2, -1)
        activation = F.silu(gate).mul_(up).mul_(weights.flatten().index_select(0, order)[:, None])
        y = _grouped(activation, down.mT, counts)
        ctx.save_for_backward(x, weights, order, h, gate_up, down)  # type: ignore[attr-defined]
        ctx.counts = counts  # type: ignore[attr-defined]
        return _sum_by_token(y, order, experts.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, order, h, gate_up, down = ctx.saved_tensors  # type: ignore[attr-defined]
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        k = weights.shape[1]
        gate, up = h.chunk(2, -1)
        w = weights.flatten().index_select(0, order)[:, None]
        dy = grad.index_select(0, order // k)
        silu = F.silu(gate)
        dactivation = _grouped(dy, down, counts)
        dw = (dactivation * silu).mul_(up).sum(-1)
        dw = torch.empty_like(weights).flatten().index_copy_(0, order, dw).view_as(weights)
        ddown = _grouped_outer(dy, (silu * up).mul_(w), counts)
        dactivation.mul_(w)
        dh = torch.empty_like(h)
        dgate, dup = dh.chunk(2, -1)
        torch.mul(silu, dactivation, out=dup)
        torch.ops.aten.silu_backward.grad_input(dactivation.mul_(up), gate, grad_input=dgate)
        dgate_up = _grouped_outer(dh, x, counts)
        dx = _sum_by_token(_grouped(dh, gate_up, counts), order, k)
        return dx, dw, None, dgate_up, ddown


def _grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """x `[T k, I]` sorted by expert times weight `[E, I, O]`, each row by its own expert's matrix: `[T k, O]`."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    for rows, result, matrix in zip(x.split(counts), out.split(counts), weight, strict=True):
        if len(rows):
            torch.mm(rows, matrix, out=result)
    return out


def _grouped_outer(a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    """`a^T b` expert by expert: a `[T k, O]`, b `[T k, I]` sorted by expert -> `[E, O, I]`, zeros for the idle."""
    out = a.new_zeros(len(counts), a.shape[1], b.shape[1])
    for left, right, result in zip(a.split(counts), b.split(counts), out, strict=True):
        if len(left):
            torch.mm(left.T, right, out=result)
    return out


def _sum_by_token(y: Tensor, order: Tensor, k: int) -> Tensor:
    """Rows in expert order `[T k, D]` summed to tokens `[T, D]`, always in the order of the token's own choice."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(places.view(-1, k), y, mode="sum")


def _check_shapes(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if x.ndim != 2 or weights.ndim != 2 or weights.shape != experts.shape or len(weights) != len(x):
        raise ValueError(
            "sparse_experts: x must be [T, D], weights and experts [T, k], "
            f"got {list(x.shape)}, {list(weights.shape)} and {list(experts.shape)}"
        )
    count, hidden, width = down.shape
    if hidden != x.shape[1] or gate_up.shape != (count, 2 * width, hidden):
        raise ValueError(
            f"sparse_experts: gate_up must be [E, 2F, D] and down [E, D, F] with D {x.shape[1]}, "
            f"got {list(gate_up.shape)} and {list(down.shape)}"
        )
