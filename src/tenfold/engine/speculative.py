"""Speculation: a draft module guesses tokens, the model checks them all in one step, and the results are its own.

The tokens are those that the request would get without: each is drawn from the model's logits with the noise of its
position, and a draft only saves a step where it is that very token. Drafts are drawn with the same noise, which makes
them agree most often. Behind the last draft that is right the recurrent state is taken back by swapping slots; keys and
values there are written over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.engine.cache_manager import PrefixCache
from tenfold.engine.generation import Generation
from tenfold.engine.model_runner import EngineModel, Span
from tenfold.engine.scheduler import Work
from tenfold.engine.step_cost import StepCost

MOST_UNDRAFTED = 256  # rows that wait for the draft module while a request does without it


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Guesses for one generation, and slots for the state after its next token and after each guess."""

    generation: Generation
    saves: list[int]
    tokens: list[int] = field(default_factory=list)


class Speculator:
    """Drafts for those for whom it pays."""

    def __init__(self, model: EngineModel, cache: PrefixCache, costs: StepCost, most: int) -> None:
        """most: drafts of a request in a step."""
        self._model, self._cache, self._costs, self._most = model, cache, costs, most

    def draft(self, work: Sequence[Work]) -> dict[Generation, Drafts]:
        """Guesses what follows the one token that each decoding generation has to compute."""
        answers = sum(part.count == part.generation.remaining for part in work)
        tokens = sum(part.count for part in work)
        chosen: dict[Generation, Drafts] = {}
        for part in work:
            generation = part.generation
            if generation.remaining == part.count == 1 and generation.undrafted:
                most = min(self._most, generation.room - 1)
                wanted = generation.draft_length.choose(tokens, answers, most) if most > 0 else 0
                saves = self._room(generation, wanted)
                if saves:
                    chosen[generation] = Drafts(generation=generation, saves=saves)
        if chosen:
            self._chain(list(chosen.values()))
        return chosen

    def _room(self, generation: Generation, drafts: int) -> list[int]:
        """Slots and pages for so many drafts, or for as many as there is room for: one slot more than drafts."""
        while drafts:
            missing = self._cache.pages_for(len(generation.tokens) + drafts) - len(generation.pages)
            more = self._cache.take_pages(max(0, missing))
            if more is not None:
                generation.pages += more
                return self._slots(drafts + 1)
            drafts -= 1
        return []

    def _slots(self, count: int) -> list[int]:
        slots: list[int] = []
        while len(slots) < count and (slot := self._cache.take_slot()) is not None:
            slots.append(slot)
        if len(slots) == 1:  # no room for a draft
            self._cache.slots.release(slots.pop())
        return slots

    def _chain(self, drafts: list[Drafts]) -> None:
        """One guess for all, then the next for those who want more: each from the module's own hidden state."""
        started = time.perf_counter()
        rows = self._feed([draft.generation for draft in drafts], keep=0)
        calls = 1
        while True:
            logits = self._model.logits(torch.stack(rows))
            for draft, line in zip(drafts, logits, strict=True):
                draft.tokens.append(draft.generation.draw(line, draft.tokens))
            pairs = [(d, r) for d, r in zip(drafts, rows, strict=True) if len(d.tokens) < len(d.saves) - 1]
            if not pairs:
                break
            drafts, rows = [draft for draft, _ in pairs], [row for _, row in pairs]
            spans = [_next_span(draft) for draft in drafts]
            rows = list(self._model.draft(spans, torch.stack(rows)))
            calls += 1
        self._costs.observe_draft((time.perf_counter() - started) / calls)

    def catch_up(self, generations: Sequence[Generation]) -> None:
        """The draft module reads what was computed without it, but for the last token, whose successor is open."""
        behind = [generation for generation in generations if sum(map(len, generation.undrafted)) > 1]
        if behind:
            self._feed(behind, keep=1)

    def _feed(self, generations: Sequence[Generation], keep: int) -> list[Tensor]:
        """Runs the module on all waiting rows but the last `keep` of each; its last hidden state for each."""
        spans, rows = [], []
        for generation in generations:
            past, waiting = generation.drafted_length, generation.take_undrafted()
            count = len(waiting) - keep
            if keep:
                generation.undrafted = [waiting[count:].clone()]
            tokens = generation.tokens[past + 1 : past + 1 + count]
            spans.append(Span(tokens=tokens, slot=generation.slot, past=past, pages=generation.pages))
            rows.append(waiting[:count])
        hidden = self._model.draft(spans, torch.cat(rows))
        return [part[-1] for part in hidden.split([len(row) for row in rows])]


def _next_span(draft: Drafts) -> Span:
    generation = draft.generation
    past = generation.computed + len(draft.tokens) - 1
    return Span(tokens=draft.tokens[-1:], slot=generation.slot, past=past, pages=generation.pages)


def settle(cache: PrefixCache, draft: Drafts, computed: int) -> None:
    """Takes the state after `computed` of the tokens that were checked, and gives the other slots back."""
    generation, saves = draft.generation, draft.saves
    if computed < len(draft.tokens) + 1:
        generation.slot, saves[computed - 1] = saves[computed - 1], generation.slot
    for slot in saves:
        cache.slots.release(slot)
