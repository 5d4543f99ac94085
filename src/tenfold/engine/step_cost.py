"""Whether a draft pays: what steps take, measured, and how many drafts are accepted, measured too."""

from __future__ import annotations

from bisect import bisect_left

WEIGHT = 0.2  # of a new measurement in a running mean
MEMORY = 0.93  # by which older drafts count less
PROBE = 4  # steps with a draft, to see whether it would pay by now
LOOK = 16  # steps without a draft, before it is worked out again whether one would pay: that takes time too
PATIENCE = 64, 1024  # steps without, before a probe; twice as many each time it was in vain


class StepCost:
    """Seconds of a step by its number of tokens: running means, and straight lines between them."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self.draft_seconds = 0.0  # of one draft for everyone who drafts

    def observe(self, tokens: int, seconds: float) -> None:
        size = tokens if tokens < 16 else 1 << (tokens.bit_length() - 1)
        self._means[size] = _mean(self._means.get(size), seconds)

    def observe_draft(self, seconds: float) -> None:
        self.draft_seconds = _mean(self.draft_seconds or None, seconds)

    def seconds(self, tokens: int) -> float:
        """Beyond what was measured: as long as the nearest size that was; 0 before the first step."""
        sizes = sorted(self._means)
        index = bisect_left(sizes, tokens)
        if index == len(sizes):
            return self._means[sizes[-1]] if sizes else 0.0
        if index == 0 or sizes[index] == tokens:
            return self._means[sizes[index]]
        low, high = sizes[index - 1], sizes[index]
        share = (tokens - low) / (high - low)
        return (1 - share) * self._means[low] + share * self._means[high]

    def tokens_within(self, seconds: float, most: int, least: int) -> int:
        """How large a step may be, in powers of two between `least` and `most`."""
        tokens = least
        while tokens * 2 <= most and self.seconds(tokens * 2) <= seconds:
            tokens *= 2
        return min(tokens, most)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + WEIGHT * (value - mean)


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

    def expected(self, drafts: int) -> float:
        """Tokens of a step: one, and those of the drafts that are accepted."""
        return sum(self.share**index for index in range(drafts + 1))


class DraftLength:
    """How many tokens to draft for one request. It starts from what other requests have seen."""

    def __init__(self, costs: StepCost, everyone: Acceptance) -> None:
        self._costs, self._everyone = costs, everyone
        self._own = Acceptance(everyone.share)
        self._idle = 0  # steps since drafts stopped to pay; below 0 it probes
        self._patience = PATIENCE[0]

    def choose(self, step_tokens: int, answers: int, most: int) -> int:
        """step_tokens: of the step without drafts, which brings `answers` tokens, one of them this request's."""
        if self._idle > 0 and self._idle % LOOK:
            return self._probe()
        best = max(range(most + 1), key=lambda drafts: self._rate(drafts, step_tokens, answers))
        if best or not most:
            self._idle, self._patience = min(self._idle, 0), PATIENCE[0]
            return best
        return self._probe()

    def _rate(self, drafts: int, step_tokens: int, answers: int) -> float:
        seconds = self._costs.seconds(step_tokens + drafts) + drafts * self._costs.draft_seconds
        return (answers - 1 + self._own.expected(drafts)) / max(seconds, 1e-9)

    def _probe(self) -> int:
        self._idle += 1
        if self._idle > self._patience:
            self._idle, self._patience = -PROBE, min(2 * self._patience, PATIENCE[1])
        return int(self._idle < 0)

    def observe(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._own.observe(drafted, accepted)
            self._everyone.observe(drafted, accepted)
