"""Which token comes next: the likeliest, or a draw from the likely ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tenfold.engine.structure import Structure

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]
Logits = Tensor | Floats

GREEDY_BELOW = 1e-5  # a temperature under this divides by next to nothing: the likeliest token is taken
MOST_LOGPROBS = 100
MOST_STOPS, LONGEST_STOP = 64, 1000  # strings, characters
HEAD = 256  # tokens that are looked at first
BLOCKS_OF = 64  # scores whose maximum stands for all of them
BINS, BINS_PER_NAT = 1024, 32
LOWEST = float(np.finfo(np.float32).min)  # of a token that is not forbidden


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt, and when to stop.

    Raises ValueError for what makes no sense; what depends on the vocabulary is checked by `check_vocabulary`.
    """

    max_tokens: int = 256  # stop after this many
    min_tokens: int = 0  # before this many no stop token is drawn, and no stop string looked for
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: from all
    top_p: float = 0.95  # sample from the likeliest tokens that make up this probability
    min_p: float = 0.0  # leave out tokens less likely than this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # taken from them as often as the answer has the token
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    seed: int = 0  # the same seed gives the same tokens
    stop: tuple[str, ...] = ()  # texts that end the answer, and are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end the text, beside the model's own
    ignore_eos: bool = False  # go on behind the model's own stop tokens
    logprobs: int | None = None  # report the tokens' logprobs, and those of as many likeliest
    prompt_logprobs: int | None = None  # the same for the prompt
    structure: Structure | None = None  # the form that the answer must have

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
        self._check_stops()
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise ValueError(f"{name} must lie between 0 and {MOST_LOGPROBS}, got {count}")

    def _check_lengths(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {self.max_tokens}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be 0 or more, got {self.min_tokens}")

    def _check_distribution(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 1 or more, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must lie between -2 and 2, got {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias must give tokens values between -100 and 100, got {token}: {bias}")

    def _check_stops(self) -> None:
        if len(self.stop) > MOST_STOPS:
            raise ValueError(f"stop must be at most {MOST_STOPS} texts, got {len(self.stop)}")
        for text in self.stop:
            if not 0 < len(text) <= LONGEST_STOP:
                raise ValueError(f"stop must be texts of 1 to {LONGEST_STOP} characters, got one of {len(text)}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError for tokens that a model with `vocab_size` of them doesn't have."""
        if self.logit_bias and max(self.logit_bias) >= vocab_size:
            raise ValueError(f"logit_bias has token {max(self.logit_bias)}, the model knows 0 to {vocab_size - 1}")


class Sampler:
    """Draws the tokens of one request. It has no state: a draw depends on its arguments and the seed alone.

    So a draft, its verification, and a replay after a preemption draw the same token, in whatever order. The noise
    belongs to a position and a token (Gumbel's, added to the logarithm of the probability; the largest sum wins).
    So two distributions that are near each other mostly give the same draw: a draft drawn at its position from the
    draft's logits is the one most likely to be confirmed.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = (), eos_ids: Sequence[int] = ()) -> None:
        """eos_ids: the model's own stop tokens, which `min_tokens` holds back with those of the parameters."""
        self.params = params
        self._prompt = np.unique(np.asarray(prompt_ids, np.int64))
        self._stops = np.asarray([*params.stop_ids, *eos_ids], np.int64)
        self._biased = np.asarray([*params.logit_bias], np.int64)
        self._bias = np.asarray([*params.logit_bias.values()], np.float64)
        off = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
        self.penalises = not off  # and has to know the answer

    def sample(
        self, logits: Logits, position: int, answer_ids: Sequence[int] = (), mask: NDArray[np.bool_] | None = None
    ) -> int:
        """The token at a position of the answer (0 is its first), given logits `[vocab]` of any dtype and device.

        answer_ids: the answer's tokens before it, needed by penalties alone. mask: which tokens the structure allows;
        those behind its end it does not. What is done to the logits, in this order: mask, min_tokens, logit_bias,
        repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_k, top_p, each filter on what
        the one before it has left. Among equals the lower token comes first. Raises ValueError where no token is
        left or a logit is no number.
        """
        scores = self._scores(logits, position, answer_ids, mask)
        best = float(scores.max())
        if not math.isfinite(best):
            raise ValueError("no token can be drawn: the logits are no numbers, or the structure allows none")
        if self.params.temperature < GREEDY_BELOW:
            return int(scores.argmax())
        with np.errstate(over="ignore"):  # to -inf, which weighs 0
            logs = (scores - np.float32(best)) / np.float32(self.params.temperature)
        noise = Noise(self.params.seed, position)
        if self.params.top_k or self.params.min_p or self.params.top_p < 1:
            ids = kept(logs, self.params)
            return noise.draw(ids, logs[ids])
        return _draw_any(logs, noise)

    def _scores(
        self, logits: Logits, position: int, answer_ids: Sequence[int], mask: NDArray[np.bool_] | None
    ) -> Floats:
        scores = as_array(logits)
        held_back = position < self.params.min_tokens
        if mask is None and not (held_back or self._biased.size or self.penalises):
            return scores
        scores = scores.copy()  # the logits are someone else's
        if mask is not None:
            width = min(mask.size, scores.size)
            scores[:width] = np.where(mask[:width], scores[:width], np.float32(-np.inf))
            scores[width:] = -np.inf
        if held_back:
            self._hold_back_stops(scores)
        if self._biased.size:
            scores[self._biased] += self._bias
        if self.penalises:
            self._penalise(scores, answer_ids)
        return scores

    def _hold_back_stops(self, scores: Floats) -> None:
        stops = self._stops[self._stops < scores.size]
        held = scores[stops]
        scores[stops] = -np.inf
        if not scores.max() > -np.inf:  # the structure leaves nothing else: it comes first
            scores[stops] = held

    def _penalise(self, scores: Floats, answer_ids: Sequence[int]) -> None:
        answered, counts = np.unique(np.asarray(answer_ids, np.int64), return_counts=True)
        repetition = self.params.repetition_penalty
        if repetition != 1:
            seen = np.union1d(self._prompt, answered)
            before = scores[seen]
            scores[seen] = np.where(before > 0, before / repetition, before * repetition)
        scores[answered] -= self.params.frequency_penalty * counts + self.params.presence_penalty


def as_array(logits: Logits) -> Floats:
    """Of a tensor in fp32; not copied where it is that already, on the CPU."""
    return logits.detach().float().cpu().numpy() if isinstance(logits, Tensor) else logits


def probability(logits: Floats, token: int) -> float:
    """Of a token, by logits `[vocab]` as they are."""
    with np.errstate(over="ignore"):  # to infinity, where it is next to 0
        return 1 / float(np.exp(logits - logits[token]).sum())


# ---- filters -----------------------------------------------------------------------------------------------


def kept(logs: Floats, params: SamplingParams) -> Ids:
    """The tokens that min_p, top_k and top_p leave, given log weights `[vocab]` of which the largest is 0."""
    if params.top_k:
        ids = likeliest(logs, params.top_k)
        ids = ids[logs[ids] >= _least(params)]
    elif params.min_p:
        ids = np.flatnonzero(logs >= _least(params))
    else:
        return nucleus(logs, params.top_p)
    return ids if params.top_p == 1 else ids[nucleus(logs[ids], params.top_p)]


def _least(params: SamplingParams) -> np.float32:
    return np.float32(math.log(params.min_p) if params.min_p else LOWEST)


def likeliest(logs: Floats, count: int) -> Ids:
    """The `count` tokens with the largest values, largest first, equal ones by number; without those at -inf."""
    blocks = logs.size // BLOCKS_OF
    least = LOWEST
    if 0 < count <= blocks // 2:  # as many values as peaks reach the count-th peak, so those asked for do
        peaks = logs[: blocks * BLOCKS_OF].reshape(BLOCKS_OF, blocks).max(0)
        least = np.partition(peaks, blocks - count)[blocks - count]
    elif 0 < count < logs.size:
        least = np.partition(logs, logs.size - count)[logs.size - count]
    ids = np.flatnonzero(logs >= np.float32(max(least, LOWEST)))
    return _ranked(logs, ids)[:count]


def _ranked(logs: Floats, ids: Ids) -> Ids:
    return ids[np.argsort(-logs[ids], kind="stable")]


def nucleus(logs: Floats, top_p: float) -> Ids:
    """As few of the likeliest as make up `top_p` of the weights exp(logs), one at least; the largest of logs is 0."""
    weights = np.exp(logs)
    needed = top_p * weights.sum(dtype=np.float64)
    head = likeliest(logs, HEAD)
    if weights[head].sum(dtype=np.float64) >= needed:
        return _prefix(weights, head, needed)
    # many: sorted into bins, of which only the one where the nucleus ends is looked into
    bins = np.minimum(logs * np.float32(-BINS_PER_NAT), np.float32(BINS - 1)).astype(np.int64)
    mass = np.cumsum(np.bincount(bins, weights, BINS))
    edge = min(int(np.searchsorted(mass, needed)), BINS - 1)
    border = _ranked(logs, np.flatnonzero((bins == edge) & (weights > 0)))
    before = mass[edge - 1] if edge else 0.0
    return np.append(np.flatnonzero(bins < edge), _prefix(weights, border, needed - before))


def _prefix(weights: Floats, ids: Ids, needed: float) -> Ids:
    """As few of the first ids as weigh so much together, one at least."""
    ranked = weights[ids].astype(np.float64)
    return ids[: max(1, np.count_nonzero(np.cumsum(ranked) - ranked < needed))]


# ---- draws -------------------------------------------------------------------------------------------------


class Noise:
    """Random numbers for the tokens of one position: the same wherever, whenever and for whichever of them."""

    def __init__(self, seed: int, position: int) -> None:
        self._stream = np.uint64(_mix_one(_mix_one(seed) + (position + 1) * int(GOLDEN)))

    def gumbel(self, tokens: Ids) -> Floats:
        """Independent draws of the standard Gumbel distribution, one for each token."""
        bits = _mix(self._stream + (tokens.astype(np.uint64) + np.uint64(1)) * GOLDEN)
        uniform = ((bits >> np.uint64(12)) + 0.5) * 2.0**-52  # 52 bits, so that neither 0 nor 1 comes out
        return -np.log(-np.log(uniform))

    def draw(self, ids: Ids, logs: Floats) -> int:
        """One of the tokens, with probability in proportion to exp(logs)."""
        return int(ids[(logs + self.gumbel(ids)).argmax()])


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64: consecutive multiples of GOLDEN become random bits (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(x: int) -> int:
    """The same of one number, modulo 2^64, for which numpy takes ten times as long."""
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ (x >> 31)


def _draw_any(logs: Floats, noise: Noise) -> int:
    """A draw from all tokens: all but the likeliest stand as one, and are told apart only if that one is drawn."""
    head, rest = likeliest(logs, HEAD), np.exp(logs)
    rest[head] = 0
    mass = rest.sum(dtype=np.float64)
    if not mass:
        return noise.draw(head, logs[head])
    drawn = noise.draw(np.append(head, logs.size), np.append(logs[head], math.log(mass)))
    if drawn < logs.size:
        return drawn
    tail = np.flatnonzero(rest)
    return noise.draw(tail, logs[tail])
