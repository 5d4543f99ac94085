"""Causal depthwise convolution with SiLU: each channel looks at its own last W tokens.

Shape letters: B batch, T tokens, N sequences, C channels, W kernel width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from tenfold.ops.sequences import prefixed_rows, sequence_bounds


def naive_causal_conv1d(
    x: Tensor, weight: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: `y_t = silu(sum_j w[:, W-1-j] x_{t-j})`, sequence by sequence, token by token."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    flat, outputs, states = x.reshape(-1, channels), [], []
    for n, (a, b) in enumerate(pairwise(sequence_bounds(cu_seqlens, batch, length))):
        before = x.new_zeros(width - 1, channels) if initial_state is None else initial_state[n].T
        window = torch.cat((before, flat[a:b]))
        outputs += [F.silu((window[t : t + width] * weight.T).sum(0)) for t in range(b - a)]
        states.append(window[b - a :].T)
    return torch.stack(outputs).view_as(x), torch.stack(states)


class _DepthwiseConv(torch.autograd.Function):
    """One pass over the buffer for each tap: three times as fast on a CPU as oneDNN's convolution, copies included."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # type: ignore[attr-defined]
        taps = weight.T.contiguous()
        length = len(x) - len(taps) + 1
        y = x[:length] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(x[j : j + length], taps[j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        taps, length = weight.T.contiguous(), len(dy)
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for j in range(len(taps)):
            dx[j : j + length].addcmul_(dy, taps[j])
            dtaps[j] = (dy * x[j : j + length]).sum(0)
        return dx, dtaps.T


def causal_conv1d(
    x: Tensor, weight: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU of a causal depthwise convolution.

    x `[B, T, C]`, weight `[C, W]`, initial_state `[N, C, W-1]` (the inputs before the first token; zeros by default),
    cu_seqlens int `[N+1]` over the flattened `B * T` tokens. Returns y `[B, T, C]` and the final state `[N, C, W-1]`.

    Every sequence gets W-1 rows of its own before its first token in one long buffer, so that a single convolution
    serves them all and none sees another.
    """
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise ValueError(f"causal_conv1d: weight must be [{channels}, width], got {list(weight.shape)}")
    width = weight.shape[1]
    tokens, heads, tails = prefixed_rows(sequence_bounds(cu_seqlens, batch, length), width - 1, x.device)
    buffer = x.new_zeros(tokens.numel() + heads.numel(), channels).index_copy(0, tokens, x.reshape(-1, channels))
    if initial_state is not None:
        expected = (len(heads), channels, width - 1)
        if initial_state.shape != expected:
            raise ValueError(f"causal_conv1d: initial_state must be {list(expected)}, got {list(initial_state.shape)}")
        rows = initial_state.to(x.dtype).transpose(1, 2).reshape(-1, channels)
        buffer = buffer.index_copy(0, heads.flatten(), rows)
    convolved = _DepthwiseConv.apply(buffer, weight.to(x.dtype))
    y = F.silu(convolved.index_select(0, tokens - (width - 1))).view_as(x)
    return y, buffer.index_select(0, tails.flatten()).view(*tails.shape, channels).transpose(1, 2)
