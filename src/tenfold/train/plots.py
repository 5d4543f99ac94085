"""Pictures of a finished training, drawn from its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenfold.train.metrics import METRICS, Metrics, StepMetrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, INK, MUTED, GRID, WARNING = "#0b6e99", "#22262b", "#8a929b", "#e4e7ea", "#b3261e"
SIZE = (7.2, 4.0)  # inches
DPI = 160
SMOOTHING = 0.02  # of a run's steps go into each point of a smoothed curve
LARGEST_RATIO = 8.0  # of the colour scale of router loads
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def write_plots(run: Path) -> list[Path]:
    """Draws `loss.png`, `throughput.png`, `optimizer.png` and, if sparse, `router.png` into `run`.

    Returns the files written; none where no step was recorded. Raises OSError where `metrics.jsonl` can't be
    read, and ValueError where it is damaged.
    """
    from matplotlib import rc_context

    metrics = read_metrics(run / METRICS)
    if not metrics.steps:
        return []
    figures = {
        "loss.png": loss_figure,
        "throughput.png": throughput_figure,
        "optimizer.png": optimizer_figure,
    }
    if metrics.steps[-1].load_ratio:
        figures["router.png"] = router_figure
    with rc_context(STYLE):
        for name, draw in figures.items():
            draw(metrics).savefig(run / name, dpi=DPI)
    return [run / name for name in figures]


def loss_figure(metrics: Metrics) -> Figure:
    """Training loss, each step and smoothed, and validation loss, over tokens."""
    figure, (axes,) = _figure(1)
    steps = [m for m in metrics.steps if not m.skipped]
    tokens, loss = _column(steps, "tokens"), _column(steps, "loss")
    axes.plot(tokens, loss, color=GRID, linewidth=0.8)
    axes.plot(tokens, smooth(loss), color=MUTED, label="training, smoothed")
    if metrics.validations:
        x = [v.tokens for v in metrics.validations]
        y = [v.loss for v in metrics.validations]
        axes.plot(x, y, color=ACCENT, marker="o", markersize=4, label="validation")
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), (0, 8), textcoords="offset points", ha="right", color=ACCENT)
    axes.set_ylim(*_loss_limits(loss))
    _label(axes, "Loss", "nats per token")
    axes.legend(loc="upper right")
    _tokens_axis(axes)
    return figure


def throughput_figure(metrics: Metrics) -> Figure:
    """Tokens per second, and share of the matmul peak where it is known, else FLOP/s."""
    steps = metrics.steps
    figure, (upper, lower) = _figure(2)
    tokens = _column(steps, "tokens")
    rate = _column(steps, "tokens_per_second")
    upper.plot(tokens, rate, color=GRID, linewidth=0.8)
    upper.plot(tokens, smooth(rate), color=ACCENT)
    _label(upper, "Throughput", "tokens/s")
    if all(m.utilisation is not None for m in steps):
        used, title, unit = 100 * _column(steps, "utilisation"), "Share of the measured matmul peak", "%"
    else:
        used, title, unit = _column(steps, "flops_per_second") / 1e9, "Arithmetic", "GFLOP/s"
    lower.plot(tokens, smooth(used), color=ACCENT)
    _label(lower, title, unit)
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    _tokens_axis(lower)
    return figure


def optimizer_figure(metrics: Metrics) -> Figure:
    """Learning rate and gradient norm, with skipped steps marked."""
    from matplotlib.ticker import LogLocator, NullLocator

    steps = metrics.steps
    figure, (upper, lower) = _figure(2)
    tokens, norm = _column(steps, "tokens"), _column(steps, "grad_norm")
    upper.plot(tokens, _column(steps, "lr"), color=ACCENT)
    upper.set_ylim(bottom=0)
    _label(upper, "Learning rate", "of the matrices")
    lower.plot(tokens, norm, color=GRID, linewidth=0.8)
    lower.plot(tokens, smooth(norm), color=ACCENT)
    if np.nanmax(norm, initial=0.0) > 0.0:
        lower.set_yscale("log")
        lower.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_locator(NullLocator())
    for number, m in enumerate(m for m in steps if m.skipped):
        lower.axvline(m.tokens, color=WARNING, linewidth=1, label="skipped step" if number == 0 else None)
    if any(m.skipped for m in steps):
        lower.legend()
    _label(lower, "Gradient norm before clipping", "L2")
    _tokens_axis(lower)
    return figure


def router_figure(metrics: Metrics) -> Figure:
    """Router health of every layer over the run: busiest expert over the mean, and share of dead experts."""
    from matplotlib.colors import LogNorm

    figure, (upper, lower) = _figure(2, height=5.2)
    sparse = [m for m in metrics.steps if m.load_ratio]
    tokens = _column(sparse, "tokens")
    ratios = _binned(np.array([m.load_ratio for m in sparse]))
    span = (float(tokens[0]), float(max(tokens[-1], tokens[0] + 1)), ratios.shape[1] - 0.5, -0.5)
    norm = LogNorm(1.0, LARGEST_RATIO)
    image = upper.imshow(ratios.T, aspect="auto", extent=span, cmap="Blues", norm=norm, interpolation="nearest")
    upper.grid(visible=False)
    bar = figure.colorbar(image, ax=upper, pad=0.02, ticks=[1, 2, 4, 8], format="{x:g}x")
    bar.minorticks_off()
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    _label(upper, "Load of the busiest expert over the mean", "layer")
    dead = 100 * np.array([max(m.dead_share) for m in sparse])
    lower.plot(tokens, smooth(dead), color=ACCENT)
    lower.set_ylim(0, max(5.0, 1.1 * float(dead.max())))
    _label(lower, "Experts that no token chose in a step, worst layer", "%")
    _tokens_axis(lower)
    return figure


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a centred window, `SMOOTHING` of all values `[N]`, narrower at the ends; NaN are left out."""
    half = max(1, round(SMOOTHING * len(values))) // 2
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    reach = np.clip(np.minimum(at, at[::-1]), half // 3, half)
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _figure(rows: int, height: float | None = None) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    figure = Figure(figsize=(SIZE[0], height or (SIZE[1] if rows == 1 else 4.8)), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)


def _tokens_axis(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _column(steps: Sequence[StepMetrics], name: str) -> NDArray[np.float64]:
    return np.array([getattr(m, name) for m in steps], dtype=np.float64)


def _loss_limits(loss: NDArray[np.float64]) -> tuple[float, float]:
    """All but the first steep twentieth of the run, with some air."""
    known = loss[np.isfinite(loss)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known[len(known) // 20 :].max())
    air = 0.08 * (high - low) or 0.1
    return low - air, high + air


def _binned(rows: NDArray[np.float64], most: int = 400) -> NDArray[np.float64]:
    """Rows `[N, L]` averaged to at most `most` rows, so that the picture hides no step."""
    edges = np.linspace(0, len(rows), min(most, len(rows)) + 1).astype(int)
    return np.stack([rows[a:b].mean(0) for a, b in pairwise(edges)])
