"""Speculation: a draft module guesses tokens, the model checks them all in one step, and the results are its own.

The tokens are those that the request would get without: each is drawn from the model's logits with the noise of its
position, and a draft only saves a step where it is that very token. Drafts are drawn with the same noise, which makes
them agree most often. Behind the last draft that is right the recurrent state is taken back by swapping slots; keys and
values there are written over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.engine.cache_manager import PrefixCache
from tenfold.engine.generation import Generation
from tenfold.engine.model_runner import EngineModel, Span
from tenfold.engine.scheduler import Work
from tenfold.engine.step_cost import StepCost


class Speculator:
    """Drafts for those for whom it pays."""

    def __init__(self, model: EngineModel, cache: PrefixCache, costs: StepCost, most: int) -> None:
        """most: drafts of a request in a step."""
        self._model, self._cache, self._costs, self._most = model, cache, costs, most

    def draft(self, work: Sequence[Work]) -> None:
        """Guesses what follows the one token that a decoding generation has to compute, for each that gains by it."""
        alone = [part.generation for part in work if part.count == part.generation.remaining == 1]
        deciding = [generation for generation in alone if generation.undrafted and generation.room > 1]
        if not deciding:
            return
        answers = sum(part.count == part.generation.remaining for part in work)
        tokens = sum(part.count for part in work)
        for generation in deciding:
            most = min(self._most, generation.room - 1)
            if drafts := generation.draft_length.choose(tokens, answers, most):
                self._make_room(generation, drafts)
        drafting = [generation for generation in deciding if generation.saves]
        if drafting:
            self._chain(drafting)
        for generation in drafting:
            generation.take_back_guesses()

    def _make_room(self, generation: Generation, drafts: int) -> None:
        """Pages, and slots for the state after the next token and after each draft, for as many as there is room."""
        while drafts and not self._cache.extend(generation.pages, len(generation.tokens) + drafts):
            drafts -= 1
        while drafts and len(generation.saves) < drafts + 1 and (slot := self._cache.take_slot()) is not None:
            generation.saves.append(slot)
        if len(generation.saves) == 1:  # no room for a draft
            self._cache.slots.release(generation.saves.pop())

    def _chain(self, drafting: list[Generation]) -> None:
        """One guess for all, then the next for those who want more: each from the module's own hidden state."""
        started = time.perf_counter()
        rows, calls = self._feed(drafting, keep=0), 1
        while True:
            logits = self._model.logits(torch.stack(rows))
            for generation, line in zip(drafting, logits, strict=True):
                if not generation.guess(line):
                    self._cut(generation)
            pairs = [(g, r) for g, r in zip(drafting, rows, strict=True) if len(g.drafts) + 1 < len(g.saves)]
            if not pairs:
                break
            drafting, rows = [generation for generation, _ in pairs], [row for _, row in pairs]
            rows = list(self._model.draft([_next_span(generation) for generation in drafting], torch.stack(rows)))
            calls += 1
        self._costs.observe_draft((time.perf_counter() - started) / calls)

    def _cut(self, generation: Generation) -> None:
        """It has no more drafts than these, whatever was wanted."""
        kept = len(generation.drafts) + 1 if generation.drafts else 0
        for slot in generation.saves[kept:]:
            self._cache.slots.release(slot)
        del generation.saves[kept:]

    def settle(self, generation: Generation, computed: int) -> None:
        """Of a step's tokens so many are right: takes the state after them, and gives the other slots back."""
        saves = generation.saves
        if saves and computed < len(saves):
            generation.slot, saves[computed - 1] = saves[computed - 1], generation.slot
        for slot in saves:
            self._cache.slots.release(slot)
        generation.saves, generation.drafts = [], []

    def catch_up(self, generations: Sequence[Generation]) -> None:
        """The draft module reads what was computed without it, but for the last token, whose successor is open."""
        behind = [generation for generation in generations if generation.undrafted_rows > 1]
        if behind:
            self._feed(behind, keep=1)

    def _feed(self, generations: Sequence[Generation], keep: int) -> list[Tensor]:
        """Runs the module on all waiting rows but the last `keep` of each; its last hidden state for each."""
        spans, rows = [], []
        for generation in generations:
            past, waiting = generation.drafted_length, generation.take_undrafted(keep)
            tokens = generation.tokens[past + 1 : past + 1 + len(waiting)]
            spans.append(Span(tokens=tokens, slot=generation.slot, past=past, pages=generation.pages))
            rows.append(waiting)
        hidden = self._model.draft(spans, torch.cat(rows))
        return [part[-1] for part in hidden.split([len(row) for row in rows])]


def _next_span(generation: Generation) -> Span:
    past = generation.computed + len(generation.drafts) - 1
    return Span(tokens=generation.drafts[-1:], slot=generation.slot, past=past, pages=generation.pages)
