"""Who runs in a step: decoding requests always, and of the others' prompts as many tokens as the step has left."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenfold.engine.cache_manager import Match, PrefixCache, common_prefix, snapshot_points
from tenfold.engine.generation import Generation


@dataclass(frozen=True)
class Work:
    """A generation's part of a step: its next `count` known tokens; none where the last hidden state is at hand."""

    generation: Generation
    count: int


class Scheduler:
    """Both lists are in order of arrival, which is the order of precedence.

    * A request starts when a slot and the pages for all its known tokens are there, so a prompt once started is never
      short of memory. Decoding needs a page now and then: where none is left, the latest arrival gives its memory back
      and waits again. The oldest always goes on, so everyone ends.
    * A quarter of a step's prefill is the oldest prompt's, the rest goes to the shortest first: a short request does
      not wait for a long one, and the long one goes on. A step that serves short ones is no longer than that takes.
    * A request whose prompt begins as one that is being computed waits for that one's snapshot, and one of which the
      disk has more than memory until that is read. Others pass it meanwhile.
    """

    def __init__(
        self,
        cache: PrefixCache,
        max_batch: int,
        find: Callable[[Generation], Match | None],
        park: Callable[[Generation], None],
    ) -> None:
        """find: what the cache has of a generation, None while more is read. park: gives its memory to the cache."""
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        self._cache = cache
        self._max_batch = max_batch
        self._find, self._park = find, park

    def add(self, generation: Generation) -> None:
        insort(self.waiting, generation, key=lambda other: other.arrival)

    def remove(self, generation: Generation) -> None:
        """It has ended; its memory is the caller's to give back."""
        (self.running if generation in self.running else self.waiting).remove(generation)

    def plan(self, tokens: int) -> list[Work]:
        """What to run in a step of about so many tokens; room for each of them is there."""
        self._make_room()
        self._admit()
        decoding = [generation for generation in self.running if generation.decodes]
        prefilling = [generation for generation in self.running if not generation.decodes]
        prefill = max(tokens - len(decoding), -(-tokens // 4))  # a large batch does not stop it
        shares = share(prefill, [_next_stop(g) for g in prefilling], [g.remaining for g in prefilling])
        work = [Work(generation, generation.remaining) for generation in decoding]
        return work + [Work(g, count) for g, count in zip(prefilling, shares, strict=True) if count]

    # ---- memory

    def _make_room(self) -> None:
        """A page for whoever decodes into a new one, oldest first."""
        for generation in list(self.running):
            while generation in self.running and not self._cache.extend(generation.pages, len(generation.tokens)):
                self.preempt(self.running[-1])

    def preempt(self, generation: Generation) -> None:
        """It waits again, at its place; what it has computed is kept as long as nobody needs the room."""
        self._park(generation)
        self.running.remove(generation)
        self.add(generation)

    # ---- admission

    def _admit(self) -> None:
        for generation in list(self.waiting):
            if len(self.running) >= self._max_batch:
                return
            match = self._find(generation)
            if match is None or self._follows(generation, match):
                continue
            if not self._cache.can_start(match, len(generation.tokens), spare_pages=len(self.running)):
                return
            self._start(generation, match)

    def _start(self, generation: Generation, match: Match) -> None:
        self.waiting.remove(generation)
        points = snapshot_points(
            match.length,
            len(generation.tokens),
            common=match.common,
            borders=generation.request.borders,
            state_tokens=self._cache.state_tokens,
            near=self._cache.page_tokens,
        )
        generation.start(self._cache.start(match, len(generation.tokens)), points)
        insort(self.running, generation, key=lambda other: other.arrival)

    def _follows(self, generation: Generation, match: Match) -> bool:
        """Whether a running one is about to compute what this one can then start from."""
        near = self._cache.page_tokens
        for leader in self.running:
            if leader.decodes or leader.request.isolation != generation.request.isolation:
                continue
            shared = common_prefix(generation.tokens, leader.tokens)
            if shared > leader.computed and shared - match.length >= near and generation.reads_cache:
                leader.add_point(shared, near)
                return True
        return False


def _next_stop(generation: Generation) -> int:
    """Tokens that can be run before a snapshot is due."""
    return min([*generation.points, len(generation.tokens)]) - generation.computed


def share(tokens: int, wanted: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Divides a step between prompts that want so many tokens now, in order of arrival; lengths: what each has left.

    Those that half a step would finish are short: where there are some, the step has their tokens and a third as many.
    """
    given = [0] * len(wanted)
    if not wanted:
        return given
    order = sorted(range(len(wanted)), key=lambda index: lengths[index])
    short = sum(wanted[index] for index in order if index and lengths[index] <= tokens // 2)
    if short:
        tokens = min(tokens, -(-short * 4 // 3))
    given[0] = min(wanted[0], -(-tokens // 4))
    left = tokens - given[0]
    for index in order:
        more = min(wanted[index] - given[index], left)
        given[index] += more
        left -= more
    return given
