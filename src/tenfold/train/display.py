"""What a training looks like while it runs: a dashboard in a terminal, a plain line at times elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tenfold.train.metrics import StepMetrics, Validation

REFRESH = 0.25  # seconds between two drawings, at least
LARGEST_SHARE = 0.004  # of the time may go into drawing
PLAIN_INTERVAL = 10.0  # seconds between two lines without a terminal
CURVE_POINTS = 512  # of the loss kept for drawing; beyond that neighbours are averaged
CHART_ROWS = 4
ROUTER_COLUMNS = 29  # that the heading of its chart takes
CELLS_PER_ROW = 5
EARLY = 0.1  # share of the run whose loss may rise above the chart, so that the rest is seen better
SIDE_BY_SIDE = 72  # columns that two charts need
SAMPLE_LINES = 3
BLOCKS = " ▁▂▃▄▅▆▇█"
HEALTHY, UNEVEN = 2.0, 4.0  # load ratios up to which a router is balanced, and up to which it is tolerable


class TrainingDisplay:
    """Shows a run's progress. A context manager; every method is cheap enough to be called at every step.

    In a terminal it draws a dashboard, at most four times a second and so seldom that it takes less than
    0.5 % of the time. Elsewhere it prints the first step, the last, and a line every `interval` seconds.
    """

    def __init__(
        self,
        title: str,
        console: Console | None = None,
        interval: float = PLAIN_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.console = console or Console()
        self.interval = interval
        self._clock = clock
        self._next = -math.inf  # when to show again
        self._shown = -1  # step shown last
        self._latest: StepMetrics | None = None
        self._curve = Curve()
        self._validations: deque[Validation] = deque(maxlen=4)
        self._best = math.inf
        self._sample = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        plain = self.console.is_dumb_terminal or self.console.options.ascii_only
        if self.console.is_terminal and not plain:
            self._live = live = Live(console=self.console, auto_refresh=False)
            live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._latest is not None and self._latest.step != self._shown:
            self._show(self._latest)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: StepMetrics) -> None:
        """Takes a step's metrics, and shows them if it is time to."""
        self._latest = metrics
        if not metrics.skipped:
            self._curve.add(metrics.loss)
        if self._clock() >= self._next or metrics.step == metrics.steps_total:
            self._show(metrics)

    def validation(self, result: Validation) -> None:
        """Takes a validation loss."""
        self._validations.append(result)
        self._best = min(self._best, result.loss)
        if self._live is None:
            self._print(f"validation at step {result.step:,}: loss {result.loss:.4f}")

    def sample(self, text: str) -> None:
        """Takes text that the model wrote."""
        self._sample = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        if self._live is None:
            self._print(f"sample: {self._sample}")

    def message(self, text: str) -> None:
        """Prints a line that stays: above the dashboard, in a terminal."""
        self._print(text)

    def render(self) -> RenderableType:
        """The dashboard as it stands."""
        if (latest := self._latest) is None:
            return self._panel(Text("preparing", "dim"))
        space = Text()
        return self._panel(_progress(latest), space, self._charts(latest), space, _numbers(latest), self._footer())

    def _panel(self, *rows: RenderableType) -> Panel:
        title = Text(self.title, "bold not dim")
        width, padding = self._width(), (1, 2)
        return Panel(Group(*rows), title=title, title_align="left", border_style="dim", padding=padding, width=width)

    def _width(self) -> int:
        return min(self.console.width, 110)

    def _show(self, metrics: StepMetrics) -> None:
        begin = time.perf_counter()
        if self._live is None:
            self._print(plain_line(metrics))
            pause = self.interval
        else:
            self._live.update(self.render(), refresh=True)
            pause = max(REFRESH, (time.perf_counter() - begin) / LARGEST_SHARE)
        self._shown = metrics.step
        self._next = self._clock() + pause

    def _print(self, text: str) -> None:
        encoding = self.console.encoding  # a log's may not know the characters of a sample
        self.console.print(Text(text.encode(encoding, "replace").decode(encoding)), soft_wrap=True)

    def _charts(self, metrics: StepMetrics) -> RenderableType:
        inner = self._width() - 6
        columns = _layer_columns(metrics)
        wide = bool(metrics.load_ratio) and inner >= SIDE_BY_SIDE - 6
        loss_width = inner - max(columns, ROUTER_COLUMNS) - 4 if wide else inner
        loss = self._loss_chart(metrics, loss_width)
        if not metrics.load_ratio:
            return loss
        grid = Table.grid(padding=(0, 4, 0, 0))
        grid.add_row(loss, _router_chart(metrics))
        return grid if wide else Group(loss, Text(), _router_chart(metrics))

    def _loss_chart(self, metrics: StepMetrics, width: int) -> RenderableType:
        values = self._curve.resampled(width)
        latest = "step skipped" if metrics.skipped else f"{metrics.loss:.4f}"
        head = Text.assemble(("loss ", "dim"), (latest, "bold"))
        if not values:
            return head
        head.append(f"   from {values[0]:.2f}, lowest {min(values):.2f}", "dim")
        return Group(head, column_chart(curve_heights(values), ["cyan"] * len(values)))

    def _footer(self) -> RenderableType:
        rows: list[tuple[str, Text]] = []
        if self._validations:
            rows.append(("validation", self._validation_line()))
        if self._sample:
            limit = SAMPLE_LINES * (self._width() - 20)
            rows.append(("sample", Text(shorten(self._sample, limit), style="italic")))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        for name, value in rows:
            grid.add_row(name, value)
        return grid

    def _validation_line(self) -> Text:
        line = Text(no_wrap=True, overflow="crop")
        fitting = max(1, self._width() // 24)
        for result in list(reversed(self._validations))[:fitting]:
            style = "bold green" if result.loss == self._best else "" if not line else "dim"
            line.append("   " if line else "").append(f"{result.loss:.4f}", style)
            line.append(f" at {result.step:,}", "dim")
        return line


class Curve:
    """A series of any length in at most `CURVE_POINTS` means of equally many neighbours each."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._per_mean = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Appends a number; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._per_mean:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == CURVE_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def resampled(self, width: int) -> list[float]:
        """At most `width` numbers over the whole series."""
        if len(self._means) <= width:
            return list(self._means)
        edges = [i * len(self._means) // width for i in range(width + 1)]
        return [sum(self._means[a:b]) / (b - a) for a, b in pairwise(edges)]


def column_chart(heights: Sequence[float], styles: Sequence[str], rows: int = CHART_ROWS) -> Text:
    """Columns of heights 0..1, one cell wide, drawn in eighths of a line."""
    eighths = [round(min(max(height, 0.0), 1.0) * rows * 8) for height in heights]
    chart = Text(no_wrap=True)
    for row in reversed(range(rows)):
        for count, style in zip(eighths, styles, strict=True):
            chart.append(BLOCKS[min(max(count - row * 8, 0), 8)], style)
        chart.append("\n" if row else "")
    return chart


def curve_heights(values: Sequence[float]) -> list[float]:
    """Heights 0..1 of a falling curve; the lowest shows, and the steep beginning may leave the chart."""
    low, high = min(values), max(values[int(EARLY * len(values)) :])
    span = high - low or 1.0
    return [min(1.0, 0.1 + 0.9 * (value - low) / span) for value in values]


def plain_line(m: StepMetrics) -> str:
    """A step in one line, for logs."""
    parts = [
        f"step {m.step:,}/{m.steps_total:,}",
        f"{quantity(m.tokens)} tokens",
        "skipped, not finite" if m.skipped else f"loss {m.loss:.4f}",
        f"lr {m.lr:.2e}",
        f"grad {m.grad_norm:.2f}",
        f"{quantity(m.tokens_per_second)} tokens/s",
        f"{quantity(m.flops_per_second)}FLOP/s",
    ]
    if m.utilisation is not None:
        parts.append(f"{m.utilisation:.0%} of peak")
    if m.load_ratio:
        parts.append(f"router {max(m.load_ratio):.1f}x, dead {max(m.dead_share, default=0.0):.0%}")
    if m.seconds_left is not None:
        parts.append(f"{duration(m.seconds_left)} left")
    return " | ".join(parts)


def quantity(value: float) -> str:
    """A number in three digits with its SI prefix, such as `12.3 k`; what follows is the unit."""
    if not math.isfinite(value):
        return str(value)
    for exponent, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**exponent:
            return f"{value / 10**exponent:.3g} {prefix}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """A time as people say it: `45 s`, `3:07 min`, `2:15 h`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def shorten(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _progress(m: StepMetrics) -> RenderableType:
    left = f"{duration(m.seconds_left)} left" if m.seconds_left is not None else ""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    steps = Text.assemble((f"{m.step:,}", "bold"), (f" of {m.steps_total:,} steps", "dim"))
    bar = ProgressBar(m.steps_total, m.step, complete_style="cyan", finished_style="green")
    grid.add_row(bar, steps, Text(left or duration(m.seconds_elapsed), style="bold"))
    return grid


def _numbers(m: StepMetrics) -> RenderableType:
    cells = [("tokens", quantity(m.tokens)), ("tokens/s", quantity(m.tokens_per_second))]
    cells.append(("FLOP/s", quantity(m.flops_per_second)))
    if m.utilisation is not None:
        cells.append(("of peak", f"{m.utilisation:.0%}"))
    cells += [("lr", f"{m.lr:.2e}"), ("gradient", f"{m.grad_norm:.2f}")]
    if m.balance_loss is not None:
        cells.append(("balance", f"{m.balance_loss:.2f}"))
    if m.mtp_loss is not None:
        cells.append(("MTP loss", f"{m.mtp_loss:.3f}"))
    cells.append(("memory", f"{m.memory_gb:.1f} GB"))
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(CELLS_PER_ROW):
        grid.add_column(ratio=1)
    for begin in range(0, len(cells), CELLS_PER_ROW):
        row = cells[begin : begin + CELLS_PER_ROW]
        grid.add_row(*(Text.assemble((name + "\n", "dim"), value, "\n") for name, value in row))
    return grid


def _router_chart(m: StepMetrics) -> RenderableType:
    gap = [0.0] * (_layer_columns(m) // len(m.load_ratio) - 1)
    heights = [height for ratio in m.load_ratio for height in (ratio / UNEVEN, *gap)]
    layers = zip(m.load_ratio, m.dead_share, strict=True)
    styles = [style for ratio, dead in layers for style in (_health(ratio, dead), *("" for _ in gap))]
    worst, dead = max(m.load_ratio), max(m.dead_share)
    head = Text.assemble(("router load ", "dim"), (f"{worst:.1f}x", f"bold {_health(worst, 0.0)}"))
    head.append(f"  {dead:.0%} dead" if dead else "  none dead", "bold red" if dead else "dim")
    return Group(head, column_chart(heights, styles))


def _layer_columns(m: StepMetrics) -> int:
    """Cells that the router chart takes: a bar for each layer, and a gap where there is room."""
    return len(m.load_ratio) * (2 if len(m.load_ratio) <= 16 else 1)


def _health(ratio: float, dead: float) -> str:
    if dead > 0.0 or ratio > UNEVEN:
        return "red"
    return "green" if ratio <= HEALTHY else "yellow"
