"""Reads a corpus: documents packed into rows of equal length, in an order that depends on the seed alone.

Shape letters: B rows, T tokens in a row, P pieces of documents, R rows in an epoch.

A document that is longer than a row is cut into pieces. Pieces are packed best-fit: longest first, each into
the row that it fills best. An epoch's plan is a pure function of (seed, epoch), so a position is two numbers
and any rank computes its own rows without talking to others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from tenfold.tokenizer import Tokenizer
from tenfold.train.shards import damage, read_index

BUFFER_ROWS = 512  # rows' worth of pieces that are packed at a time
NO_LABEL = -100


class Batch(NamedTuple):
    """Rows to train on. Sequences never cross a document's border; padding is a sequence of its own."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], the next token of the same document, -100 where there is none
    cu_seqlens: Tensor  # int32 [N + 1], borders of sequences in the flattened B * T tokens, the rows' own included


class Documents:
    """The documents of a split, memory-mapped."""

    def __init__(self, shards: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """`shards` hold tokens and the offsets of their documents."""
        self._shards = shards
        self._first = np.cumsum([0, *(len(offsets) - 1 for _, offsets in shards)])
        self.lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, offsets in shards)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of a document, eos at its end."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.tokens(document, 0, int(self.lengths[document]))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to before `stop` of a document, fewer where it ends earlier."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        tokens, offsets = self._shards[shard]
        place = document - self._first[shard]
        begin, end = int(offsets[place]), int(offsets[place + 1])
        return tokens[begin + start : min(begin + stop, end)]


class Corpus:
    """A folder that `build_corpus` wrote."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Opens it after comparing all files with their sizes and, with `verify`, with their checksums.

        Raises ValueError where there is no corpus or it is damaged."""
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        wrong = damage(self.folder, self.index, checksums=verify)
        if wrong is not None:
            raise ValueError(f"damaged corpus: {wrong}; build it again from the same inputs, or copy it again")

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the tokenizer knows."""
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return self.index.eos_id

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""
        tokenizer = Tokenizer.from_folder(self.folder)
        assert tokenizer is not None, "checked when the corpus was opened"
        return tokenizer

    def documents(self, split: str = "train") -> Documents:
        """The documents of a split. Raises ValueError where it has none."""
        found = self.index.splits.get(split)
        if found is None or not found.documents:
            held = ", ".join(name for name, each in self.index.splits.items() if each.documents)
            advice = "give more documents, a separator, or a larger validation_fraction"
            raise ValueError(f"{self.folder}: no documents in split {split!r}, only in {held}; {advice}")
        return Documents(
            [(self._map(s.file, self.index.dtype), self._map(s.offsets_file, "int64")) for s in found.shards]
        )

    def _map(self, name: str, dtype: str) -> np.ndarray:
        return np.memmap(self.folder / name, np.dtype(dtype).newbyteorder("<"), mode="r")


# ---- packing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which piece of which document stands where, row by row."""

    document: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P], first token of the piece in its document
    length: np.ndarray  # int64 [P]
    first: np.ndarray  # int64 [R + 1], first piece of each row

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.first) - 1

    @cached_property
    def mean_context(self) -> float:
        """Tokens of its own piece that a token sees on average, itself included."""
        lengths = self.length.astype(np.float64)
        return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def shuffled(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation of `count` things. It sorts raw random bits, which numpy promises never to change."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])).random_raw(count)
    return np.argsort(bits, kind="stable")


def plan_epoch(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> Plan:
    """All documents once, in rows of `capacity` tokens, documents and rows shuffled."""
    plan = pack(shuffled(len(lengths), seed, epoch, 0), lengths, capacity)
    order = shuffled(plan.rows, seed, epoch, 1)
    sizes = np.diff(plan.first)[order]
    first = np.concatenate([[0], np.cumsum(sizes)])
    pieces = np.repeat(plan.first[order] - first[:-1], sizes) + np.arange(first[-1])
    return Plan(plan.document[pieces], plan.start[pieces], plan.length[pieces], first)


def pack(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    """Cuts documents into pieces and packs these buffer by buffer. `lengths` is by document."""
    sizes = lengths[documents]
    counts = -(-sizes // capacity)
    owner = np.repeat(np.arange(len(documents)), counts)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    length = np.minimum(capacity, sizes[owner] - start)
    buffer = (np.cumsum(length) - 1) // (BUFFER_ROWS * capacity)
    borders = [0, *(np.flatnonzero(np.diff(buffer)) + 1).tolist(), len(owner)]
    rows: list[list[int]] = []
    for a, b in pairwise(borders):
        rows += [[a + i for i in row] for row in best_fit(length[a:b], capacity)]
    order = np.fromiter(chain.from_iterable(rows), np.int64, len(owner))
    first = np.cumsum([0, *map(len, rows)])
    return Plan(documents[owner[order]], start[order], length[order], first)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Fills rows of `capacity`: longest first, each into the open row with the least room that holds it."""
    rows: list[list[int]] = []
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # by the room they have left
    rooms = 0  # bit r is set where a row with room r is open
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= 0 if open_rows[room] else 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


# ---- batches -----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A row of a plan."""

    plan: Plan
    row: int


def make_batch(documents: Documents, places: list[Place], length: int, padding: int) -> Batch:
    """Rows as tensors. `padding` fills what is left of a row."""
    inputs = np.full((len(places), length), padding, np.int64)
    labels = np.full((len(places), length), NO_LABEL, np.int64)
    borders = [0]
    for number, (plan, row) in enumerate(places):
        end = 0
        for i in range(plan.first[row], plan.first[row + 1]):
            begin, size = end, int(plan.length[i])
            tokens = documents.tokens(int(plan.document[i]), int(plan.start[i]), int(plan.start[i]) + size + 1)
            end = begin + size
            inputs[number, begin:end] = tokens[:size]
            labels[number, begin : begin + len(tokens) - 1] = tokens[1:]
            borders.append(number * length + end)
        if end < length:
            borders.append((number + 1) * length)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), torch.tensor(borders, dtype=torch.int32))


def split_rows(batch: Batch, rows: int | None) -> list[Batch]:
    """A batch in parts of at most `rows` rows; as it is without a number."""
    total, length = batch.input_ids.shape
    parts = []
    for first in range(0, total, rows or total):
        last = min(total, first + (rows or total))
        borders = batch.cu_seqlens[(first * length <= batch.cu_seqlens) & (batch.cu_seqlens <= last * length)]
        parts.append(Batch(batch.input_ids[first:last], batch.labels[first:last], borders - first * length))
    return parts


class PackedLoader:
    """Endless batches of packed documents: every token of the split once in each epoch.

    Rows follow one another across the ends of epochs, so no batch is short. With `world` ranks each gets its
    share of the rows of every batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`batch_size` counts the rows of all ranks. Raises ValueError where the numbers do not fit."""
        _check_length(sequence_length)
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        self.sequence_length, self.seed = sequence_length, seed
        self._documents = corpus.documents(split)
        self._padding = corpus.eos_id
        self._rank, self._world = rank, world
        self.batch_size = self._divisible(batch_size)
        self._enter(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self, batch_size: int | None = None) -> Batch:
        """This rank's rows of the next batch; of `batch_size` rows in all where it is given."""
        rows = self.batch_size if batch_size is None else self._divisible(batch_size)
        places = [self._advance() for _ in range(rows)]
        share = rows // self._world
        mine = places[self._rank * share : (self._rank + 1) * share]
        return make_batch(self._documents, mine, self.sequence_length, self._padding)

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self._epoch

    @property
    def rows(self) -> int:
        """Rows in this epoch."""
        return self._plan.rows

    @property
    def efficiency(self) -> float:
        """Share of this epoch's rows that is no padding, 0..1."""
        return float(self._plan.length.sum() / (self.rows * self.sequence_length))

    @property
    def mean_context(self) -> float:
        """Tokens of its own sequence that a token of this epoch sees on average, itself included."""
        return self._plan.mean_context

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands. The same for all ranks."""
        return {"epoch": self._epoch, "row": self._row, "rows": self.rows, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where another loader stood. Raises ValueError where that one read other data or order."""
        if state["seed"] != self.seed:
            raise ValueError(f"the data position was saved under seed {state['seed']}, not {self.seed}")
        self._enter(state["epoch"])
        if state["rows"] != self.rows:
            raise ValueError(
                f"the data position was saved with {state['rows']} rows in its epoch, here are {self.rows}: "
                "go on with the same corpus and sequence_length"
            )
        self._row = state["row"]

    def _enter(self, epoch: int) -> None:
        self._plan = plan_epoch(self._documents.lengths, self.sequence_length, self.seed, epoch)
        self._epoch, self._row = epoch, 0

    def _advance(self) -> Place:
        if self._row == self.rows:
            self._enter(self._epoch + 1)
        place = Place(self._plan, self._row)
        self._row += 1
        return place

    def _divisible(self, rows: int) -> int:
        if rows < 1 or rows % self._world:
            raise ValueError(f"a batch of {rows} rows cannot be shared by {self._world} ranks equally")
        return rows


def validation_batches(
    corpus: Corpus,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    split: str = "validation",
) -> Iterator[Batch]:
    """The first `max_tokens` tokens of a split, or all, packed in fixed order; the last batch may be smaller.

    The tokens are the same for every sequence length and batch size. Raises ValueError where there are none.
    """
    _check_length(sequence_length)
    documents = corpus.documents(split)
    before = np.cumsum(documents.lengths) - documents.lengths
    lengths = np.minimum(documents.lengths, (max_tokens or int(documents.lengths.sum())) - before)
    plan = pack(np.flatnonzero(lengths > 0), lengths, sequence_length)
    places = iter([Place(plan, row) for row in range(plan.rows)])
    while rows := list(islice(places, batch_size)):
        yield make_batch(documents, rows, sequence_length, corpus.eos_id)


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be 2 at least, got {sequence_length}")
