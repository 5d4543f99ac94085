"""What quantizing a model saved, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenfold.models.divergence import Divergence, LayerError

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """Bytes are those of weights. `divergence` and `layers` are empty where there was no text to measure on."""

    source: str
    format: str
    parameters: int
    source_bytes: int
    packed_bytes: int
    bytes_by_format: dict[str, int]
    calibration: str | None
    calibration_tokens: int
    test: str | None
    divergence: Divergence | None
    layers: tuple[LayerError, ...]
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.packed_bytes / self.parameters

    def tables(self) -> Group:
        """For a terminal."""
        from rich.console import Group
        from rich.table import Table

        summary = Table(title=f"{self.source} as {self.format}", show_header=False)
        for row in _rows(self):
            summary.add_row(*row)
        if not self.layers:
            return Group(summary)
        layers = Table("layer", "mixer", "own", "with those before", title="relative errors of layers")
        for layer in self.layers:
            layers.add_row(str(layer.layer), layer.mixer, f"{layer.own:.2%}", f"{layer.total:.2%}")
        return Group(summary, layers)


def _rows(report: QuantizeReport) -> list[tuple[str, str]]:
    by_format = ", ".join(f"{_size(count)} {name}" for name, count in report.bytes_by_format.items())
    rows = [
        ("before", _size(report.source_bytes)),
        ("after", f"{_size(report.packed_bytes)}: {by_format}"),
        ("bits per weight", f"{report.bits_per_weight:.2f}, scales included"),
    ]
    if report.calibration:
        rows.append(("errors weighed by", f"{report.calibration_tokens:,} tokens of {report.calibration}"))
    if found := report.divergence:
        change = found.packed_perplexity / found.perplexity - 1
        rows += [
            ("measured on", f"{found.tokens:,} tokens of {report.test}"),
            ("KL divergence", f"{found.kl:.5f} nats per token"),
            ("perplexity", f"{found.perplexity:.4f} before, {found.packed_perplexity:.4f} after, {change:+.2%}"),
            ("same likeliest token", f"{found.same_top:.2%}"),
        ]
    return [*rows, ("time", f"{report.seconds:.0f} s")]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
