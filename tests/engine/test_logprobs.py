"""The logarithms of probabilities that are reported."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.engine.logprobs import logprobs
from tenfold.engine.request import TokenLogprob


@given(values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=50), count=st.integers(0, 60))
def test_they_are_the_models_own(values: list[float], count: int) -> None:
    logits = torch.tensor(values)
    table = logits.double().log_softmax(-1)
    first, *rest = logprobs(logits, len(values) - 1, count)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [entry.token for entry in rest] == order[:count]
    for entry in (first, *rest):
        assert abs(entry.logprob - float(table[entry.token])) < 1e-5
    assert first.token == len(values) - 1


def test_a_large_vocabulary_and_half_precision() -> None:
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = logprobs(logits, 7, 20)
    assert found == logprobs(logits.float(), 7, 20) and isinstance(found[0], TokenLogprob)
    assert [entry.logprob for entry in found[1:]] == sorted((entry.logprob for entry in found[1:]), reverse=True)
