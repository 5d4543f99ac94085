"""Packed sequences: what `cu_seqlens` means, and the index tables that ops derive from it.

Several documents share one tensor, end to end. `cu_seqlens = [0, 5, 9]` says that tokens 0 to 4 are one sequence
and 5 to 8 the next; a batch `[B, T]` is flattened first, so its rows are sequences too. No op looks across a border.

Tables are pure functions of the bounds and are kept, since every layer of a step asks for the same ones. Inference mode
is off while they are made: a table that inference asked for first serves training too.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Bounds = tuple[int, ...]


def sequence_bounds(cu_seqlens: Tensor | None, batch: int, length: int) -> Bounds:
    """The borders of all sequences in a flattened `[batch, length]` tensor.

    Without `cu_seqlens` each row is one sequence. Raises ValueError where `cu_seqlens` does not rise from 0 to
    `batch * length`.
    """
    total = batch * length
    if cu_seqlens is None:
        return tuple(range(0, total + 1, length)) if length else (0,)
    bounds = tuple(cu_seqlens.tolist())
    rises = all(a < b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != total or not rises:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to {total} (batch {batch} x length {length}), "
            f"got {bounds[:4]}..{bounds[-1:]}"
        )
    return bounds


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def positions(bounds: Bounds, device: torch.device) -> Tensor:
    """Each token's position inside its own sequence, int64 `[total]`."""
    return torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)]).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def last_tokens(bounds: Bounds, device: torch.device) -> Tensor:
    """Where each token's own sequence has its last token, int64 `[total]`."""
    return torch.cat([torch.full((b - a,), b - 1) for a, b in pairwise(bounds)]).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def prefixed_rows(bounds: Bounds, prefix: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where things stand in a buffer that gives every sequence `prefix` rows before its first token.

    Returns int64 row numbers of the tokens `[total]`, of the prefixes `[N, prefix]`, and of the last `prefix` rows of
    each sequence `[N, prefix]` (which reach back into the prefix where a sequence is shorter than it).
    """
    starts = torch.tensor(bounds[:-1]) + prefix * torch.arange(len(bounds) - 1)
    lengths = torch.tensor([b - a for a, b in pairwise(bounds)])
    heads = starts[:, None] + torch.arange(prefix)
    tokens = torch.arange(bounds[-1]) + prefix * torch.repeat_interleave(torch.arange(1, len(bounds)), lengths)
    return tokens.to(device), heads.to(device), (heads + lengths[:, None]).to(device)


class ChunkTable(NamedTuple):
    """Sequences cut into chunks, step by step: first the first chunk of every sequence, then every second chunk...

    Sequences stand in order of falling length, so that the sequences still running at a step are a leading slice.
    """

    rows: Tensor  # int64 [chunks * size]: the token in each place; `total` stands for padding
    places: Tensor  # int64 [total]: the place of each token, the inverse of `rows`
    steps: tuple[tuple[int, int], ...]  # per step: first chunk, number of chunks
    order: Tensor  # int64 [N]: sequences by falling length


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def chunk_table(bounds: Bounds, size: int, device: torch.device) -> ChunkTable:
    """Cuts every sequence into chunks of `size` tokens, aligned to the sequence's own start."""
    total = bounds[-1]
    spans = list(pairwise(bounds))
    order = sorted(range(len(spans)), key=lambda n: spans[n][0] - spans[n][1])
    rows: list[Tensor] = []
    steps: list[tuple[int, int]] = []
    offset, first = 0, 0
    while running := [spans[n] for n in order if spans[n][1] - spans[n][0] > offset]:
        starts = torch.tensor([a + offset for a, _ in running])
        ends = torch.tensor([b for _, b in running])
        tokens = starts[:, None] + torch.arange(size)
        rows.append(torch.where(tokens < ends[:, None], tokens, total).flatten())
        steps.append((first, len(running)))
        first, offset = first + len(running), offset + size
    table = torch.cat(rows)
    places = torch.empty(total + 1, dtype=torch.int64).fill_(0)
    places[table] = torch.arange(table.numel())
    return ChunkTable(table.to(device), places[:total].to(device), tuple(steps), torch.tensor(order, device=device))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def length_buckets(bounds: Bounds, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """Sequences grouped by length, padded to the longest of the group (less than twice the shortest).

    Each group is a pair: int64 token numbers `[n, L]` (`total` stands for padding) and the flat places of the others.
    """
    total = bounds[-1]
    groups: dict[int, list[tuple[int, int]]] = {}
    for a, b in pairwise(bounds):
        groups.setdefault((b - a - 1).bit_length(), []).append((a, b))
    buckets = []
    for spans in groups.values():
        longest = max(b - a for a, b in spans)
        starts = torch.tensor([a for a, _ in spans])
        ends = torch.tensor([b for _, b in spans])
        tokens = starts[:, None] + torch.arange(longest)
        tokens = torch.where(tokens < ends[:, None], tokens, total)
        buckets.append((tokens.to(device), (tokens.flatten() < total).nonzero()[:, 0].to(device)))
    return tuple(buckets)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` along dim 0, where the row number `len(x)` reads zeros."""
    padded = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return padded.index_select(0, rows)
