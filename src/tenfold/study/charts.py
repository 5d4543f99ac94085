"""The report's drawings, as SVG; the page's style sheet colours them for light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tenfold.study.report import CONTROL, NEW, OLD, ArmReport, Cost, cost_to_reach, times, trained

WIDTH, HEIGHT = 360, 290
LEFT, RIGHT, TOP, BOTTOM = 34, 28, 12, 40
HIDDEN = 0.2  # share of the validations, the highest, that may leave the chart above
TRAIN_POINTS = 160
UNITS: dict[Cost, tuple[tuple[float, str], ...]] = {
    "flops": ((1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP"), (1e21, "ZFLOP")),
    "seconds": ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days")),
    "tokens": ((1.0, "tokens"), (1e3, "thousand tokens"), (1e6, "million tokens"), (1e9, "billion tokens")),
}
AXES: dict[Cost, str] = {"flops": "training compute", "seconds": "time of the steps", "tokens": "trained on"}


@dataclass(frozen=True)
class Scales:
    """From cost (logarithmic) and loss (linear) to a place in the chart."""

    low_cost: float
    high_cost: float
    low_loss: float
    high_loss: float

    def x(self, cost: float) -> float:
        """Horizontal place of a positive cost."""
        share = math.log(cost / self.low_cost) / math.log(self.high_cost / self.low_cost)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        """Vertical place of a loss."""
        share = (loss - self.low_loss) / (self.high_loss - self.low_loss)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curve_chart(arms: Sequence[ArmReport], cost: Cost) -> str:
    """Validation loss of every arm over a cost, and the dense arms' final losses where N1 crosses them."""
    scales = fit_scales(arms, cost)
    parts = [_axes(scales, cost), f'<g clip-path="url(#clip-{cost})">']
    if cost == "tokens":
        parts += [_train_line(arm, scales) for arm in arms]
    parts += [_line(arm, cost, scales) for arm in arms]
    parts.append("</g>")
    parts += _crossings(arms, cost, scales)
    parts += [_end(arm, cost, scales) for arm in arms]
    clip = f'<clipPath id="clip-{cost}"><rect x="{LEFT}" y="{TOP - 6}" width="{WIDTH - LEFT - RIGHT + 4}"'
    clip += f' height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>'
    label = f"Validation loss over {AXES[cost]}"
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"'
    return f'<svg class="chart" {view}>{clip}{"".join(parts)}</svg>'


def fit_scales(arms: Sequence[ArmReport], cost: Cost) -> Scales:
    """Axes that hold every trained point, but for the highest losses of the beginning."""
    points = [p for arm in arms for p in trained(arm.curve)]
    costs = [max(float(getattr(p, cost)), 1e-9) for p in points]
    losses = sorted(p.validation_loss for p in points)
    last = max(trained(arm.curve)[-1].validation_loss for arm in arms)
    low, high = losses[0], max(losses[int((1.0 - HIDDEN) * (len(losses) - 1))], last)
    air = 0.06 * (high - low) or 0.1
    return Scales(min(costs) / 1.05, max(costs) * 1.05, low - 2.5 * air, high + air)


def log_ticks(low: float, high: float) -> list[float]:
    """Three or more round numbers between two positive ones: powers of ten, or steps between them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks
    return linear_ticks(low, high, about=4)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round numbers between two."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1.0, 2.0, 2.5, 5.0, 10.0) if s * power >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def layer_strip(shares: Sequence[float]) -> str:
    """A layer's experts from the most to the least used, shaded by load relative to an even one."""
    cells = []
    for at, share in enumerate(sorted(shares, reverse=True)):
        cells.append(f'<rect x="{at}" width="1" height="1" {shade(share * len(shares))}/>')
    label = "share of the load of each expert, sorted"
    view = f'viewBox="0 0 {len(shares)} 1" preserveAspectRatio="none"'
    return f'<svg class="strip" {view} role="img" aria-label="{label}">{"".join(cells)}</svg>'


def shade(load: float) -> str:
    """SVG attributes for an expert's load, 1 if even: on a logarithmic scale from a quarter to fourfold."""
    if load <= 0.0:
        return 'class="dead"'
    opacity = 0.06 + 0.94 * min(max((math.log2(load) + 2.0) / 4.0, 0.0), 1.0)
    return f'fill-opacity="{opacity:.2f}"'


def _axes(scales: Scales, cost: Cost) -> str:
    factor, unit = _unit(cost, scales.high_cost)
    bottom = HEIGHT - BOTTOM
    parts = []
    for loss in linear_ticks(scales.low_loss, scales.high_loss):
        y = scales.y(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for tick in log_ticks(scales.low_cost / factor, scales.high_cost / factor):
        x = scales.x(tick * factor)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{AXES[cost]}, {unit}</text>')
    return "".join(parts)


def _unit(cost: Cost, highest: float) -> tuple[float, str]:
    """The largest unit of which the axis holds two or more, or the smallest."""
    fitting = [unit for unit in UNITS[cost] if highest >= 2.0 * unit[0]]
    return fitting[-1] if fitting else UNITS[cost][0]


def _line(arm: ArmReport, cost: Cost, scales: Scales) -> str:
    points = [(float(getattr(p, cost)), p.validation_loss) for p in trained(arm.curve)]
    return f'<polyline class="line {_role(arm)}" points="{_points(points, scales)}"/>'


def _train_line(arm: ArmReport, scales: Scales) -> str:
    points = [(t, loss) for t, loss in arm.train_curve if t >= scales.low_cost and math.isfinite(loss)]
    size = max(1, math.ceil(len(points) / TRAIN_POINTS))
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(t for t, _ in b) / len(b), sum(loss for _, loss in b) / len(b)) for b in blocks]
    return f'<polyline class="train {_role(arm)}" points="{_points(means, scales)}"/>'


def _points(points: Sequence[tuple[float, float]], scales: Scales) -> str:
    return " ".join(f"{scales.x(max(cost, scales.low_cost)):.1f},{scales.y(loss):.1f}" for cost, loss in points)


def _end(arm: ArmReport, cost: Cost, scales: Scales) -> str:
    last = trained(arm.curve)[-1]
    x, y = scales.x(max(float(getattr(last, cost)), scales.low_cost)), scales.y(last.validation_loss)
    dot = f'<circle class="end {_role(arm)}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    below = arm.name == NEW  # a dense arm's end has its bridge on the left
    dx, dy, anchor = (0.0, 17.0, "middle") if below else (8.0, 4.0, "start")
    place = f'x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}"'
    return f'{dot}<text class="name {_role(arm)}" {place}>{escape(arm.name)}</text>'


def _crossings(arms: Sequence[ArmReport], cost: Cost, scales: Scales) -> list[str]:
    by_name = {arm.name: arm for arm in arms}
    parts = []
    for name in (OLD, CONTROL):
        dense, new = trained(by_name[name].curve), trained(by_name[NEW].curve)
        loss = dense[-1].validation_loss
        spent, needed = cost_to_reach(dense, loss, cost), cost_to_reach(new, loss, cost)
        if spent is None or needed is None:
            continue
        begin, end, y = scales.x(needed), scales.x(spent), scales.y(loss)
        parts.append(f'<line class="bridge" x1="{begin:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle class="crossing" cx="{begin:.1f}" cy="{y:.1f}" r="4"/>')
        place = f'x="{begin + 7:.1f}" y="{y - 5:.1f}"'
        parts.append(f'<text class="gain" {place}>{times(spent / needed)}</text>')
    return parts


def _role(arm: ArmReport) -> str:
    return {OLD: "old", CONTROL: "control", NEW: "new"}.get(arm.name, "other")
