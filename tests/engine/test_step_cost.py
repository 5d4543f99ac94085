"""How many tokens are drafted: as many as pay by what was measured."""

from __future__ import annotations

import pytest

from tenfold.engine.step_cost import HOLD, LOOK, PATIENCE, PROBE, Acceptance, DraftLength, Patience, StepCost


def costs(seconds: dict[int, float], draft: float) -> StepCost:
    found = StepCost()
    for tokens, duration in seconds.items():
        found.observe(tokens, duration)
    found.observe_draft(draft)
    return found


def settled(share: float, found: StepCost) -> DraftLength:
    """For a request that has had many drafts accepted at that share."""
    patience = Patience()
    patience.reset()
    return DraftLength(found, Acceptance(share, trials=100), patience)


def decided(length: DraftLength, step_tokens: int = 1) -> int:
    """The number of drafts, once the steps have been seen without; all are as likely."""
    most = [length.choose(step_tokens, answers=step_tokens, most=4) for _ in range(HOLD + 1)][-1]
    return next((drafts for drafts in range(1, most) if not length.goes_on(0.05)), most)


def test_seconds_between_and_beyond_what_was_measured() -> None:
    found = costs({1: 1.0, 3: 2.0, 300: 9.0}, draft=0.0)
    assert [found.seconds(tokens) for tokens in (1, 2, 3)] == [1.0, 1.5, 2.0]
    assert 2.0 < found.seconds(100) < 9.0
    assert found.seconds(10_000) == 9.0
    assert StepCost().seconds(5) == 0.0


def test_a_mean_forgets() -> None:
    found = costs({1: 1.0}, draft=0.0)
    for _ in range(50):
        found.observe(1, 3.0)
    assert found.seconds(1) == pytest.approx(3.0, abs=0.05)


def test_the_size_of_a_step_within_a_time() -> None:
    found = costs({1: 0.01, 32: 0.1, 256: 0.8}, draft=0.0)
    assert found.tokens_within(0.25, most=256, least=32) == 64
    assert found.tokens_within(9.0, most=256, least=32) == 256
    assert found.tokens_within(0.0, most=256, least=32) == 32
    assert found.tokens_within(9.0, most=20, least=20) == 20
    assert [found.tokens_within(seconds, most=256, least=160) for seconds in (0.7, 0.9)] == [160, 256]


def test_a_step_larger_than_all_before_takes_longer_by_proportion() -> None:
    found = costs({1: 0.01, 32: 0.1}, draft=0.0)
    assert [found.tokens_within(seconds, most=256, least=32) for seconds in (0.1, 0.3, 0.5)] == [32, 64, 128]
    assert StepCost().tokens_within(0.1, most=256, least=32) == 256


@pytest.mark.parametrize(
    ("share", "step", "draft", "expected"),
    [
        (0.9, {1: 1.0, 5: 1.2}, 0.05, 4),  # tokens are nearly free, as where weights are read anyway
        (0.9, {1: 1.0, 5: 5.0}, 0.05, 0),  # each token costs as much as the first
        (0.1, {1: 1.0, 5: 1.2}, 0.30, 0),  # drafts are mostly wrong
        (0.5, {1: 1.0, 5: 1.2}, 0.15, 2),
    ],
)
def test_drafts_are_made_where_they_pay(share: float, step: dict[int, float], draft: float, expected: int) -> None:
    assert decided(settled(share, costs(step, draft))) == expected


def test_a_full_batch_drafts_less() -> None:
    found = costs({1: 1.0, 4: 1.3, 8: 3.0, 12: 5.0}, draft=0.02)
    assert decided(settled(0.7, found)) > decided(settled(0.7, found), step_tokens=8) == 0


def test_what_does_not_pay_is_tried_again_ever_more_rarely() -> None:
    length = settled(0.05, costs({1: 1.0, 5: 2.0}, draft=0.3))
    drafts = [length.choose(step_tokens=1, answers=1, most=4) for _ in range(5000)]
    assert drafts.index(1) == PATIENCE[0] and drafts[PATIENCE[0] :][: PROBE + 1] == [*[1] * PROBE, 0]
    assert sum(drafts) < 0.02 * len(drafts)


def test_a_probe_that_succeeds_turns_drafts_on_again() -> None:
    length = settled(0.05, costs({1: 1.0, 5: 1.5}, draft=0.1))
    chosen = []
    for _ in range(400):
        chosen.append(length.choose(step_tokens=1, answers=1, most=4))
        length.observe([0.05] * chosen[-1], chosen[-1])
    assert chosen[0] == 0 and chosen[-1] == 4


def test_requests_that_do_without_share_their_patience() -> None:
    """However short they are, one of them probes in the end, and the others don't."""
    found, everyone, patience = costs({1: 1.0, 5: 2.0}, draft=0.3), Acceptance(0.05, trials=100), Patience()
    drafts = []
    for _ in range(2 * PATIENCE[0] // LOOK):
        length = DraftLength(found, everyone, patience)
        drafts.append(sum(length.choose(step_tokens=1, answers=1, most=4) for _ in range(LOOK)))
    assert drafts.count(PROBE) == 2 and sum(drafts) == 2 * PROBE and drafts[0] == PROBE


def test_a_step_that_was_held_up_changes_little() -> None:
    found = costs({1: 1.0, 2: 1.2}, draft=0.1)
    for _ in range(20):
        found.observe(1, 1.0)
    found.observe(1, 500.0)
    assert found.seconds(1) < 1.5


def test_a_machine_that_slows_down_slows_all_steps() -> None:
    found = StepCost()
    for _ in range(20):
        found.observe(1, 1.0)
        found.observe(3, 2.0)
        found.observe_draft(0.5)
    for _ in range(50):
        found.observe(3, 4.0)
    measured = [found.seconds(3), found.seconds(1), found.draft_seconds]
    assert measured == pytest.approx([4.0, 2.0, 1.0], rel=0.2)


def test_acceptance_counts_what_was_reached() -> None:
    """Of four drafts with the second wrong, two are known."""
    share = Acceptance(0.5, trials=1e-9)
    for _ in range(200):
        share.observe([0.05] * 4, 1)
    assert share.share == pytest.approx(0.5, abs=0.05)


def test_a_chain_of_drafts_ends_behind_one_that_is_seldom_right() -> None:
    """The module is right where it is sure, and else mostly wrong."""
    everyone = Acceptance()
    for _ in range(100):
        everyone.observe([0.9, 0.05], 1)
    length = DraftLength(costs({1: 1.0, 5: 1.2}, draft=0.1), everyone, Patience())
    assert decided(length) == 1
    assert length.choose(step_tokens=1, answers=1, most=4) == 4
    for probability, goes_on in ((0.9, True), (0.8, True), (0.05, False)):
        assert length.goes_on(probability) == goes_on
