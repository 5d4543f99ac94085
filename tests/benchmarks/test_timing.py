"""The harness of the benchmarks: who runs when, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timing import Case, Limits, check, duration, ratio, report, take_turns

speeds = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9)


def clock_of(ticks: list[float]) -> Iterator[float]:
    """Time that passes by itself: each reading is later by the next tick."""
    now = 0.0
    for tick in ticks:
        yield now
        now += tick


def test_turns_alternate_and_the_order_is_reversed_every_other_round() -> None:
    order: list[tuple[str, int]] = []
    cases = [Case(group="g", name=name, run=lambda i, n=name: order.append((n, i))) for name in "ab"]
    take_turns(cases, rounds=3, calls=1)
    warm = [("a", 0), ("b", 0)]
    assert order == [*warm, ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert all(len(case.seconds) == 3 for case in cases)


def test_short_cases_are_repeated_and_the_time_is_of_one_call() -> None:
    calls: list[int] = []
    case = Case(group="g", name="a", run=calls.append)
    ticks = clock_of([0.01, 0.0, 0.1, 0.0, 0.2, 0.0])  # within the warm-up 10 ms, then turns of 100 and 200 ms
    take_turns([case], rounds=2, now=lambda: next(ticks))
    assert calls == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6]
    assert case.seconds == pytest.approx([0.02, 0.04])


@given(speeds, st.floats(0.1, 10))
def test_a_ratio_is_of_pairs(values: list[float], factor: float) -> None:
    """A drift of the machine that both share cancels out."""
    found = ratio([factor * value for value in values], values)
    assert (found.low, found.median, found.high) == pytest.approx((factor, factor, factor))


def test_a_ratio_needs_as_many_turns_of_both() -> None:
    with pytest.raises(ValueError, match="no turns"):
        ratio([], [])
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_wrong_results_end_the_benchmark() -> None:
    right = torch.ones(4)
    check("fine", right + 1e-4, right, 1e-3)
    with pytest.raises(SystemExit, match=r"bad: relative difference 0\.01, 0\.001 allowed"):
        check("bad", right + 1e-2, right, 1e-3)
    with pytest.raises(SystemExit):
        check("not a number", right * torch.nan, right, 1e-3)


def test_the_table_tells_speeds_shares_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        Case(group="product", name=name, run=lambda _: None, operations=1e9, nbytes=2e9, seconds=[seconds] * 3)
        for name, seconds in (("torch", 2.0), ("ours", 0.5))
    ]
    report(cases, Limits(read_gb_s=8.0, product_gflops=10.0))
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "ours" in line)
    assert row == ["product", "ours", "500", "ms", "0%", "2.0", "0.20", "4.0", "0.50", "4.00x", "(4.00", "to", "4.00)"]


@pytest.mark.parametrize(
    ("seconds", "told"), [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3.2e-5, "32 us"), (1234.0, "1234 s")]
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
