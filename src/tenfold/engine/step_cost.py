"""Whether a draft pays: what steps take, measured, and how many drafts are accepted, measured too."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

WEIGHT = 0.02  # of a new measurement in a running mean, where it lies above
LOWER = 3.0  # times that where it lies below: what is seldom run takes longer, and would not if it were run often
SLOWEST = 2.0  # times the mean: what took longer counts as that, for it was held up by something else
PACE = 4.0  # of a change of a mean so much more is the machine's
KNOWN = 8  # measurements that make a mean
EXACT = 16  # tokens; larger steps are measured by powers of two
MEMORY, OWN_MEMORY = 0.99, 0.95  # by which older drafts count less, of all requests and of one
TRIALS = 6.0  # for which a request counts what others have seen
SURE = 0.1, 0.25, 0.5  # probabilities between which drafts are told apart
GAIN = 1.1  # that drafts must promise: what they promise is uncertain, what a step takes without them is not
HOLD = 4  # steps for which a number of drafts is kept
PLAIN = 32  # of so many such decisions one is for steps without drafts, to see what they take
LOOK = 64  # steps for which none are kept; then what the request has seen of drafts is forgotten
PROBE = 16  # steps with a draft, to see whether it would pay by now; the first few of them take longer
PATIENCE = 256, 2048  # steps without, before a probe; twice as many each time it was in vain


class Mean:
    """A running mean; of the first values the least, for those are of code and memory that were never used."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def observe(self, value: float) -> float:
        """Returns by which factor the mean has changed."""
        self.count += 1
        if self.count <= KNOWN:
            self.value = min(value, self.value or value)
            return 1.0
        before, weight = self.value, WEIGHT * (LOWER if value < self.value else 1)
        self.value += weight * (min(value, SLOWEST * before) - before)
        return self.value / before


class StepCost:
    """Seconds of a step by its number of tokens: running means, and straight lines between them.

    A machine that slows down slows steps of all sizes, those too that are not measured at the time: so the means are
    of seconds over a pace, which all of them share.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, Mean] = {}
        self._draft, self._pace = Mean(), 1.0

    @property
    def draft_seconds(self) -> float:
        """Of one draft for everyone who drafts, whatever belongs to it; 0 before the first."""
        return self._draft.value * self._pace

    def observe(self, tokens: int, seconds: float) -> None:
        size = tokens if tokens < EXACT else 1 << (tokens.bit_length() - 1)
        mean = self._sizes.setdefault(size, Mean())
        change = mean.observe(seconds / self._pace)
        if size < EXACT:
            self._pace *= change**PACE

    def observe_draft(self, seconds: float) -> None:
        self._draft.observe(seconds / self._pace)

    def seconds(self, tokens: int) -> float:
        """Beyond what was measured: as long as the nearest size that was; 0 before the first step."""
        if mean := self._sizes.get(tokens):
            return mean.value * self._pace
        return self._between(tokens) * self._pace

    def _between(self, tokens: int) -> float:
        sizes = sorted(self._sizes)
        index = bisect_left(sizes, tokens)
        if index == len(sizes):
            return self._sizes[sizes[-1]].value if sizes else 0.0
        if index == 0:
            return self._sizes[sizes[0]].value
        low, high = sizes[index - 1], sizes[index]
        share = (tokens - low) / (high - low)
        return (1 - share) * self._sizes[low].value + share * self._sizes[high].value

    def tokens_within(self, seconds: float, most: int, least: int) -> int:
        """How large a step may be, `least` doubled as often as it fits; beyond what was measured, by proportion."""
        tokens, largest = min(least, most), max(self._sizes, default=most)
        while tokens < most:
            more = min(2 * tokens, most)
            if self.seconds(more) * max(1.0, more / largest) > seconds:
                break
            tokens = more
        return tokens


class Acceptance:
    """The share of drafts that are accepted, of those whose predecessors were: of all, and by how sure of them the
    module was. Older ones count less and less.
    """

    def __init__(self, share: float = 0.7, trials: float = TRIALS, memory: float = MEMORY) -> None:
        self._memory = memory
        self._tallies = [[share * trials, trials] for _ in range(len(SURE) + 2)]  # hits and trials; the last is of all

    def heir(self) -> Acceptance:
        """One that begins with these shares, and soon goes by what it sees itself."""
        heir = Acceptance(memory=OWN_MEMORY)
        heir._tallies = [[hits / trials * TRIALS, TRIALS] for hits, trials in self._tallies]
        return heir

    @property
    def share(self) -> float:
        return self._tallies[-1][0] / self._tallies[-1][1]

    def share_of(self, probability: float) -> float:
        """Of drafts to which the module gave about that probability."""
        hits, trials = self._tallies[bisect_left(SURE, probability)]
        return hits / trials

    def observe(self, probabilities: Sequence[float], accepted: int) -> None:
        """Drafts of one step, in order, of which the first so many were accepted."""
        for index, probability in enumerate(probabilities[: accepted + 1]):
            for tally in (self._tallies[bisect_left(SURE, probability)], self._tallies[-1]):
                tally[:] = tally[0] * self._memory + (index < accepted), tally[1] * self._memory + 1


class Patience:
    """When drafts are tried to see whether they would pay by now: by one request for all, and ever more rarely."""

    def __init__(self) -> None:
        self._steps, self._left = PATIENCE[0], 0  # one comes at once

    @property
    def is_over(self) -> bool:
        return self._left <= 0

    def wait(self) -> None:
        """A step of a request without drafts."""
        self._left -= 1

    def grow(self) -> None:
        """They were tried; if they pay, `reset` follows."""
        self._left, self._steps = self._steps, min(2 * self._steps, PATIENCE[1])

    def reset(self) -> None:
        """Drafts pay."""
        self._left = self._steps = PATIENCE[0]


class DraftLength:
    """How many tokens to draft for one request. It starts from what other requests have seen.

    A decision is kept for some steps, for more of them where it is to do without.
    """

    def __init__(self, costs: StepCost, everyone: Acceptance, patience: Patience) -> None:
        self._costs, self._everyone, self._patience = costs, everyone, patience
        self._own = everyone.heir()
        self._drafts = self._steps = 0  # what is decided, and for how many steps more
        self._decisions = 0  # for drafts
        self._least = 0.0  # probability with which a further draft must be accepted
        self._chance = 1.0  # that those so far are

    def rest(self) -> bool:
        """Whether this step was decided to be one without drafts, which then costs no more thought."""
        if self._drafts or not self._steps:
            return False
        self._pass()
        return True

    def choose(self, step_tokens: int, answers: int, most: int) -> int:
        """step_tokens: of the step without drafts, which brings `answers` tokens, one of them this request's."""
        if not self._steps:
            self._drafts, self._steps = self._decide(step_tokens, answers, most)
        self._pass()
        self._chance = 1.0
        return min(self._drafts, most)

    def goes_on(self, probability: float) -> bool:
        """Whether another draft pays behind one to which the module gave that probability."""
        self._chance *= self._own.share_of(probability)
        return self._chance * self._own.share > self._least

    def _pass(self) -> None:
        self._steps -= 1
        if not self._drafts:
            self._patience.wait()

    def _decide(self, step_tokens: int, answers: int, most: int) -> tuple[int, int]:
        """How many drafts at most, for how many steps."""
        if self._pays(self._own.share, step_tokens, answers, most):
            self._patience.reset()
            self._decisions += 1
            self._least = self._draft_cost(step_tokens, most) * answers / max(self._costs.seconds(step_tokens), 1e-9)
            return (most if self._decisions % PLAIN != 1 else 0), HOLD
        if self._patience.is_over and self._pays(1.0, step_tokens, answers, most):
            self._patience.grow()
            return 1, PROBE
        self._own = self._everyone.heir()
        return 0, LOOK

    def _draft_cost(self, step_tokens: int, most: int) -> float:
        """Seconds of one draft, and of checking it; the latter a mean, as single sizes are not known so well."""
        longer = self._costs.seconds(step_tokens + most) - self._costs.seconds(step_tokens)
        return self._costs.draft_seconds + longer / most

    def _pays(self, share: float, step_tokens: int, answers: int, most: int) -> bool:
        """Whether some number of drafts brings more tokens a second, if each is accepted with that probability."""
        costs, expected, chance = self._costs, float(answers), 1.0
        least = GAIN * expected / max(costs.seconds(step_tokens), 1e-9)
        for drafts in range(1, most + 1):
            chance *= share
            expected += chance
            if expected > least * (costs.seconds(step_tokens + drafts) + drafts * costs.draft_seconds):
                return True
        return False

    def observe(self, probabilities: Sequence[float], accepted: int) -> None:
        self._own.observe(probabilities, accepted)
        self._everyone.observe(probabilities, accepted)
