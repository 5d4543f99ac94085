"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tenfold.study.charts import curve_chart, layer_strip, shade
from tenfold.study.report import (
    CONTROL,
    NEW,
    OLD,
    TIMES,
    ArmReport,
    Cost,
    DemoReport,
    headline,
    summary_rows,
    times,
)
from tenfold.train.display import quantity

TEMPLATE = "report.html.jinja"
CHARTS: tuple[tuple[Cost, str], ...] = (
    ("flops", "Loss over compute"),
    ("seconds", "Loss over time"),
    ("tokens", "Loss over tokens"),
)
LEGEND_LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)


def render_page(report: DemoReport) -> str:
    """The whole page; all text from the report is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("tenfold.study").joinpath(TEMPLATE).read_text(encoding="utf-8")
    by_name = {arm.name: arm for arm in report.arms}
    return environment.from_string(source).render(
        report=report,
        ratios={ratio.name: ratio for ratio in report.ratios},
        headline=headline,
        costs=("flops", "time"),
        old=by_name[OLD],
        control=by_name[CONTROL],
        new=by_name[NEW],
        roles={OLD: "old", CONTROL: "control", NEW: "new"},
        charts=[(title, Markup(curve_chart(report.arms, cost))) for cost, title in CHARTS],
        rows=summary_rows(report.arms),
        samples=sample_rows(report.arms),
        routers=[(arm, router_rows(arm)) for arm in report.arms if arm.router_load],
        legend=[(f"{load:g}{TIMES}", Markup(shade(load))) for load in LEGEND_LOADS],
        held_fixed=held_fixed(report),
        standing=standing_caveats(report, by_name[NEW]),
    )


def sample_rows(arms: Sequence[ArmReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts in the order they were first given, each with what every arm that got it wrote: (arm, text)."""
    prompts = dict.fromkeys(sample.prompt for arm in arms for sample in arm.samples)
    return [
        (prompt, [(arm.name, s.text) for arm in arms for s in arm.samples if s.prompt == prompt]) for prompt in prompts
    ]


def router_rows(arm: ArmReport) -> list[tuple[Markup, str, str]]:
    """For every layer: its drawing, the load of the busiest expert over an even one, and the dead experts."""
    rows = []
    for shares in arm.router_load:
        dead = sum(share <= 0.0 for share in shares)
        worst = times(max(shares) * len(shares))
        rows.append((Markup(layer_strip(shares)), worst, f"{dead} dead" if dead else ""))
    return rows


def held_fixed(report: DemoReport) -> list[tuple[str, str]]:
    """What was the same for all arms."""
    return [
        ("machine", report.machine),
        ("threads", str(report.threads)),
        ("matmul peak", f"{report.matmul_peak_gflops:,.0f} GFLOP/s, measured"),
        ("corpus", f"{report.corpus}, in the same order"),
        ("tokenizer", f"{report.tokenizer_vocab:,} tokens"),
        ("validation set", f"{report.validation_tokens:,} tokens"),
        ("sequence length", f"{report.sequence_length:,} tokens"),
        ("precision", report.precision),
        ("seed", str(report.seed)),
        ("software", f"tenfold {report.tenfold_version}, torch {report.torch_version}"),
    ]


def standing_caveats(report: DemoReport, new: ArmReport) -> list[str]:
    """What is true of every such comparison, and has to be said."""
    largest = max(arm.parameters_total for arm in report.arms if arm.name in (OLD, CONTROL))
    return [
        f"One training of each arm, seed {report.seed}, one corpus, one machine: a few per cent may be luck.",
        "At other sizes and budgets the ratios are others. Nothing here is extrapolated.",
        f"The ratio to {OLD} mixes many causes; only the one to {CONTROL} is about the architecture.",
        f"{new.name} is cheaper to train, not smaller: {quantity(new.parameters_total).strip()} parameters, "
        f"against {quantity(largest).strip()} in the larger dense arm.",
        "Where a loss was crossed between two validations, the cost is interpolated in a straight line.",
        "FLOPs count matrix products, attention, recurrence, router, head and optimizer; not norms, "
        "activations and memory traffic. Only time sees those.",
        "Equal loss is not equal ability at every task.",
    ]
