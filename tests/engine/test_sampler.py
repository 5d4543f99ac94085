"""Draws: of exactly the filtered distribution, and the same in any order."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tenfold.engine.sampler import Noise, Sampler, SamplingParams, kept, likeliest

Floats = NDArray[np.float64]
PLAIN = SamplingParams(temperature=1, top_p=1)
CRITICAL = {3: 16.3, 7: 24.3, 15: 37.7, 29: 58.3}  # of chi-square by degrees of freedom: 1 in 1,000 exceeds it

# sizes on both sides of where blocks and bins begin to matter
SIZES = st.sampled_from([1, 2, 5, 40, 300, 2000, 20000])
SCALES = st.sampled_from([0.01, 1.0, 4.0, 30.0])
FILTERS = st.builds(
    replace,
    st.just(PLAIN),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 0, 1, 3, 100, 3000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.95, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.1, 1.0]),
)


def logits(size: int, scale: float, seed: int = 0, step: float = 0.0) -> torch.Tensor:
    """Random ones; multiples of `step` where it is given, so that many are equal."""
    values = np.random.default_rng(seed).standard_normal(size) * scale
    return torch.tensor(np.round(values / step) * step if step else values, dtype=torch.float32)


def naive(values: Floats, params: SamplingParams) -> Floats:
    """The filtered softmax in fp64, by sorting everything and in the order that `Sampler.sample` promises."""
    weights = np.exp((values - values.max()) / params.temperature)
    weights[weights < params.min_p * weights.max()] = 0
    order = np.argsort(-values, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    if params.top_p < 1:
        weights[order[before >= params.top_p]] = 0
    return weights / weights.sum()


def penalised(values: Floats, params: SamplingParams, prompt: list[int], answer: list[int]) -> Floats:
    """Bias and penalties, token by token."""
    values = values.copy()
    for token, bias in params.logit_bias.items():
        values[token] += bias
    for token in range(values.size):
        if token in prompt or token in answer:
            values[token] *= params.repetition_penalty ** (-1 if values[token] > 0 else 1)
        values[token] -= params.frequency_penalty * answer.count(token)
        values[token] -= params.presence_penalty * (token in answer)
    return values


# ---- the distribution --------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(size=SIZES, scale=SCALES, params=FILTERS, seed=st.integers(0, 9), step=st.sampled_from([0.0, 0.5]))
def test_filters_keep_what_the_definition_keeps(
    size: int, scale: float, params: SamplingParams, seed: int, step: float
) -> None:
    values = logits(size, scale, seed, step).numpy()
    scaled = (values - values.max()) / np.float32(params.temperature)
    found = np.zeros(size, bool)
    found[kept(scaled, params)] = True
    assert found[values.argmax()]
    surely, perhaps = (naive(values.astype(np.float64), bound) > 0 for bound in nearly(params))
    assert surely.sum() <= found.sum() <= perhaps.sum()
    # of tokens that fp32 makes equals either one may be kept
    near_border = np.abs(scaled - scaled[found].min()) < 1e-5 * (1 - scaled[found].min())
    assert (found | ~surely | near_border).all()
    assert (~found | perhaps | near_border).all()


def nearly(params: SamplingParams, slack: float = 1e-5) -> tuple[SamplingParams, SamplingParams]:
    """A little stricter and a little looser: rounding may move a border."""
    strict = replace(params, top_p=params.top_p - slack, min_p=min(1, params.min_p * (1 + slack)))
    return strict, replace(params, top_p=min(1, params.top_p + slack), min_p=params.min_p * (1 - slack))


@given(size=SIZES, count=st.sampled_from([1, 2, 50, 700, 5000]), step=st.sampled_from([0.0, 0.5, 100.0]))
def test_likeliest_are_the_first_of_a_stable_sort(size: int, count: int, step: float) -> None:
    values = logits(size, 3, step=step).numpy()
    assert np.array_equal(likeliest(values, count), np.argsort(-values, kind="stable")[:count])
    values[::2] = -np.inf
    assert np.array_equal(likeliest(values, count), np.argsort(-values, kind="stable")[: min(count, size // 2)])


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        replace(PLAIN, temperature=0.5),
        replace(PLAIN, top_k=4),
        replace(PLAIN, top_p=0.9),
        replace(PLAIN, min_p=0.1, top_p=0.8),
        replace(PLAIN, presence_penalty=1, frequency_penalty=-0.5, repetition_penalty=1.3, logit_bias={0: 2.0}),
    ],
)
def test_frequencies_are_the_probabilities(params: SamplingParams) -> None:
    prompt, answer, row, draws = [1, 2], [2, 3, 3], logits(8, 1), 6000
    expected = naive(penalised(row.double().numpy(), params, prompt, answer), params)
    sampler = Sampler(params, prompt)
    drawn = [sampler.sample(row, position, answer) for position in range(draws)]
    check_frequencies(np.bincount(drawn, minlength=8), expected)


def test_frequencies_over_seeds() -> None:
    row = logits(8, 1)
    drawn = [Sampler(replace(PLAIN, seed=seed)).sample(row, 0) for seed in range(4000)]
    check_frequencies(np.bincount(drawn, minlength=8), naive(row.double().numpy(), PLAIN))


def test_the_tail_of_a_large_vocabulary_is_drawn_from() -> None:
    """Nearly flat, so that most draws fall outside of the tokens that are looked at first."""
    row = logits(30000, 0.1)
    expected = naive(row.double().numpy(), PLAIN)
    sampler = Sampler(PLAIN)
    drawn = [sampler.sample(row, position) for position in range(1500)]
    groups = row.numpy().argsort().argsort() * 30 // row.numel()  # thirtieths of the tokens, by likelihood
    check_frequencies(np.bincount(groups[drawn], minlength=30), np.bincount(groups, expected).astype(np.float64))


def check_frequencies(counts: NDArray[np.int64], probabilities: Floats) -> None:
    """Chi-square; what has no probability must not have been drawn."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    assert statistic < next(limit for d, limit in CRITICAL.items() if d >= degrees)


def test_noise_is_gumbels_and_independent() -> None:
    draws = np.stack([Noise(7, position).gumbel(np.arange(2000)) for position in range(100)])
    assert abs(draws.mean() - np.euler_gamma) < 0.01 and abs(draws.var() - math.pi**2 / 6) < 0.02
    for shifted in (draws[1:], draws[:, 1:]):  # neighbours, in position and in token
        first = draws[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(first.ravel(), shifted.ravel())[0, 1]) < 0.01
    assert np.isfinite(draws).all()


# ---- logits --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    params=st.builds(
        replace,
        st.just(SamplingParams(temperature=0)),
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=3),
    ),
    prompt=st.lists(st.integers(0, 19), max_size=5),
    answer=st.lists(st.integers(0, 19), max_size=9),
    seed=st.integers(0, 99),
)
def test_penalties_are_the_definitions(params: SamplingParams, prompt: list[int], answer: list[int], seed: int) -> None:
    row = logits(20, 2, seed)
    before = row.clone()
    token = Sampler(params, prompt).sample(row, len(answer), answer)
    expected = penalised(row.double().numpy(), params, prompt, answer)
    assert expected[token] >= expected.max() - 1e-4
    assert torch.equal(row, before)  # the model's own


@pytest.mark.parametrize("temperature", [0, 1e-9, 1])
def test_only_allowed_tokens_are_drawn(temperature: float) -> None:
    mask = np.zeros(500, bool)
    mask[[3, 77, 499]] = True
    sampler, row = Sampler(replace(PLAIN, temperature=temperature)), logits(600, 5)  # longer than the mask
    drawn = {sampler.sample(row, position, mask=mask) for position in range(300)}
    assert drawn == ({3, 77, 499} if temperature == 1 else {int(np.flatnonzero(mask)[row[mask.nonzero()[0]].argmax()])})


def test_stop_tokens_are_held_back_until_min_tokens() -> None:
    params, row = SamplingParams(temperature=0, min_tokens=2, stop_ids=(4, 10**6)), torch.arange(6.0)
    sampler = Sampler(params, eos_ids=[5])
    assert [sampler.sample(row, position) for position in range(4)] == [3, 3, 5, 5]
    only = np.arange(6) == 5
    assert sampler.sample(row, 0, mask=only) == 5  # the structure has ended, and comes first


@pytest.mark.parametrize("bad", [torch.full((9,), math.nan), torch.full((9,), -math.inf), torch.tensor([0, math.inf])])
def test_logits_that_are_no_numbers_are_an_error(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no token can be drawn"):
        Sampler(PLAIN).sample(bad, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    row = logits(50, 3).to(dtype)
    assert Sampler(PLAIN).sample(row, 5) == Sampler(PLAIN).sample(row.float(), 5)


# ---- replay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [30, 40000])
@pytest.mark.parametrize("params", [PLAIN, replace(PLAIN, top_p=0.9), replace(PLAIN, top_k=9, presence_penalty=1)])
def test_draws_do_not_depend_on_order_or_company(size: int, params: SamplingParams) -> None:
    rows, answer = [logits(size, 1, seed) for seed in range(20)], list(range(20))
    sampler = Sampler(params)
    forward = [sampler.sample(row, i, answer[:i]) for i, row in enumerate(rows)]
    order = random.Random(1).sample(range(20), 20)
    other = Sampler(replace(params, seed=9))
    again = dict[int, int]()
    for i in order:
        np.random.random()
        other.sample(rows[i], i, answer[:i])
        again[i] = Sampler(params).sample(rows[i], i, answer[:i])
    assert [again[i] for i in range(20)] == forward
    assert [other.sample(row, i, answer[:i]) for i, row in enumerate(rows)] != forward


def test_near_distributions_mostly_draw_the_same() -> None:
    """What makes drafts from a similar model worth verifying: more of them agree than a greedy draft's would."""
    sampler, agreed, greedy = Sampler(PLAIN), 0, 0
    for position in range(300):
        row = logits(1000, 2, position)
        near = row + 0.2 * logits(1000, 1, position + 1000)
        token = sampler.sample(row, position)
        agreed += sampler.sample(near, position) == token
        greedy += int(near.argmax()) == token
    assert agreed > 240 > 100 > greedy


# ---- parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-3: 1.0}),
        ("logit_bias", {3: math.nan}),
        ("stop", ("",)),
        ("stop", ("x" * 1001,)),
        ("stop", ("x",) * 65),
        ("logprobs", -1),
        ("prompt_logprobs", 101),
    ],
)
def test_bad_parameters(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_bias_for_a_token_that_is_not_there() -> None:
    params = SamplingParams(logit_bias={10: 1.0})
    params.check_vocabulary(11)
    with pytest.raises(ValueError, match="logit_bias has token 10, the model knows 0 to 9"):
        params.check_vocabulary(10)
