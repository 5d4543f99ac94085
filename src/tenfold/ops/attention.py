"""Causal softmax attention with grouped key/value heads.

Shape letters: B batch, T query tokens, S key tokens (S >= T: the queries are the last T positions), H query heads,
G key/value heads (H a multiple of G), K head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.ops.sequences import gather_rows, length_buckets, sequence_bounds


def naive_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The definition: `softmax(q k^T / sqrt(K))` over the keys at or before the query, in the same sequence."""
    batch, length, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * dim**-0.5
    visible = torch.ones(length, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - length)
    if cu_seqlens is not None:
        bounds = sequence_bounds(cu_seqlens, batch, length)
        owner = torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(pairwise(bounds))]).view(batch, length)
        visible = visible & (owner[:, None, :, None] == owner[:, None, None, :]).to(q.device)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention of q `[B, T, H, K]` over k, v `[B, S, G, K]`; returns `[B, T, H, K]`.

    With cu_seqlens (int `[N+1]` over the flattened `B * T` tokens, S equal to T) no query sees another sequence:
    sequences of like length are padded to one batch, and the causal mask hides the padding behind them.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads must be a multiple of {k.shape[2]} key/value heads")
    if cu_seqlens is None:
        return _dense_attention(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError("attention: cu_seqlens needs as many keys as queries; packed sequences have no cache")
    bounds = sequence_bounds(cu_seqlens, q.shape[0], q.shape[1])
    out = torch.zeros_like(q).flatten(0, 1)
    for tokens, places in length_buckets(bounds, q.device):
        padded = [gather_rows(x.flatten(0, 1), tokens.flatten()).unflatten(0, tokens.shape) for x in (q, k, v)]
        attended = _dense_attention(*padded).flatten(0, 1).index_select(0, places)
        out = out.index_copy(0, tokens.flatten().index_select(0, places), attended)
    return out.view_as(q)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length, keys = q.shape[1], k.shape[1]
    mask = None
    if 1 < length < keys:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=length == keys and length > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
