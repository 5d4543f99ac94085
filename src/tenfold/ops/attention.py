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
    if cu_seqlens is not None:
        bounds = sequence_bounds(cu_seqlens, q.shape[0], q.shape[1])
        flat = [x.flatten(0, 1)[None] for x in (q, k, v)]
        return torch.cat([naive_attention(*(x[:, a:b] for x in flat)) for a, b in pairwise(bounds)], 1).view_as(q)
    length, keys, heads, dim = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * dim**-0.5
    future = torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(keys - length + 1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention of q `[B, T, H, K]` over k, v `[B, S, G, K]`; returns `[B, T, H, K]`.

    With cu_seqlens (int `[N+1]` over the flattened `B * T` tokens, S equal to T) no query sees another sequence:
    sequences of like length are padded to one batch, and the causal mask hides the padding behind them.
    """
    _check_shapes(q, k, v)
    if cu_seqlens is None:
        return _dense_attention(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            "attention: packed sequences have no cache, so cu_seqlens needs as many keys as queries, "
            f"got {q.shape[1]} queries and {k.shape[1]} keys"
        )
    parts, owners = [], []
    for tokens, places in length_buckets(sequence_bounds(cu_seqlens, q.shape[0], q.shape[1]), q.device):
        padded = [gather_rows(x.flatten(0, 1), tokens.flatten()).unflatten(0, tokens.shape) for x in (q, k, v)]
        parts.append(_dense_attention(*padded).flatten(0, 1).index_select(0, places))
        owners.append(tokens.flatten().index_select(0, places))
    attended = torch.cat(parts)
    return torch.empty_like(attended).index_copy(0, torch.cat(owners), attended).view_as(q)


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


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = k.shape == v.shape and q.shape[::3] == k.shape[::3]  # batch and head dim
    if not fits or q.shape[1] > k.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention: q must be [B, T, a multiple of G, K] and k, v [B, S >= T, G, K], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
