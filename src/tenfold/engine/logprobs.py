"""How likely tokens were, by the model's own distribution."""

from __future__ import annotations

from torch import Tensor

from tenfold.engine.request import TokenLogprob


def logprobs(logits: Tensor, token: int, count: int) -> list[TokenLogprob]:
    """That of the token, then those of the `count` likeliest; logits `[vocab]`."""
    table = logits.float().log_softmax(-1)
    values, ids = table.topk(min(count, len(table)))
    likeliest = [TokenLogprob(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(token, float(table[token])), *likeliest]
