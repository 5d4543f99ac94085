"""Which token comes next: the likeliest, or a draw from the likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt."""

    max_tokens: int = 256  # stop after this many
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_p: float = 0.95  # sample from the likeliest tokens that make up this probability
    seed: int = 0  # the same seed gives the same tokens
    stop_ids: tuple[int, ...] = ()  # tokens that end the text, beside the model's own

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, got {self.top_p}")


class Sampler:
    """Draws tokens for one request, from a random stream of its own."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, given logits `[vocab]` of any float dtype on any device."""
        logits = logits.float()
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = nucleus((logits / self.params.temperature).softmax(-1), self.params.top_p)
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self._generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """fp32 `[vocab]` with all but the likeliest tokens at zero: as few as make up `top_p`, one at least."""
    if top_p >= 1:
        return probabilities
    ranked, order = probabilities.sort(descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # what the likelier ones make up
    kept = torch.where(before < top_p, ranked, 0.0)
    return torch.zeros_like(probabilities).index_copy(0, order, kept)
