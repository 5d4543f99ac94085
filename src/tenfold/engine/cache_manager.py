"""The prefix cache of a hybrid model: what earlier requests left of their keys, values and recurrent states.

Keys and values can be cut at any token, a recurrent state cannot: it exists only where someone copied it. So a request
starts where the cache has both, at a *snapshot*.

* The tree, one for each isolation word: a **node** is one full page; its key are the page's tokens, its place in the
  tree are the tokens before it. A draft module's keys and values at a position depend on the token that follows, so
  for a model that drafts the key has that token as well (`lookahead`), and a node never changes after it was made.
* A **snapshot** hangs at the node of its last full page. It has the tokens behind that page (its *tail*), a page of its
  own with their keys and values, a slot with the recurrent state behind the last of them, and the last hidden state,
  with which the draft module goes on and a repeated prompt has its first token at once.
* Ownership: nodes and snapshots keep pages and slots in the pools, sequences hold them. A sequence holds the nodes'
  pages on its path and writes behind them only: a hit copies the snapshot's tail (copy on write) and state. A sequence
  that ends or is preempted gives its slot and its last page away, which costs nothing.
* Where snapshots are made (`snapshot_points`): at borders that the request names, at the end of the prompt and of the
  answer, where another request was seen to part from a cached or running one, and in long stretches without any of
  these. A snapshot costs `state_tokens` tokens' worth of keys and values, so stretches are at least that long.
* Eviction, by snapshot: the one that is least worth its bytes goes, by GreedyDual (Cao and Irani, 1997): it scores the
  tokens that it spares, over its size, on top of a clock, which stands at the score of the last one evicted. Nodes with
  no snapshot behind them go with it: they could not be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tenfold.engine.model_runner import EngineModel
from tenfold.engine.pool import Pool

MOST_STRETCHES = 8  # snapshots between the last border passed and the end of a prompt


@dataclass(eq=False)
class Node:
    """A full page; the root has none."""

    parent: Node | None
    key: tuple[int, ...]
    page: int
    depth: int  # pages up to and with this one
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    snapshots: dict[tuple[int, ...], Snapshot] = field(default_factory=dict)  # by their tails


@dataclass(eq=False)
class Snapshot:
    """The state of a sequence after `length` tokens."""

    node: Node
    tail: tuple[int, ...]
    length: int
    slot: int
    page: int | None  # of the tail, if it has tokens
    hidden: Tensor  # fp32 `[D]`, of the last token
    score: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Match:
    """What the cache has of a sequence."""

    path: list[Node]  # full pages that are there
    snapshot: Snapshot | None  # the last one
    common: int  # tokens that it shares with something cached

    @property
    def length(self) -> int:
        return self.snapshot.length if self.snapshot else 0

    @property
    def nodes(self) -> list[Node]:
        """Those up to the snapshot."""
        return self.path[: self.snapshot.node.depth] if self.snapshot else []


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a sequence starts from; it holds the pages and the slot."""

    length: int
    pages: list[int]
    slot: int
    hidden: Tensor | None


class PrefixCache:
    """Owns the pools of pages and slots, which sequences take from, and the trees."""

    def __init__(self, model: EngineModel, pages: int, slots: int, drafts: bool) -> None:
        """drafts: the pages hold a draft module's keys and values too."""
        self.pages, self.slots = Pool(pages), Pool(slots)
        self.page_tokens = model.page_tokens
        self.lookahead = int(drafts)
        self.state_tokens = max(1, model.state_bytes * model.page_tokens // max(1, model.page_bytes))
        self._model = model
        self._roots: dict[str, Node] = {}
        self._snapshots: set[Snapshot] = set()
        self._clock = 0.0

    # ---- finding

    def match(self, isolation: str, tokens: Sequence[int]) -> Match:
        """The longest snapshot that these tokens begin with, and how far anything cached agrees with them."""
        node = self._roots.get(isolation)
        path: list[Node] = []
        best: Snapshot | None = None
        while node:
            start = node.depth * self.page_tokens
            best = self._longest_snapshot(node, tokens[start : start + self._key_tokens]) or best
            child = node.children.get(tuple(tokens[start : start + self._key_tokens]))
            if child is None:
                break
            node = child
            path.append(node)
        return Match(path=path, snapshot=best, common=self._common(node, tokens) if node else 0)

    @property
    def _key_tokens(self) -> int:
        return self.page_tokens + self.lookahead

    @staticmethod
    def _longest_snapshot(node: Node, following: Sequence[int]) -> Snapshot | None:
        fitting = (s for tail, s in node.snapshots.items() if tuple(following[: len(tail)]) == tail)
        return max(fitting, key=lambda snapshot: snapshot.length, default=None)

    def _common(self, node: Node, tokens: Sequence[int]) -> int:
        start = node.depth * self.page_tokens
        following = tuple(tokens[start : start + self._key_tokens])
        return start + max((common_prefix(key, following) for key in (*node.children, *node.snapshots)), default=0)

    # ---- starting a sequence

    def can_start(self, match: Match, tokens: int, spare_pages: int) -> bool:
        """Whether a sequence of so many tokens has room, and other sequences have `spare_pages` beside it."""
        shared = match.nodes
        fresh = self.pages_for(tokens) - sum(self.pages.is_held(node.page) for node in shared)
        return fresh + spare_pages <= self.pages.available and self.slots.available > 0

    def start(self, match: Match, tokens: int) -> Claim:
        """Room for so many tokens, with what the match has already in place; `can_start` must have said so."""
        pages = [node.page for node in match.nodes]
        for page in pages:
            self.pages.hold(page)
        slot, tail = self._resume(match.snapshot) if match.snapshot else (self._fresh_slot(), [])
        pages += tail
        extended = self.extend(pages, tokens)
        assert extended, "started without room"
        hidden = match.snapshot.hidden if match.snapshot else None
        return Claim(length=match.length, pages=pages, slot=slot, hidden=hidden)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _fresh_slot(self) -> int:
        slot = self.take_slot()
        assert slot is not None, "started without a slot"
        self._model.clear_state(slot)
        return slot

    def _resume(self, snapshot: Snapshot) -> tuple[int, list[int]]:
        """The snapshot's slot and tail, copied, or the snapshot's own where there is no room for both."""
        self._touch(snapshot)
        slot = self.take_slot(spared=snapshot)
        tail = self.take_pages(int(snapshot.page is not None), spared=snapshot)
        if slot is None or tail is None:
            if slot is not None:
                self.slots.release(slot)
            self.give_back(tail or [])
            return self._take_over(snapshot)
        self._model.copy_state(snapshot.slot, slot)
        if snapshot.page is not None:
            self._model.copy_page(snapshot.page, tail[0])
        return slot, tail

    def _take_over(self, snapshot: Snapshot) -> tuple[int, list[int]]:
        tail = [] if snapshot.page is None else [snapshot.page]
        self.slots.hold(snapshot.slot)
        for page in tail:
            self.pages.hold(page)
        self._evict(snapshot)
        return snapshot.slot, tail

    # ---- giving memory out and taking it back

    def take_slot(self, spared: Snapshot | None = None) -> int | None:
        """A slot, with whatever is in it; evicts any snapshot but `spared`. None where there is none to be had."""
        if not self.slots.free:
            victims = [s for s in self._snapshots if s is not spared]
            if not victims:
                return None
            self._evict_by_score(victims)
        return self.slots.take()

    def take_pages(self, count: int, spared: Snapshot | None = None) -> list[int] | None:
        """So many pages, or None; evicts snapshots but `spared`, those that free a page."""
        if count > self.pages.available:
            return None
        while self.pages.free < count:
            victims = [s for s in self._snapshots if s is not spared and self._frees_page(s)]
            if not victims:
                return None
            leaves = [snapshot for snapshot in victims if not snapshot.node.children]
            self._evict_by_score(leaves or victims)  # a leaf has pages of its own, others only that of their tail
        return [self.pages.take() for _ in range(count)]

    def extend(self, pages: list[int], tokens: int) -> bool:
        """Takes pages until there are enough for so many tokens; False, and none taken, where there is no room."""
        more = self.take_pages(max(0, self.pages_for(tokens) - len(pages)))
        pages += more or []
        return more is not None

    def give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.pages.release(page)

    def _frees_page(self, snapshot: Snapshot) -> bool:
        node = snapshot.node
        alone = not node.children and len(node.snapshots) == 1 and node.parent is not None
        return snapshot.page is not None or (alone and not self.pages.is_held(node.page))

    def _evict_by_score(self, victims: Sequence[Snapshot]) -> None:
        victim = min(victims, key=lambda snapshot: snapshot.score)
        self._clock = max(self._clock, victim.score)
        self._evict(victim)

    def _evict(self, snapshot: Snapshot) -> None:
        self._snapshots.remove(snapshot)
        del snapshot.node.snapshots[snapshot.tail]
        self.slots.drop(snapshot.slot)
        if snapshot.page is not None:
            self.pages.drop(snapshot.page)
        self._prune(snapshot.node)

    def _prune(self, node: Node) -> None:
        """Removes nodes that lead to no snapshot, from here up."""
        while node.parent and not node.children and not node.snapshots:
            del node.parent.children[node.key]
            self.pages.drop(node.page)
            node = node.parent
        if not node.parent and not node.children and not node.snapshots:
            self._roots = {word: root for word, root in self._roots.items() if root is not node}

    # ---- remembering

    def insert(
        self, isolation: str, tokens: Sequence[int], pages: list[int], slot: int, hidden: Tensor, final: bool
    ) -> Snapshot | None:
        """A snapshot of a sequence that is just behind these tokens; None where it has no room.

        pages: those that the sequence holds; one that the cache has already is changed for the cache's. final: the
        sequence ends here, and lets go of its slot and all its pages.
        """
        full = max(0, len(tokens) - self.lookahead) // self.page_tokens
        tail = tuple(tokens[full * self.page_tokens :])
        made = self._find(isolation, tokens, full, tail)
        if made is None and (own := self._own_copy(pages[full : full + bool(tail)], slot, final)):
            node = self._grow(isolation, tokens, pages, full)
            page = own[1][0] if tail else None
            made = Snapshot(node=node, tail=tail, length=len(tokens), slot=own[0], page=page, hidden=hidden.clone())
            self._keep(made)
        if made:
            self._touch(made)
        if final:
            self.slots.release(slot)
            self.give_back(pages)
        return made

    def _find(self, isolation: str, tokens: Sequence[int], full: int, tail: tuple[int, ...]) -> Snapshot | None:
        node = self._roots.get(isolation)
        for index in range(full):
            node = node and node.children.get(self._key(tokens, index))
        return node.snapshots.get(tail) if node else None

    def _own_copy(self, tail: list[int], slot: int, final: bool) -> tuple[int, list[int]] | None:
        """A slot and pages for a snapshot, held once more than their last owner does."""
        if final:
            self.slots.hold(slot)
            for page in tail:
                self.pages.hold(page)
            return slot, tail
        copies = self.take_pages(len(tail))
        copy = self.take_slot() if copies is not None else None
        if copies is None or copy is None:
            self.give_back(copies or [])
            return None
        self._model.copy_state(slot, copy)
        for source, target in zip(tail, copies, strict=True):
            self._model.copy_page(source, target)
        return copy, copies

    def _key(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        start = index * self.page_tokens
        return tuple(tokens[start : start + self._key_tokens])

    def _grow(self, isolation: str, tokens: Sequence[int], pages: list[int], full: int) -> Node:
        node = self._roots.setdefault(isolation, Node(parent=None, key=(), page=-1, depth=0))
        for index in range(full):
            key = self._key(tokens, index)
            child = node.children.get(key)
            if child is None:
                child = Node(parent=node, key=key, page=pages[index], depth=index + 1)
                node.children[key] = child
                self.pages.keep(child.page)
            elif child.page != pages[index]:  # two sequences have computed the same: one copy is enough
                self.pages.hold(child.page)
                self.pages.release(pages[index])
                pages[index] = child.page
            node = child
        return node

    def _keep(self, snapshot: Snapshot) -> None:
        snapshot.node.snapshots[snapshot.tail] = snapshot
        self._snapshots.add(snapshot)
        self.slots.keep(snapshot.slot)
        self.slots.release(snapshot.slot)
        if snapshot.page is not None:
            self.pages.keep(snapshot.page)
            self.pages.release(snapshot.page)

    def _touch(self, snapshot: Snapshot) -> None:
        spared = snapshot.length - self._length_before(snapshot)
        snapshot.score = self._clock + spared / (self.state_tokens + spared)

    @staticmethod
    def _length_before(snapshot: Snapshot) -> int:
        """Where a sequence would start without this snapshot."""
        node, following = snapshot.node, snapshot.tail
        while True:
            tails = (tail for tail in node.snapshots if len(tail) < len(following) and following[: len(tail)] == tail)
            if (longest := max(tails, key=len, default=None)) is not None:
                return node.snapshots[longest].length
            if node.parent is None:
                return 0
            node, following = node.parent, node.key

    # ---- for the owner's eyes

    def snapshots(self) -> Iterator[Snapshot]:
        """All of them, in no order."""
        yield from self._snapshots

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether it is still there."""
        return snapshot in self._snapshots

    def path(self, snapshot: Snapshot) -> list[Node]:
        """The nodes before a snapshot, from the first page on."""
        nodes: list[Node] = []
        node = snapshot.node
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def check_integrity(self, held_pages: list[int], held_slots: list[int]) -> None:
        """held: what running sequences have, once for each. Every page and slot is where it is counted, once."""
        nodes = [node for root in self._roots.values() for node in _descendants(root)]
        hanging = [
            s for root in self._roots.values() for node in (root, *_descendants(root)) for s in node.snapshots.values()
        ]
        assert len(hanging) == len(self._snapshots) and set(hanging) == self._snapshots
        for node in nodes:
            assert node.children or node.snapshots, "a node leads to no snapshot"
        for snapshot in hanging:
            assert (snapshot.page is None) == (not snapshot.tail)
            assert snapshot.length == snapshot.node.depth * self.page_tokens + len(snapshot.tail)
        tails = [s.page for s in hanging if s.page is not None]
        self.pages.check_integrity(held_pages, [node.page for node in nodes] + tails)
        self.slots.check_integrity(held_slots, [s.slot for s in hanging])


def _descendants(node: Node) -> Iterator[Node]:
    nodes = [node]
    while nodes:
        children = nodes.pop().children.values()
        yield from children
        nodes.extend(children)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences of one type begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is much quicker than comparing one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def snapshot_points(
    start: int, length: int, *, common: int, borders: Sequence[int], state_tokens: int, near: int
) -> list[int]:
    """After how many tokens a prompt of `length`, computed from `start` on, has its state kept; ascending.

    common: tokens that it shares with something cached, where the next request may part from it as this one does.
    A prompt's first border ends what all conversations share, its last two are where the last turn is edited or its
    answer's reasoning left out. Between them a snapshot waits until it spares as much as it costs. Of two that are
    less than `near` tokens apart the earlier is kept: it serves whoever the later would serve.
    """
    borders = sorted(border for border in borders if start < border <= length)
    points = {*borders[:1], *borders[-2:], common, length}
    points |= _stretches(start, [*borders, length], max(state_tokens, -(-(length - start) // MOST_STRETCHES)))
    kept = [start]
    for point in sorted(points):
        if point - kept[-1] >= near and point <= length:
            kept.append(point)
    return kept[1:]


def _stretches(start: int, stops: Sequence[int], stretch: int) -> set[int]:
    """Points at least `stretch` apart, at one of the stops where there is one before the next is due."""
    points: set[int] = set()
    last = start
    for stop in stops:
        while stop - last >= 2 * stretch:
            last += stretch
            points.add(last)
        if stop - last >= stretch:
            last = stop
            points.add(last)
    return points
