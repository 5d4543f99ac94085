"""A request under way: its tokens, what it holds of the model's memory, and how its next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tenfold.engine.cache_manager import Claim
from tenfold.engine.disk_cache import Stored
from tenfold.engine.hidden_states import HiddenStates
from tenfold.engine.request import FinishReason, Request, TokenLogprob, Usage
from tenfold.engine.sampler import Floats, Sampler, probability
from tenfold.engine.step_cost import DraftLength
from tenfold.engine.stopping import Stopping, Verdict
from tenfold.engine.structure import Constraint


@dataclass(eq=False, kw_only=True)
class Generation:
    """Its state in the model is that after `computed` of its tokens; prefill, decoding and resuming are all one:
    tokens that are known and not computed are run, and behind the last of them the next one is drawn."""

    request: Request
    sampler: Sampler
    stopping: Stopping
    stop_ids: frozenset[int]
    constraint: Constraint | None  # the form that the answer must have
    draft_length: DraftLength
    last_token: int  # the most tokens that prompt and answer may have
    drafts_follow: bool  # whether the draft module has to see its tokens
    stored: list[Stored] | None  # what the disk has of it and was not tried; None where that has to be looked up again
    tokens: list[int] = field(init=False)
    answer: list[int] = field(default_factory=list)
    arrival: int = 0
    first_computed: int = field(init=False)  # the first of the prompt's tokens that ever was, or how many there are
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)  # of tokens that are not told yet
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    finish: FinishReason | None = None
    # what it holds while it runs
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    hidden: HiddenStates = field(default_factory=HiddenStates)  # of the last computed tokens
    drafts: list[int] = field(default_factory=list)  # guesses that this step checks
    probabilities: list[float] = field(default_factory=list)  # that the draft module gave them
    guessed: int = 0  # of them, that the constraint was told
    saves: list[int] = field(default_factory=list)  # slots for the states before each of them
    points: list[int] = field(default_factory=list)  # where a snapshot is to be made, ascending

    def __post_init__(self) -> None:
        self.logprobs_wanted = self.request.params.prompt_logprobs is not None
        self.tokens = list(self.request.prompt_ids)
        self.first_computed = self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the next step draws a token and needs hardly any computing for that."""
        return self.remaining <= 1

    @property
    def reads_cache(self) -> bool:
        """Not before the logprobs of its prompt are out, for which all of it is computed."""
        return not self.logprobs_wanted

    @property
    def room(self) -> int:
        """How many tokens more it may have."""
        return self.last_token - len(self.tokens)

    @property
    def drafted_length(self) -> int:
        """Entries that the draft module has of it: with all fed that wait, one for each computed token."""
        return self.computed - self.hidden.waiting

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is to be made here."""
        return bool(self.points) and self.points[0] == self.computed

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were never computed for this request; none while it waits."""
        return min(self.first_computed, self.computed)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) - self.prompt_tokens,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )

    def start(self, claim: Claim, points: list[int]) -> None:
        """Goes on from what the cache has."""
        self.stored = None
        self.pages, self.slot, self.computed = claim.pages, claim.slot, claim.length
        if claim.hidden is not None:
            self.hidden.add(claim.hidden[None], wait=self.drafts_follow)
        self.points = points
        self.prompt_logprobs = []

    def stop_holding(self) -> None:
        """Its pages and slot are someone else's now."""
        self.pages, self.slot, self.computed = [], -1, 0
        self.hidden.clear()
        self.points, self.drafts, self.probabilities, self.saves = [], [], [], []

    def advance(self, hidden: Tensor) -> None:
        """Tokens were computed: their hidden states `[T, D]`."""
        if len(hidden):
            self.first_computed = self.cached
            self.computed += len(hidden)
            self.hidden.add(hidden, wait=self.drafts_follow)
            self.points = [point for point in self.points if point >= self.computed]

    def add_point(self, point: int, near: int) -> None:
        """Another request will go on from here, if there is no snapshot shortly before."""
        if not any(point - near < other <= point for other in self.points):
            self.points = sorted([*self.points, point])

    def draw(self, logits: Floats, ahead: Sequence[int] = ()) -> int:
        """The token behind the answer and `ahead`, given logits `[vocab]`. Raises ValueError where there is none."""
        answer = [*self.answer, *ahead] if ahead and self.sampler.penalises else self.answer
        mask = self.constraint.mask() if self.constraint else None
        return self.sampler.sample(logits, len(self.answer) + len(ahead), answer, mask)

    def guess(self, logits: Floats) -> bool:
        """Draws one more draft; False where nothing can follow it, or another one would not pay."""
        try:
            token = self.draw(logits, self.drafts)
            if self.constraint and token not in self.stop_ids:
                self.constraint.advance(token)
                self.guessed += 1
        except ValueError:  # the draft module's logits do not make it the request's error
            return False
        self.drafts.append(token)
        self.probabilities.append(probability(logits, token))
        return token not in self.stop_ids and self.draft_length.goes_on(self.probabilities[-1])

    def take_back_guesses(self) -> None:
        """The constraint stands at the end of the answer again."""
        if self.constraint and self.guessed:
            self.constraint.rollback(self.guessed)
        self.guessed = 0

    def push(self, token: int) -> Verdict:
        """The answer goes on with a token, or ends with it."""
        verdict = self.stopping.push(token)
        if token in self.stop_ids:
            return verdict
        self.tokens.append(token)
        self.answer.append(token)
        if self.constraint:
            self.constraint.advance(token)
        done = self.constraint is not None and self.constraint.is_done
        if verdict.finish or (self.room and not done):
            return verdict
        rest = self.stopping.finish()
        return Verdict(
            tokens=[*verdict.tokens, *rest.tokens],
            text=verdict.text + rest.text,
            finish=rest.finish or ("stop" if done else "length"),
            stopped_by=rest.stopped_by,
        )

    def note_drafts(self, accepted: int) -> None:
        """So many of the first are right."""
        if self.drafts:
            self.drafted += len(self.drafts)
            self.accepted += accepted
            self.draft_length.observe(self.probabilities, accepted)
            self.probabilities = []

    def take_logprobs(self, count: int) -> list[list[TokenLogprob]]:
        taken, self.logprobs = self.logprobs[:count], self.logprobs[count:]
        return taken

    def take_prompt_logprobs(self) -> list[list[TokenLogprob]] | None:
        """Once, when the prompt is through."""
        wanted, self.logprobs_wanted = self.logprobs_wanted, False
        return self.prompt_logprobs if wanted else None
