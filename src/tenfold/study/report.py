"""The demo's result: what every arm cost, what the ratios between them say, and what they don't.

A ratio is the cost at which a dense arm reached its final loss, over the cost at which the new arm first
reached that same loss. It stands for this machine, this corpus and this budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tenfold.train.display import duration, quantity
from tenfold.train.metrics import strict_json

if TYPE_CHECKING:
    from rich.console import Console

Cost = Literal["flops", "seconds", "tokens"]
COSTS: tuple[Cost, Cost] = ("flops", "seconds")  # that have ratios
OLD, CONTROL, NEW = "D0", "D2", "N1"
TIMES = "\N{MULTIPLICATION SIGN}"
MEANING = {
    "flops_vs_d0": "D0 is the old way in everything (dense, AdamW, cosine, many tokens per parameter), so "
    "this counts architecture, optimizer, schedule and the end of over-training together.",
    "time_vs_d0": "All that separates D0 from N1 is in this number, and how well each uses the machine.",
    "flops_vs_d2": "D2 is dense and has N1's optimizer, schedule and recipe: this is the architecture alone.",
    "time_vs_d2": "This is the architecture alone, as fast as this machine runs it.",
}


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A validation: loss in nats per token, and what had been spent on training by then."""

    tokens: int
    flops: float  # the optimizer's included
    seconds: float  # in steps: without validation, checkpoints and start
    validation_loss: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that a trained arm wrote after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One trained model: what it is, what it cost, what came out."""

    name: str  # D0, D2, N0, N1, N2
    title: str
    description: str
    optimizer: str
    schedule: str
    learning_rate: float
    parameters_total: int
    parameters_active: int  # that one token's forward pass uses
    tokens: int
    flops: float  # of the whole training, the optimizer's included
    optimizer_flops: float  # the part of `flops` that is the optimizer's
    seconds_steps: float
    seconds_total: float
    tokens_per_second: float
    gflops_per_second: float
    utilisation: float  # gflops_per_second over the measured matmul peak, 0..1
    peak_memory_gb: float
    final_validation_loss: float
    curve: list[CurvePoint]
    train_curve: list[tuple[int, float]]  # tokens, loss of the step
    samples: list[Sample]
    router_load: list[list[float]]  # per layer, each expert's share of the tokens' choices; empty if dense
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times less the new arm cost to reach a dense arm's final loss."""

    name: str  # flops_vs_d0, time_vs_d0, flops_vs_d2, time_vs_d2
    value: float | None  # None where the new arm never got there
    numerator_cost: float  # of the dense arm, in FLOPs or seconds
    denominator_cost: float | None  # of the new arm
    loss: float  # the dense arm's final validation loss
    sentence: str


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything that the report shows; `ratios` comes from the function of that name."""

    tenfold_version: str
    torch_version: str
    date: str  # ISO 8601
    machine: str
    threads: int
    matmul_peak_gflops: float  # measured on this machine with these threads
    precision: str
    seed: int
    corpus: str
    tokenizer_vocab: int
    sequence_length: int
    validation_tokens: int
    arms: list[ArmReport]
    ratios: list[Ratio]
    caveats: list[str]  # beyond what the report always says


def cost_to_reach(curve: Sequence[CurvePoint], loss: float, cost: Cost) -> float | None:
    """Cost at which a validation curve first came down to `loss`; None where it never did.

    Between two validations the cost is linear in the loss. A curve that begins below is charged its first
    point, so never less than was measured. Points whose loss is not finite are passed over.
    """
    known = [p for p in curve if math.isfinite(p.validation_loss)]
    if known and known[0].validation_loss <= loss:
        return float(getattr(known[0], cost))
    for before, after in pairwise(known):
        if after.validation_loss <= loss:
            share = (before.validation_loss - loss) / (before.validation_loss - after.validation_loss)
            begin, end = float(getattr(before, cost)), float(getattr(after, cost))
            return begin + share * (end - begin)
    return None


def ratios(arms: Sequence[ArmReport]) -> list[Ratio]:
    """FLOPs and time of D0 and D2 over those of N1 at equal loss.

    Raises ValueError where one of the three arms, or its validation curve, is missing.
    """
    by_name = {arm.name: arm for arm in arms}
    for name in (OLD, CONTROL, NEW):
        if name not in by_name or not trained(by_name[name].curve):
            needed = f"{OLD}, {CONTROL} and {NEW}"
            raise ValueError(f"the ratios need validations of {needed}; {name} has none: train it as well")
    return [_ratio(by_name[dense], by_name[NEW], cost) for dense in (OLD, CONTROL) for cost in COSTS]


def trained(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points after training began, which have a cost and a place on a logarithmic axis."""
    return [p for p in curve if p.tokens > 0 and math.isfinite(p.validation_loss)]


def write_report(report: DemoReport, folder: Path) -> None:
    """Writes `report.json` and the self-contained `report.html`. Raises OSError where it can't."""
    from tenfold.study.page import render_page

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(strict_json(as_json(report), indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_page(report), encoding="utf-8")


def as_json(report: DemoReport) -> dict[str, object]:
    """The report with `ratios` as a flat object of numbers; null there means that N1 never got there."""
    values = asdict(report)
    return values | {
        "ratios": {r.name: r.value for r in report.ratios},
        "ratio_sentences": {r.name: r.sentence for r in report.ratios},
        "ratio_details": values["ratios"],
    }


def print_summary(report: DemoReport, console: Console) -> None:
    """The report in a terminal: a table of the arms, and every ratio with what it says."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for arm in report.arms:
        table.add_column(arm.name, justify="right")
    for label, *cells in summary_rows(report.arms):
        table.add_row(Text(label, "dim"), *cells)
    console.print(table)
    for ratio in report.ratios:
        number, words = headline(ratio)
        console.print()
        console.print(Text.assemble((f"{number}  ", "bold cyan"), (words, "bold")))
        console.print(Text(ratio.sentence, "dim"))


def summary_rows(arms: Sequence[ArmReport]) -> list[tuple[str, ...]]:
    """A row for each number, with its label first and then a cell for each arm."""
    return [
        ("validation loss, nats per token", *(f"{a.final_validation_loss:.4f}" for a in arms)),
        ("parameters, total", *(quantity(a.parameters_total) for a in arms)),
        ("parameters, active", *(quantity(a.parameters_active) for a in arms)),
        ("tokens", *(quantity(a.tokens) for a in arms)),
        ("training compute", *(quantity(a.flops) + "FLOP" for a in arms)),
        ("of this the optimizer's", *(f"{a.optimizer_flops / a.flops:.1%}" for a in arms)),
        ("time of the steps", *(duration(a.seconds_steps) for a in arms)),
        ("time end to end", *(duration(a.seconds_total) for a in arms)),
        ("tokens/s", *(f"{a.tokens_per_second:,.0f}" for a in arms)),
        ("GFLOP/s", *(f"{a.gflops_per_second:,.1f}" for a in arms)),
        ("share of the matmul peak", *(f"{a.utilisation:.0%}" for a in arms)),
        ("peak memory", *(f"{a.peak_memory_gb:.2f} GB" for a in arms)),
        ("optimizer", *(a.optimizer for a in arms)),
        ("schedule", *(a.schedule for a in arms)),
        ("peak learning rate", *(f"{a.learning_rate:g}" for a in arms)),
    ]


def headline(ratio: Ratio) -> tuple[str, str]:
    """A ratio as a number and the words beside it: `9.3x` (with a proper sign), `fewer FLOPs than D0`."""
    cost, dense = ratio.name.split("_vs_")
    unit, fewer = ("FLOPs", "fewer") if cost == "flops" else ("time", "less")
    if ratio.value is None:
        return "not reached", f"{unit} against {dense.upper()}"
    if ratio.value < 1.0:
        return times(1.0 / ratio.value), f"more {unit} than {dense.upper()}"
    return times(ratio.value), f"{fewer} {unit} than {dense.upper()}"


def times(value: float) -> str:
    """A factor with about two digits that matter."""
    digits = 2 if value < 2.0 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{TIMES}"


def cost_text(value: float, cost: Cost) -> str:
    """A cost with its unit."""
    return {
        "flops": f"{quantity(value)}FLOP",
        "seconds": duration(value),
        "tokens": f"{quantity(value)}tokens",
    }[cost]


def _ratio(dense: ArmReport, new: ArmReport, cost: Cost) -> Ratio:
    dense_curve, new_curve = trained(dense.curve), trained(new.curve)
    loss = dense_curve[-1].validation_loss
    spent, needed = cost_to_reach(dense_curve, loss, cost), cost_to_reach(new_curve, loss, cost)
    assert spent is not None, "a curve reaches its own last loss"
    name = f"{'flops' if cost == 'flops' else 'time'}_vs_{dense.name.lower()}"
    return Ratio(
        name=name,
        value=None if needed is None else spent / needed,
        numerator_cost=spent,
        denominator_cost=needed,
        loss=loss,
        sentence=_sentence(name, dense, new, cost, loss, spent, needed),
    )


def _sentence(
    name: str, dense: ArmReport, new: ArmReport, cost: Cost, loss: float, spent: float, needed: float | None
) -> str:
    if needed is None:
        reached = min(p.validation_loss for p in trained(new.curve))
        return (
            f"{new.name} came to {reached:.3f} and never to the {loss:.3f} that {dense.name} reached for "
            f"{cost_text(spent, cost)}: within this budget there is no saving to report."
        )
    more = "" if needed <= spent else ", so it cost more, not less"
    told = (
        f"{dense.name} spent {cost_text(spent, cost)} to end at a loss of {loss:.3f}; {new.name} first "
        f"reached it after {cost_text(needed, cost)}{more}."
    )
    if cost == "seconds":
        used = f"{dense.name} ran at {dense.utilisation:.0%} of the matmul peak, {new.name} at"
        told = f"{told} {used} {new.utilisation:.0%}."
    return f"{told} {MEANING[name]}"
