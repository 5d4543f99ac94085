"""A model for the engine's tests: no weights, but all the memory of a real one, and every mistake with it shows.

What it knows of a sequence is a hash of its tokens, one after the other (a chain). The slot holds the last link, the
pages hold a link for each token, and a token's logits come from its link. Every step checks all links again, so what
lies in a wrong page, was overwritten, not restored, or belongs to another sequence, raises `Corrupt`. The draft
module's pages hold a chain of their own, of the trunk's hidden states and the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.engine.model_runner import Span
from tenfold.models import Config, Qwen3Config

MASK = (1 << 64) - 1
START = 0x1234567
WIDTH = 8  # a hidden state is the eight bytes of a link
TOKEN, LINK, DRAFT = 0, 1, 2  # what a page has of a token
POISON = 0xA5A5A5A5A5A5A5A5


class Corrupt(Exception):
    """The engine has mixed something up."""


def mix(a: int, b: int) -> int:
    """A hash of two numbers (SplitMix64's)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 1) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def to_hidden(links: Sequence[int]) -> Tensor:
    """fp32 `[T, WIDTH]`."""
    return torch.from_numpy(np.array(links, np.uint64).view(np.uint8).reshape(-1, WIDTH).astype(np.float32))


def to_links(hidden: Tensor) -> list[int]:
    return np.ascontiguousarray(hidden.numpy().astype(np.uint8)).view(np.uint64).reshape(-1).tolist()


class FakeModel:
    """quality: the share of drafts that are right, if the token is the likeliest."""

    def __init__(
        self,
        *,
        page_tokens: int = 4,
        can_draft: bool = True,
        quality: float = 0.7,
        context: int = 200,
        vocab_size: int = 24,
        state_bytes: int = 16,
        eos: int | None = 0,
        fingerprint: str = "fake",
    ) -> None:
        self.config: Config = Qwen3Config(
            num_hidden_layers=1,
            hidden_size=WIDTH,
            vocab_size=vocab_size,
            max_position_embeddings=context,
            eos_token_id=eos,
        )
        self.page_tokens, self.can_draft, self.quality = page_tokens, can_draft, quality
        self.thrifty_tokens = 16
        self.page_bytes, self.state_bytes = 24 * page_tokens, state_bytes
        self.fingerprint = fingerprint
        self.steps: list[list[Span]] = []
        self.fails_in = 0  # calls, if above 0

    def allocate(self, pages: int, slots: int) -> None:
        self._pages = np.full((pages, self.page_tokens, 3), POISON, np.uint64)
        self._slots = np.full((slots, self.state_bytes // 8), POISON, np.uint64)

    # ---- running

    def forward(self, spans: Sequence[Span]) -> Tensor:
        self.steps.append(list(spans))
        self._may_fail()
        slots = [slot for span in spans for slot in {span.slot, *span.saves}]
        if len(slots) != len(set(slots)):
            raise Corrupt("two spans share a slot")
        return to_hidden([link for span in spans for link in self._run(span)])

    def _may_fail(self) -> None:
        self.fails_in -= 1
        if self.fails_in == 0:
            raise RuntimeError("the model broke")

    def _run(self, span: Span) -> list[int]:
        link = self._check(span, span.past)
        if not span.tokens or self._slots[span.slot, :2].tolist() != [span.past, link]:
            raise Corrupt(f"slot {span.slot} is not after {span.past} tokens of this sequence")
        links = []
        for position, token in enumerate(span.tokens, span.past):
            link = mix(link, token)
            self._entry(span, position)[: LINK + 1] = token, link
            links.append(link)
            self._slots[span.slot, :2] = position + 1, link
            save = position - span.past - (len(span.tokens) - len(span.saves))
            if save >= 0:
                self._slots[span.saves[save]] = self._slots[span.slot]
        return links

    def _check(self, span: Span, length: int) -> int:
        """The last link of a sequence, if its pages have all of them."""
        link = START
        for position in range(length):
            token, stored, _ = self._entry(span, position).tolist()
            link = mix(link, token)
            if stored != link:
                raise Corrupt(f"page {span.pages[position // self.page_tokens]} has not the sequence's {position}")
        return link

    def _entry(self, span: Span, position: int) -> np.ndarray:
        return self._pages[span.pages[position // self.page_tokens], position % self.page_tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        self._may_fail()
        return torch.stack([link_logits(link, self.config.vocab_size) for link in to_links(hidden)])

    # ---- drafting

    def draft(self, spans: Sequence[Span], hidden: Tensor) -> Tensor:
        self._may_fail()
        rows, out = to_links(hidden), []
        if len(rows) != sum(len(span.tokens) for span in spans):
            raise Corrupt("a hidden state for each token")
        for span in spans:
            out += self._draft(span, [rows.pop(0) for _ in span.tokens])
        return to_hidden(out)

    def follow(self, spans: Sequence[Span], hidden: Tensor) -> None:
        self.draft(spans, hidden)

    def _draft(self, span: Span, rows: list[int]) -> list[int]:
        computed = int(self._slots[span.slot, 0])
        self._check(span, computed)
        link = self._check_drafts(span, computed)
        out = []
        for position, (row, token) in enumerate(zip(rows, span.tokens, strict=True), span.past):
            if position < computed and row != int(self._entry(span, position)[LINK]):
                raise Corrupt(f"the hidden state given for {position} is not that token's")
            if position + 1 < computed and token != int(self._entry(span, position + 1)[TOKEN]):
                raise Corrupt(f"the token given behind {position} is another")
            link = mix(mix(link, row), token)
            self._entry(span, position)[DRAFT] = link
            right = mix(link, 77) / MASK < self.quality
            out.append(mix(row, token) if right else mix(link, 78))
        return out

    def _check_drafts(self, span: Span, computed: int) -> int:
        """The last link of the draft module; those of drafts, whose tokens are in no page, are believed."""
        link = START
        for position in range(span.past):
            stored = int(self._entry(span, position)[DRAFT])
            if position + 1 < computed:
                row, token = int(self._entry(span, position)[LINK]), int(self._entry(span, position + 1)[TOKEN])
                if mix(mix(link, row), token) != stored:
                    raise Corrupt(f"the draft module's entry {position} is not the sequence's")
            link = stored
        return link

    # ---- memory

    def clear_state(self, slot: int) -> None:
        self._slots[slot] = 0
        self._slots[slot, :2] = 0, START

    def copy_state(self, source: int, target: int) -> None:
        self._slots[target] = self._slots[source]

    def copy_page(self, source: int, target: int) -> None:
        self._pages[target] = self._pages[source]

    def read_state(self, slot: int) -> Tensor:
        return torch.from_numpy(self._slots[slot].copy().view(np.uint8).reshape(-1))

    def write_state(self, slot: int, state: Tensor) -> None:
        self._slots[slot] = state.numpy().view(np.uint64)

    def read_page(self, page: int) -> Tensor:
        return torch.from_numpy(self._pages[page].copy().view(np.uint8).reshape(-1))

    def write_page(self, page: int, content: Tensor) -> None:
        self._pages[page] = content.numpy().view(np.uint64).reshape(self.page_tokens, 3)


def link_logits(link: int, vocab_size: int) -> Tensor:
    """fp32 `[vocab]`."""
    return torch.tensor([5 * (mix(link, token) / MASK) for token in range(vocab_size)])
