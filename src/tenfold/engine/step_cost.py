"""Whether a draft pays: what steps take, measured, and how many drafts are accepted, measured too."""

from __future__ import annotations

from bisect import bisect_left

WEIGHT = 0.05  # of a new measurement in a running mean
PACE_WEIGHT = 0.2  # in that of the machine's pace, which changes within moments
SLOWEST = 2.0  # times the mean: what took longer counts as that, for it was held up by something else
KNOWN = 8  # measurements of a size, before the machine's pace is told by it
EXACT = 16  # tokens; larger steps are measured by powers of two
MEMORY = 0.95  # by which older drafts count less
GAIN = 1.03  # that drafts must promise: what they promise is uncertain, what a step takes without them is not
HOLD = 4  # steps for which a number of drafts is kept
PLAIN = 32  # of so many such decisions one is for steps without drafts, to see what they take
LOOK = 32  # steps for which none are kept: to think costs more than it may bring
PROBE = 4  # steps with a draft, to see whether it would pay by now
PATIENCE = 128, 1024  # steps without, before a probe; twice as many each time it was in vain


class Mean:
    """A running mean; the first few values count alike."""

    def __init__(self, weight: float = WEIGHT, value: float = 0.0) -> None:
        self.value, self.count, self._weight = value, 0, weight

    def observe(self, value: float) -> None:
        self.count += 1
        if self.count > 1:
            value = min(value, SLOWEST * self.value)
        self.value += max(self._weight, 1 / self.count) * (value - self.value)


class StepCost:
    """Seconds of a step by its number of tokens: running means, and straight lines between them.

    A machine that slows down slows steps of all sizes, those too that are not measured at the time: so the means are
    of seconds over a pace, which all of them share.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, Mean] = {}
        self._draft, self._pace = Mean(), Mean(PACE_WEIGHT, 1.0)

    @property
    def draft_seconds(self) -> float:
        """Of one draft for everyone who drafts, whatever belongs to it; 0 before the first."""
        return self._draft.value * self._pace.value

    def observe(self, tokens: int, seconds: float) -> None:
        size = tokens if tokens < EXACT else 1 << (tokens.bit_length() - 1)
        mean = self._sizes.setdefault(size, Mean())
        if size < EXACT and mean.count >= KNOWN:
            self._pace.observe(seconds / mean.value)
        mean.observe(seconds / self._pace.value)

    def observe_draft(self, seconds: float) -> None:
        self._draft.observe(seconds / self._pace.value)

    def seconds(self, tokens: int) -> float:
        """Beyond what was measured: as long as the nearest size that was; 0 before the first step."""
        if mean := self._sizes.get(tokens):
            return mean.value * self._pace.value
        return self._between(tokens) * self._pace.value

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
        """How large a step may be, in powers of two between `least` and `most`."""
        tokens = least
        while tokens * 2 <= most and self.seconds(tokens * 2) <= seconds:
            tokens *= 2
        return min(tokens, most)


class Acceptance:
    """The share of drafts that are accepted, of those whose predecessors were; older ones count less and less."""

    def __init__(self, share: float = 0.7, trials: float = 3.0) -> None:
        self._hits, self._trials = share * trials, trials

    @property
    def share(self) -> float:
        return self._hits / self._trials

    def observe(self, drafted: int, accepted: int) -> None:
        for _ in range(accepted):
            self._hits, self._trials = self._hits * MEMORY + 1, self._trials * MEMORY + 1
        if accepted < drafted:
            self._hits, self._trials = self._hits * MEMORY, self._trials * MEMORY + 1


class Patience:
    """When drafts are tried to see whether they would pay by now: by one request for all, and ever more rarely."""

    def __init__(self) -> None:
        self._steps = self._left = PATIENCE[0]

    @property
    def is_over(self) -> bool:
        return self._left <= 0

    def wait(self) -> None:
        """A step of a request without drafts."""
        self._left -= 1

    def grow(self) -> None:
        self._left = self._steps = min(2 * self._steps, PATIENCE[1])

    def reset(self) -> None:
        """Drafts pay."""
        self._left = self._steps = PATIENCE[0]


class DraftLength:
    """How many tokens to draft for one request. It starts from what other requests have seen.

    A decision is kept for some steps, for more of them where it is to do without.
    """

    def __init__(self, costs: StepCost, everyone: Acceptance, patience: Patience) -> None:
        self._costs, self._everyone, self._patience = costs, everyone, patience
        self._own = Acceptance(everyone.share)
        self._drafts = self._steps = 0  # what is decided, and for how many steps more
        self._decisions = 0  # for drafts

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
        return min(self._drafts, most)

    def _pass(self) -> None:
        self._steps -= 1
        if not self._drafts:
            self._patience.wait()

    def _decide(self, step_tokens: int, answers: int, most: int) -> tuple[int, int]:
        """How many drafts, for how many steps."""
        if best := self._best(self._own.share, step_tokens, answers, most):
            self._patience.reset()
            self._decisions += 1
            return (best if self._decisions % PLAIN != 1 else 0), HOLD
        if self._patience.is_over and self._best(1.0, step_tokens, answers, most):
            self._patience.grow()
            return 1, PROBE
        return 0, LOOK

    def _best(self, share: float, step_tokens: int, answers: int, most: int) -> int:
        """The number of drafts that brings most tokens a second, if each is accepted with that probability."""
        costs, best, expected, chance = self._costs, 0, float(answers), 1.0
        fastest = GAIN * expected / max(costs.seconds(step_tokens), 1e-9)
        for drafts in range(1, most + 1):
            chance *= share
            expected += chance
            seconds = costs.seconds(step_tokens + drafts) + drafts * costs.draft_seconds
            if (rate := expected / max(seconds, 1e-9)) > fastest:
                best, fastest = drafts, rate
        return best

    def observe(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._own.observe(drafted, accepted)
            self._everyone.observe(drafted, accepted)
