"""How likely tokens were, by the model's own distribution."""

from __future__ import annotations

import numpy as np

from tenfold.engine.request import TokenLogprob
from tenfold.engine.sampler import Logits, as_array, likeliest


def logprobs(logits: Logits, token: int, count: int) -> list[TokenLogprob]:
    """That of the token, then those of the `count` likeliest, equal ones by number; logits `[vocab]`."""
    scores = as_array(logits)
    best = scores.max()
    total = float(best) + float(np.log(np.exp(scores - best).sum(dtype=np.float64)))
    return [TokenLogprob(int(i), float(scores[i]) - total) for i in (token, *likeliest(scores, count))]
