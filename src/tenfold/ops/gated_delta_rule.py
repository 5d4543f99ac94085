"""The gated delta rule: a linear recurrence whose state is a small associative memory.

Shape letters: B batch, T tokens, N sequences, H query/key heads, HV value heads (R = HV / H for each key head),
K key dim, V value dim, C chunk length, M number of chunks.

Per value head, with the state S `[V, K]`, decay `a_t = exp(g_t)` and write strength `beta_t`:

    d_t = beta_t (v_t - a_t S_{t-1} k_t)        what the memory does not yet say about k_t
    S_t = a_t S_{t-1} + d_t k_t^T
    o_t = S_t q_t / sqrt(K)

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), section 3; chunked form as in its section 3.3.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tenfold.ops.sequences import chunk_table, gather_rows, sequence_bounds

CHUNK = 64


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. Shapes as in `gated_delta_rule`."""
    batch, length, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    q, k = (x.repeat_interleave(value_heads // heads, dim=2).flatten(0, 1) for x in (q, k))
    v, g, beta = (x.flatten(0, 1) for x in (v, g, beta))
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(sequence_bounds(cu_seqlens, batch, length))):
        state = v.new_zeros(value_heads, value_dim, key_dim) if initial_state is None else initial_state[n]
        for t in range(start, end):
            state = g[t].exp()[:, None, None] * state
            d = beta[t, :, None] * (v[t] - torch.einsum("hvk,hk->hv", state, k[t]))
            state = state + torch.einsum("hv,hk->hvk", d, k[t])
            outputs.append(torch.einsum("hvk,hk->hv", state, q[t]) * key_dim**-0.5)
        states.append(state)
    return torch.stack(outputs).view(batch, length, value_heads, value_dim), torch.stack(states)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token, for decoding, without gradients: one sweep of the old state for both products, one writes it."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, dim=2) for x in (q * q.shape[-1] ** -0.5, k))
    state, outputs = initial_state.clone(), []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()[..., None]
        reads = state @ torch.stack((k[:, t], q[:, t]), -1)  # [N, HV, V, 2]
        d = beta[:, t, :, None] * (v[:, t] - decay * reads[..., 0])
        overlap = (k[:, t] * q[:, t]).sum(-1, keepdim=True)
        outputs.append(decay * reads[..., 1] + overlap * d)
        state.mul_(decay[..., None]).add_(d[..., None] * k[:, t, :, None])
    return torch.stack(outputs, 1), state


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    """All chunks at once, but for the state, which is handed from chunk to chunk.

    Inside a chunk let c_i = g_1 + .. + g_i, D_ij = exp(c_i - c_j) for i >= j, and S the state at its start. The writes
    `u` solve (I + beta B) u = y, with B the strictly lower part of (k k^T) * D and y = beta (v - exp(c) S k). Then
    o = exp(c) S q + P u with P = (q k^T) * D, and the state becomes exp(c_C) S + sum_j exp(c_C - c_j) u_j k_j^T.

    Gradients are derived by hand. The one worth knowing: because every decay multiplies what passes it, the gradient of
    c_i is just `do_i . o_i - dv_i . v_i`, and at a chunk's last token also the product of the final state and its
    gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,  # [M, H, C, K], scaled
        k: Tensor,  # [M, H, C, K]
        v: Tensor,  # [M, HV, C, V]
        g: Tensor,  # [M, HV, C]
        beta: Tensor,  # [M, HV, C]
        initial_state: Tensor,  # [N, HV, V, K], sequences in the order of `steps`
        steps: tuple[tuple[int, int], ...],
    ) -> tuple[Tensor, Tensor]:
        decay, from_start, to_end, whole = _decays(g)
        keys_keys = _per_value_head(k @ k.mT, decay).tril_(-1)
        queries_keys = _per_value_head(q @ k.mT, decay)
        inverse = _unit_lower_inverse(beta[..., None] * keys_keys)
        states = v.new_empty(len(v), *initial_state.shape[1:])
        writes, o = torch.empty_like(v), torch.empty_like(v)
        state = initial_state.clone()
        for first, count in steps:
            chunk = slice(first, first + count)
            old = states[chunk].copy_(state[:count])
            y = (v[chunk] - from_start[chunk] * _read(k[chunk], old)).mul_(beta[chunk, ..., None])
            u = torch.matmul(inverse[chunk], y, out=writes[chunk])
            torch.matmul(queries_keys[chunk], u, out=o[chunk])
            o[chunk].addcmul_(from_start[chunk], _read(q[chunk], old))
            state[:count] = whole[chunk] * old + _write(to_end[chunk] * u, k[chunk])
        ctx.save_for_backward(q, k, v, g, beta, keys_keys, queries_keys, inverse, states, writes, o)  # type: ignore[attr-defined]
        ctx.steps = steps  # type: ignore[attr-defined]
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, keys_keys, queries_keys, inverse, states, u, o = ctx.saved_tensors  # type: ignore[attr-defined]
        decay, from_start, to_end, whole = _decays(g)
        do_decayed = from_start * do
        dy, du_state = torch.empty_like(v), torch.empty_like(v)
        dends = torch.empty_like(states)  # gradient of the state at each chunk's end
        dstate = dstate.clone()
        for first, count in reversed(ctx.steps):  # type: ignore[attr-defined]
            chunk = slice(first, first + count)
            dend = dends[chunk].copy_(dstate[:count])
            torch.mul(to_end[chunk], _read(k[chunk], dend), out=du_state[chunk])
            du = (queries_keys[chunk].mT @ do[chunk]).add_(du_state[chunk])
            torch.matmul(inverse[chunk].mT, du, out=dy[chunk])
            dread = (from_start[chunk] * dy[chunk]).mul_(beta[chunk, ..., None]).neg_()
            dstate[:count] = whole[chunk] * dend + _write(do_decayed[chunk], q[chunk]) + _write(dread, k[chunk])
        dv = beta[..., None] * dy
        dread = from_start * dv
        groups = q.shape[:2]
        dqueries_keys = (do @ u.mT).mul_(decay).unflatten(1, (groups[1], -1)).sum(2)
        dkeys_keys = (dv @ u.mT).mul_(decay).tril_(-1).unflatten(1, (groups[1], -1)).sum(2)
        dq = dqueries_keys @ k + _unread(do_decayed, states, groups)
        dk = dqueries_keys.mT @ q - (dkeys_keys + dkeys_keys.mT) @ k
        dk += _unread(to_end * u, dends, groups) - _unread(dread, states, groups)
        surprise = v - from_start * _read(k, states) - keys_keys @ u
        dbeta = (dy * surprise).sum(-1)
        dc = (do * o).sum(-1) - (dv * v).sum(-1)
        dc[..., -1] += (u * du_state).sum((-1, -2)) + (whole * states * dends).sum((-1, -2))
        dg = dc.flip(-1).cumsum(-1).flip(-1)
        return dq, dk, dv, dg, dbeta, dstate, None


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay between tokens `[M, HV, C, C]`, from the start, to the end `[M, HV, C, 1]`, of it all `[M, HV, 1, 1]`."""
    c = g.cumsum(-1)
    upper = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu_(1)
    between = (c[..., :, None] - c[..., None, :]).masked_fill_(upper, float("-inf")).exp_()
    return between, c.exp()[..., None], (c[..., -1:] - c).exp()[..., None], c[..., -1:].exp()[..., None]


def _unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(strictly_lower, identity, upper=False, unitriangular=True)


def _per_value_head(pairs: Tensor, decay: Tensor) -> Tensor:
    """Products of key heads `[M, H, C, C]` times the decay of each value head `[M, HV, C, C]`."""
    return (pairs[:, :, None] * decay.unflatten(1, (pairs.shape[1], -1))).flatten(1, 2)


def _read(x: Tensor, state: Tensor) -> Tensor:
    """`S x` for each token: x `[M, H, C, K]`, state `[M, HV, V, K]` -> `[M, HV, C, V]`.

    The value heads of one key head share a product.
    """
    m, heads, tokens, _ = x.shape
    out = x @ state.reshape(m, heads, -1, state.shape[-1]).mT
    return out.view(m, heads, tokens, -1, state.shape[2]).transpose(2, 3).flatten(1, 2)


def _write(u: Tensor, x: Tensor) -> Tensor:
    """`sum_j u_j x_j^T`: u `[M, HV, C, V]`, x `[M, H, C, K]` -> `[M, HV, V, K]`."""
    stacked = u.mT.unflatten(1, (x.shape[1], -1)).flatten(2, 3)
    return (stacked @ x).view(*u.shape[:2], u.shape[-1], x.shape[-1])


def _unread(u: Tensor, state: Tensor, groups: torch.Size) -> Tensor:
    """`S^T u`, summed over a key head's value heads: u `[M, HV, C, V]`, state `[M, HV, V, K]` -> `[M, H, C, K]`."""
    stacked = u.unflatten(1, (groups[1], -1)).transpose(2, 3).flatten(3)
    return stacked @ state.reshape(*groups, -1, state.shape[-1])


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The chunked form: as fast as matrix products, with gradients. Chunks begin where sequences begin."""
    batch, length, _, key_dim = q.shape
    table = chunk_table(sequence_bounds(cu_seqlens, batch, length), chunk, q.device)
    count = len(table.order)
    if initial_state is None:
        initial_state = v.new_zeros(count, v.shape[2], v.shape[3], key_dim)
    chunked = [_to_chunks(x, table.rows, chunk) for x in (q * key_dim**-0.5, k, v, g[..., None], beta[..., None])]
    q, k, v, g, beta = chunked
    ordered = initial_state.index_select(0, table.order)
    o, state = _ChunkedGatedDeltaRule.apply(q, k, v, g.squeeze(-1), beta.squeeze(-1), ordered, table.steps)
    o = o.transpose(1, 2).flatten(0, 1).index_select(0, table.places).unflatten(0, (batch, length))
    return o, state.index_select(0, table.order.argsort())


def _to_chunks(x: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """`[B, T, heads, dim]` -> `[M, heads, C, dim]`, zeros where a chunk is longer than what is left of its sequence."""
    return gather_rows(x.flatten(0, 1), rows).unflatten(0, (-1, chunk)).transpose(1, 2).contiguous()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over every sequence.

    q, k `[B, T, H, K]` (unit length along K), v `[B, T, HV, V]`, g `[B, T, HV]` log decay (at most 0), beta
    `[B, T, HV]` in (0, 1); initial_state `[N, HV, V, K]`, zeros by default; cu_seqlens int `[N+1]` over the flattened
    tokens (N = B without it). Computes in fp32 (fp64 for fp64 inputs). Returns o `[B, T, HV, V]` in v's dtype and the
    final state `[N, HV, V, K]` in fp32. Raises ValueError where shapes do not fit.
    """
    _check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    dtype = v.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, g, beta = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v, g, beta))
        if initial_state is not None:
            initial_state = initial_state.to(v.dtype)
        if q.shape[1] == 1 and initial_state is not None and not torch.is_grad_enabled():
            o, state = recurrent_gated_delta_rule(q, k, v, g, beta, initial_state)
        else:
            o, state = chunk_gated_delta_rule(q, k, v, g, beta, initial_state, cu_seqlens)
    return o.to(dtype), state


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if q.shape != k.shape or v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            "gated_delta_rule: q and k must be [B, T, H, K] and v [B, T, a multiple of H, V], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(
            f"gated_delta_rule: g and beta must be {list(v.shape[:3])}, got {list(g.shape)} and {list(beta.shape)}"
        )
    if initial_state is not None:
        sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        expected = (sequences, v.shape[2], v.shape[3], q.shape[3])
        if initial_state.shape != expected:
            raise ValueError(
                f"gated_delta_rule: initial_state must be {list(expected)}, got {list(initial_state.shape)}"
            )
