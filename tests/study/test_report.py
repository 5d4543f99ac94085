"""The demo's report: ratios are honest, no text becomes markup, and the page needs no other file."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tenfold.study.charts import linear_ticks, log_ticks, shade
from tenfold.study.report import (
    ArmReport,
    Cost,
    CurvePoint,
    DemoReport,
    Sample,
    cost_to_reach,
    headline,
    print_summary,
    ratios,
    write_report,
)

NAMES = ("flops_vs_d0", "time_vs_d0", "flops_vs_d2", "time_vs_d2")
PROMPT = " = River Tyne = \n\n The river"
TEXT = (
    " was first crossed in 1862 , when the second army of the north had been sent to the city in order to "
    "take the bridge and the small fort above it . It was the first of the two to be built in the county .\n "
    "The song was released as a single in the United Kingdom , where it reached number five ."
)
HOSTILE = ' <unk> & the "end"</blockquote><script>alert(1)</script>'


def curve(steps: int, tokens: int, floor: float, gain: float, flops: float, seconds: float) -> list[CurvePoint]:
    """Losses that fall as a power of the tokens, and a little more as the learning rate decays."""
    points = [CurvePoint(tokens=0, flops=0.0, seconds=0.0, validation_loss=9.01)]
    for step in range(1, steps + 1):
        share = step / steps
        seen = round(tokens * share)
        loss = floor + gain * (seen / 1e6) ** -0.55 - 0.12 * max(0.0, share - 0.35)
        points.append(
            CurvePoint(tokens=seen, flops=flops * share, seconds=seconds * share, validation_loss=min(loss, 8.5))
        )
    return points


def router_load(layers: int, experts: int) -> list[list[float]]:
    """Loads from even in the first layer to skewed in the last, where two experts are dead."""
    rows = []
    for layer in range(layers):
        weights = [math.exp(0.25 * layer * math.sin(7.0 * e + layer)) for e in range(experts)]
        if layer == layers - 1:
            weights[3] = weights[5] = 0.0
        rows.append([w / sum(weights) for w in weights])
    return rows


def arm(name: str, *, floor: float, gain: float, tokens: int, flops: float, seconds: float) -> ArmReport:
    """One arm; N1 is sparse."""
    sparse = name == "N1"
    points = curve(24, tokens, floor, gain, flops, seconds)
    return ArmReport(
        name=name,
        title={"D0": "dense, as before", "D2": "dense, our recipe", "N1": "hybrid and sparse"}[name],
        description={
            "D0": "Qwen3 dense, 8 layers of 256, AdamW, cosine, 80 tokens per parameter.",
            "D2": "Qwen3 dense, 6 layers of 256, Muon, warmup-stable-decay, compute-optimal.",
            "N1": "Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, 4 of 64 experts and "
            "a shared one, zero-centred norms, Muon, warmup-stable-decay.",
        }[name],
        optimizer="AdamW" if name == "D0" else "Muon and AdamW",
        schedule="cosine" if name == "D0" else "warmup-stable-decay",
        learning_rate=3e-3 if name == "D0" else 0.02,
        parameters_total=38_400_000 if sparse else 9_800_000,
        parameters_active=6_100_000 if sparse else 9_800_000,
        tokens=tokens,
        flops=flops,
        optimizer_flops=flops * (1e-6 if name == "D0" else 0.031),
        seconds_steps=seconds,
        seconds_total=seconds * 1.08 + 14,
        tokens_per_second=tokens / seconds,
        gflops_per_second=flops / seconds / 1e9,
        utilisation=flops / seconds / 1e9 / 92.0,
        peak_memory_gb=2.31 if sparse else 1.24,
        final_validation_loss=points[-1].validation_loss,
        curve=points,
        train_curve=[
            (
                t,
                min(9.0, floor + gain * (t / 1e6) ** -0.55 - 0.12 * max(0.0, t / tokens - 0.35))
                + 0.09 * math.sin(t * 1.7),
            )
            for t in range(tokens // 600, tokens + 1, tokens // 600)
        ],
        samples=[
            Sample(prompt=PROMPT, text=TEXT[: 90 + 70 * len(name)]),
            Sample(prompt="The <b>", text=HOSTILE + TEXT[:120]),
        ],
        router_load=router_load(8, 64) if sparse else [],
        checkpoint=f"runs/demo/{name.lower()}/step-00002400",
    )


def demo_report(*, new_floor: float = 3.02) -> DemoReport:
    """The report; with a high `new_floor` the new arm never reaches the dense ones."""
    arms = [
        arm("D0", floor=3.06, gain=3.2, tokens=60_000_000, flops=4.1e15, seconds=72_000.0),
        arm("D2", floor=3.08, gain=2.3, tokens=20_000_000, flops=1.25e15, seconds=23_000.0),
        arm("N1", floor=new_floor, gain=1.95, tokens=20_000_000, flops=7.4e14, seconds=17_300.0),
    ]
    return DemoReport(
        tenfold_version="0.1.0",
        torch_version="2.13.0",
        date="2026-01-17",
        machine="AMD EPYC 7B13, 16 cores, 64 GB",
        threads=16,
        matmul_peak_gflops=92.0,
        precision="float32",
        seed=0,
        corpus="WikiText-2 raw",
        tokenizer_vocab=8192,
        sequence_length=512,
        validation_tokens=246_000,
        arms=arms,
        ratios=ratios(arms),
        caveats=["Learning rates were tuned in three trials for each arm, no more."],
    )


def line(*losses: float) -> list[CurvePoint]:
    """A curve whose cost goes 100 FLOPs, 10 seconds and 1 token a point."""
    return [
        CurvePoint(tokens=i, flops=100.0 * i, seconds=10.0 * i, validation_loss=loss)
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "loss", "cost", "expected"),
    [
        ((5.0, 4.0, 3.0), 4.0, "flops", 200.0),
        ((5.0, 4.0, 3.0), 3.25, "flops", 275.0),
        ((5.0, 4.0, 3.0), 3.25, "seconds", 27.5),
        ((5.0, 4.0, 3.0), 3.25, "tokens", 2.75),
        ((5.0, 4.0, 3.0), 2.9, "flops", None),
        ((5.0, 3.0, 4.0, 2.0), 3.5, "flops", 175.0),  # the first crossing, not the last
        ((5.0, 4.0), 6.0, "flops", 100.0),  # below from the start: never less than was measured
        ((5.0, math.nan, 3.0), 4.0, "flops", 200.0),
        ((3.0, 3.0), 3.0, "flops", 100.0),
        ((), 3.0, "flops", None),
    ],
)
def test_cost_to_reach_a_loss(losses: tuple[float, ...], loss: float, cost: Cost, expected: float | None) -> None:
    assert cost_to_reach(line(*losses), loss, cost) == expected


@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=8), st.floats(1.0, 9.0), st.floats(0.0, 2.0))
def test_a_lower_loss_never_costs_less(losses: list[float], loss: float, more: float) -> None:
    easy, hard = (cost_to_reach(line(*losses), target, "flops") for target in (loss + more, loss))
    assert hard is None or (easy is not None and easy <= hard)


def test_ratios_divide_the_costs_of_equal_loss() -> None:
    report = demo_report()
    arms = {a.name: a for a in report.arms}
    assert tuple(r.name for r in report.ratios) == NAMES
    for ratio in report.ratios:
        dense = arms[ratio.name[-2:].upper()]
        assert ratio.loss == dense.final_validation_loss
        assert ratio.value is not None and ratio.denominator_cost is not None
        assert ratio.value == pytest.approx(ratio.numerator_cost / ratio.denominator_cost)
        assert f"{ratio.loss:.3f}" in ratio.sentence
    assert report.ratios[0].numerator_cost == pytest.approx(arms["D0"].flops)


def test_an_arm_against_itself_has_ratio_one() -> None:
    twins = [
        replace(arm("D2", floor=3.0, gain=2.0, tokens=10**7, flops=1e15, seconds=9e3), name=n)
        for n in ("D0", "D2", "N1")
    ]
    assert [r.value for r in ratios(twins)] == [1.0] * 4


def test_dearer_is_said_to_be_dearer() -> None:
    arms = demo_report().arms
    slow = replace(arms[2], curve=[replace(p, seconds=20 * p.seconds) for p in arms[2].curve])
    time = next(r for r in ratios([*arms[:2], slow]) if r.name == "time_vs_d2")
    assert time.value is not None and time.value < 1.0
    assert "cost more, not less" in time.sentence
    assert headline(time)[1] == "more time than D2"


@pytest.mark.parametrize("missing", ["D0", "D2", "N1"])
def test_no_ratio_without_all_three_arms(missing: str) -> None:
    arms = demo_report().arms
    with pytest.raises(ValueError, match=f"{missing} has none"):
        ratios([a for a in arms if a.name != missing])
    with pytest.raises(ValueError, match=f"{missing} has none"):
        ratios([replace(a, curve=a.curve[:1]) if a.name == missing else a for a in arms])


def test_the_json_holds_flat_ratios_and_all_that_is_drawn(tmp_path: Path) -> None:
    report = demo_report()
    write_report(report, tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["ratios"] == {r.name: r.value for r in report.ratios}
    assert set(values["ratio_sentences"]) == set(NAMES)
    assert values["arms"][2]["curve"][-1]["validation_loss"] == report.arms[2].final_validation_loss
    assert len(values["arms"][2]["router_load"]) == 8
    assert values["caveats"] == report.caveats


def test_a_loss_never_reached_is_null_and_said(tmp_path: Path) -> None:
    report = demo_report(new_floor=3.6)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["ratios"] == dict.fromkeys(NAMES)
    page = (tmp_path / "report.html").read_text()
    assert page.count(">not reached<") == 4
    assert "no saving to report" in page


class Page(HTMLParser):
    """Reads a page, collects its tags, links and text, and checks that tags are nested."""

    VOID = ("meta", "rect", "line", "polyline", "circle")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_stands_alone_and_no_text_becomes_markup(tmp_path: Path) -> None:
    report = demo_report()
    write_report(report, tmp_path)
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert not page.open and not page.links
    assert "script" not in page.tags and "b" in page.tags
    assert "<script>alert(1)</script>" in page.words
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    for ratio in report.ratios:
        assert ratio.sentence in page.words


def test_the_page_names_d2_wherever_it_names_a_ratio_to_d0(tmp_path: Path) -> None:
    write_report(demo_report(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    pairs = re.findall(r'<div class="pair">(.*?)</p>\s*</div>', page, re.S)
    assert len(pairs) == 2
    assert all("than D0" in pair and "than D2" in pair for pair in pairs)


def test_a_report_of_dense_arms_that_wrote_nothing_is_drawn_too(tmp_path: Path) -> None:
    report = demo_report()
    bare = [replace(a, samples=[], router_load=[], train_curve=[]) for a in report.arms]
    extra = replace(bare[2], name="N0", title="hybrid, dense feed-forward")
    write_report(replace(report, arms=[*bare, extra], caveats=[]), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "What they write" not in page and "Who does the work" not in page and "N0" in page


def test_the_terminal_gets_the_arms_and_every_ratio_with_its_sentence() -> None:
    report = demo_report()
    console = Console(file=io.StringIO(), width=400, record=True, _environ={})
    print_summary(report, console)
    text = console.export_text()
    for ratio in report.ratios:
        number, words = headline(ratio)
        assert f"{number}  {words}" in text and ratio.sentence in text


@given(st.floats(1e-3, 1e6), st.floats(1.3, 1e5))
def test_ticks_lie_inside_and_suffice(low: float, factor: float) -> None:
    for ticks in (log_ticks(low, low * factor), linear_ticks(low, low * factor)):
        assert 1 <= len(ticks) <= 12
        assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)


@given(st.floats(1e-3, 64.0), st.floats(1.0, 4.0))
def test_busier_experts_are_never_lighter(load: float, factor: float) -> None:
    darkness = [float(shade(x).split('"')[1]) for x in (load, load * factor)]
    assert darkness[0] <= darkness[1] <= 1.0
    assert shade(0.0) == 'class="dead"'
