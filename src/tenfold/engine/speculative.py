"""Speculation: a draft module guesses tokens, the model checks them all in one step, and the results are its own.

The tokens are those that the request would get without: each is drawn from the model's logits with the noise of its
position, and a draft only saves a step where it is that very token. Drafts are drawn with the same noise, which makes
them agree most often. Behind the last draft that is right the recurrent state is taken back by swapping slots; keys and
values there are written over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

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

    def draft(self, work: Sequence[Work]) -> float:
        """Guesses what follows the one token that a decoding generation has to compute, for each that gains by it.

        Returns the seconds that this took.
        """
        alone = [part.generation for part in work if part.count == part.generation.remaining == 1]
        deciding = [g for g in alone if g.hidden.waiting and g.room > 1 and not g.draft_length.rest()]
        if not deciding:
            return 0.0
        started = time.perf_counter()
        answers = sum(part.count == part.generation.remaining for part in work)
        tokens = sum(part.count for part in work)
        for generation in deciding:
            most = min(self._most, generation.room - 1)
            if drafts := generation.draft_length.choose(tokens, answers, most):
                self._make_room(generation, drafts)
        drafting = [generation for generation in deciding if generation.saves]
        waited = self.catch_up([g for g in drafting if g.hidden.waiting > self._most + 1])
        calls = self._chain(drafting)
        seconds = time.perf_counter() - started
        if calls:
            self._costs.observe_draft((seconds - waited) / calls)  # what has waited for long is no cost of these
        return seconds

    def _make_room(self, generation: Generation, drafts: int) -> None:
        """Pages, and a slot for the state before each draft, for as many as there is room."""
        while drafts and not self._cache.extend(generation.pages, len(generation.tokens) + drafts):
            drafts -= 1
        while len(generation.saves) < drafts and (slot := self._cache.take_slot()) is not None:
            generation.saves.append(slot)

    def _chain(self, drafting: list[Generation]) -> int:
        """One guess for all, then the next for those who want more: each from the module's own hidden state.

        Returns how often the module was called.
        """
        everyone, hidden, calls = drafting, torch.empty(0), 0
        while drafting:
            hidden = self._model.draft([_next_span(g) for g in drafting], hidden) if calls else self._feed(drafting)
            calls += 1
            logits = self._model.logits(hidden).numpy()
            guessed = [generation.guess(line) for generation, line in zip(drafting, logits, strict=True)]
            for generation in (g for g, good in zip(drafting, guessed, strict=True) if not good):
                self._cut(generation)
            going = [index for index, g in enumerate(drafting) if len(g.drafts) < len(g.saves)]
            drafting, hidden = [drafting[index] for index in going], _rows(hidden, going)
        for generation in everyone:
            generation.take_back_guesses()
        return calls

    def _cut(self, generation: Generation) -> None:
        """It has no more drafts than these, whatever was wanted."""
        for slot in generation.saves[len(generation.drafts) :]:
            self._cache.slots.release(slot)
        del generation.saves[len(generation.drafts) :]

    def settle(self, generation: Generation, computed: int) -> None:
        """Of a step's tokens so many are right: takes the state after them, and gives the other slots back."""
        saves = generation.saves
        if saves and computed <= len(saves):
            generation.slot, saves[computed - 1] = saves[computed - 1], generation.slot
        for slot in saves:
            self._cache.slots.release(slot)
        generation.saves, generation.drafts = [], []

    def catch_up(self, generations: Sequence[Generation]) -> float:
        """The draft module follows what was computed without it, but for the last token, whose successor is open.

        Returns the seconds that this took.
        """
        behind = [generation for generation in generations if generation.hidden.waiting > 1]
        if not behind:
            return 0.0
        started = time.perf_counter()
        self._model.follow(*_waiting(behind, keep=1))
        return time.perf_counter() - started

    def _feed(self, generations: Sequence[Generation]) -> Tensor:
        """The module's hidden states `[N, D]` after all that waits for it."""
        spans, hidden = _waiting(generations, keep=0)
        ends = accumulate(len(span.tokens) for span in spans)
        return _rows(self._model.draft(spans, hidden), [end - 1 for end in ends])


def _waiting(generations: Sequence[Generation], keep: int) -> tuple[list[Span], Tensor]:
    """What the module takes: all waiting rows but the last `keep` of each, which no longer wait."""
    spans, rows = [], []
    for generation in generations:
        past, waiting = generation.drafted_length, generation.hidden.take(keep)
        tokens = generation.tokens[past + 1 : past + 1 + len(waiting)]
        spans.append(Span(tokens=tokens, slot=generation.slot, past=past, pages=generation.pages))
        rows.append(waiting)
    return spans, torch.cat(rows) if len(rows) > 1 else rows[0]


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Those of x `[T, D]`, ascending; as mostly they are all of them, one or none, these cost least."""
    if not rows or len(rows) == len(x):
        return x
    return x[rows[0] : rows[0] + 1] if len(rows) == 1 else x[list(rows)]


def _next_span(generation: Generation) -> Span:
    past = generation.computed + len(generation.drafts) - 1
    return Span(tokens=generation.drafts[-1:], slot=generation.slot, past=past, pages=generation.pages)
