"""Numbered pieces of memory, pages or slots, and who holds each."""

from __future__ import annotations

from heapq import heappop, heappush


class Pool:
    """Every piece is free, held by running sequences (how many is counted), kept by the cache, or both held and kept.

    What is kept but not held can be had by eviction, so `available` counts it with what is free. The lowest free piece
    is taken first: what a sequence reads then lies in long runs, which memory gives faster.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0  # pieces that at least one sequence holds
        self._holders = [0] * size
        self._kept = [False] * size
        self._free = list(range(size))  # a heap

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Pieces that no sequence holds."""
        return self.size - self.held

    def take(self) -> int:
        """A free piece, held by one sequence from now on; there must be one."""
        piece = heappop(self._free)
        self.hold(piece)
        return piece

    def is_held(self, piece: int) -> bool:
        return self._holders[piece] > 0

    def hold(self, piece: int) -> None:
        self.held += not self._holders[piece]
        self._holders[piece] += 1

    def release(self, piece: int) -> None:
        """One sequence less holds it."""
        assert self._holders[piece] > 0, f"{piece} is not held"
        self._holders[piece] -= 1
        self.held -= not self._holders[piece]
        self._free_unused(piece)

    def keep(self, piece: int) -> None:
        """The cache keeps a piece that a sequence holds."""
        assert self._holders[piece] and not self._kept[piece]
        self._kept[piece] = True

    def drop(self, piece: int) -> None:
        """The cache keeps it no longer."""
        assert self._kept[piece]
        self._kept[piece] = False
        self._free_unused(piece)

    def _free_unused(self, piece: int) -> None:
        if not self._holders[piece] and not self._kept[piece]:
            heappush(self._free, piece)

    def check_integrity(self, held: list[int], kept: list[int]) -> None:
        """held, kept: pieces as their owners list them, once for each sequence that holds it."""
        holders = [0] * self.size
        for piece in held:
            holders[piece] += 1
        assert holders == self._holders, "a sequence's pieces and the counts differ"
        assert len(kept) == len(set(kept)), "kept twice"
        assert {piece for piece, is_kept in enumerate(self._kept) if is_kept} == set(kept), "the cache's pieces differ"
        unused = set(range(self.size)) - set(held) - set(kept)
        assert len(self._free) == len(unused) and set(self._free) == unused, "a piece leaked, or is free and in use"
        assert self.held == sum(count > 0 for count in holders)
