"""What a training shows: records survive any kill, the display is cheap and right, pictures get drawn."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tenfold.train.display import (
    CURVE_POINTS,
    LARGEST_SHARE,
    Curve,
    TrainingDisplay,
    column_chart,
    duration,
    quantity,
)
from tenfold.train.metrics import (
    METRICS,
    Event,
    MetricsLog,
    Record,
    Sample,
    StepMetrics,
    Validation,
    decode,
    encode,
    read_metrics,
)
from tenfold.train.plots import smooth, write_plots

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RECORDS = st.one_of(
    st.builds(Validation, step=st.integers(0), tokens=st.integers(0), loss=FINITE, flops=FINITE, seconds=FINITE),
    st.builds(Sample, step=st.integers(0), prompt=TEXT, text=TEXT),
    st.builds(Event, step=st.integers(0), message=TEXT),
    st.builds(
        StepMetrics,
        step=st.integers(0),
        steps_total=st.integers(1),
        tokens=st.integers(0),
        loss=FINITE,
        lr=FINITE,
        grad_norm=FINITE,
        tokens_per_second=FINITE,
        flops_per_second=FINITE,
        seconds_elapsed=FINITE,
        load_ratio=st.lists(FINITE, max_size=3).map(tuple),
    ),
)


def step(number: int, *, total: int = 40, layers: int = 4, skipped: bool = False) -> StepMetrics:
    """A step of a run whose loss falls."""
    return StepMetrics(
        step=number,
        steps_total=total,
        tokens=number * 4096,
        loss=math.nan if skipped else 3.0 + 6.0 * math.exp(-number / 10),
        lr=0.02,
        grad_norm=math.inf if skipped else 0.8,
        tokens_per_second=12_345.0,
        flops_per_second=34.1e9,
        utilisation=0.41,
        seconds_elapsed=number * 1.5,
        seconds_left=(total - number) * 1.5,
        balance_loss=1.02 if layers else None,
        load_ratio=tuple(1.5 + layer for layer in range(layers)),
        dead_share=(0.0,) * layers,
        skipped=skipped,
        memory_gb=2.3,
    )


def validation(number: int) -> Validation:
    """A validation at a step."""
    return Validation(step=number, tokens=number * 4096, loss=3.5, flops=1e12, seconds=60.0)


def write(path: Path, records: list[Record]) -> None:
    """A new log of these records."""
    with MetricsLog(path) as log:
        for record in records:
            log.write(record)


@given(RECORDS)
def test_a_record_is_one_line_and_comes_back(record: Record) -> None:
    line = encode(record)
    assert "\n" not in line
    assert decode(line) == record


def test_numbers_that_are_not_finite_are_null_and_come_back_as_nan() -> None:
    line = encode(step(3, skipped=True))
    assert '"loss": null' in line
    record = decode(line)
    assert isinstance(record, StepMetrics) and math.isnan(record.loss) and record.skipped


@given(cut=st.integers(1))
def test_a_log_cut_anywhere_by_a_kill_keeps_every_whole_line(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / METRICS
    write(path, [step(i) for i in range(1, 6)])
    data = path.read_bytes()
    kept = data[: len(data) - cut % len(data)]
    path.write_bytes(kept)
    assert len(read_metrics(path).steps) == kept.count(b"\n")
    with MetricsLog(path, resume_step=5) as log:
        log.write(Event(step=5, message="resumed"))
    assert len(read_metrics(path).steps) == kept.count(b"\n")
    assert len(read_metrics(path).events) == 1


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    write(path, [step(1), step(2), validation(2), step(3), validation(3)])
    with MetricsLog(path, resume_step=2) as log:
        log.write(step(3))
    metrics = read_metrics(path)
    assert [m.step for m in metrics.steps] == [1, 2, 3]
    assert [v.step for v in metrics.validations] == [2]
    MetricsLog(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"kind": "other"}', '{"kind": "event", "step": 1}', "\x00"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(encode(step(1)) + "\n" + line + "\n" + encode(step(2)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no metrics record .*delete that line"):
        read_metrics(path)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_plain(steps: int, seconds_per_step: float, encoding: str = "utf-8") -> str:
    """Output of a run without a terminal."""
    raw, clock = io.BytesIO(), Clock()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, force_terminal=False, width=40)
    with TrainingDisplay("run", console, interval=10.0, clock=clock) as display:
        for number in range(1, steps + 1):
            display.update(step(number, total=steps))
            clock.now += seconds_per_step
        display.validation(validation(steps))
        display.sample("naïve\n text \x1b[31m")
        display.message("done")
    file.flush()
    return raw.getvalue().decode(encoding)


def test_without_a_terminal_a_plain_line_appears_every_interval_and_at_both_ends() -> None:
    lines = run_plain(steps=45, seconds_per_step=1.0).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        f"{n}/45" for n in (1, 11, 21, 31, 41, 45)
    ]
    assert "loss 3.0" in lines[-4] and "12.3 k tokens/s" in lines[-4] and "41% of peak" in lines[-4]
    assert lines[-3:] == ["validation at step 45: loss 3.5000", "sample: naïve text [31m", "done"]


def test_a_log_that_knows_only_ascii_does_not_break_the_run() -> None:
    assert "sample: na?ve text" in run_plain(steps=2, seconds_per_step=1.0, encoding="ascii")


def terminal(width: int) -> Console:
    """A terminal."""
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=60, _environ={})


def shown(display: TrainingDisplay) -> str:
    """The dashboard as text."""
    page = Console(file=io.StringIO(), width=display.console.width, record=True, _environ={})
    page.print(display.render())
    return page.export_text()


@pytest.mark.parametrize("width", [50, 80, 100, 160])
@pytest.mark.parametrize("layers", [0, 1, 12, 48])
def test_the_dashboard_fits_and_tells_everything(width: int, layers: int) -> None:
    with TrainingDisplay("N1", terminal(width), clock=Clock()) as display:
        assert "preparing" in shown(display)
        for number in range(1, 21):
            display.update(step(number, layers=layers))
        display.validation(validation(20))
        display.sample("The river was crossed [bold] in 1862.")
    text = shown(display)
    assert all(len(line) <= width for line in text.splitlines())
    for part in ("N1", "20 of 40 steps", "30 s left", "3.8120", "12.3 k", "41%", "3.5000 at 20", "[bold]"):
        assert part in text
    assert ("router" in text) == bool(layers)


def test_the_dashboard_takes_less_than_half_a_percent_of_the_time() -> None:
    clock, drawn = Clock(), 0
    with TrainingDisplay("N1", terminal(100), clock=clock) as display:
        before = display._shown
        for number in range(1, 400):
            display.update(step(number, total=1000))
            drawn += display._shown != before
            before = display._shown
            clock.now += 0.01
    assert LARGEST_SHARE < 0.005
    assert drawn <= 4.0 / 0.25 + 1


def test_a_skipped_step_is_told_and_does_not_enter_the_curve() -> None:
    with TrainingDisplay("N1", terminal(80), clock=Clock()) as display:
        display.update(step(1, skipped=True))
        assert "step skipped" in shown(display)
        display.update(step(2))
    assert display._curve.resampled(10) == [step(2).loss]


@given(st.integers(1, 5 * CURVE_POINTS), st.integers(1, 100))
def test_a_curve_keeps_its_size_and_its_ends(length: int, width: int) -> None:
    curve = Curve()
    for i in range(length):
        curve.add(float(i))
    points = curve.resampled(width)
    assert 1 <= len(points) <= width
    assert points == sorted(points) and points[0] >= 0.0 and points[-1] < length


def test_columns_are_drawn_in_eighths() -> None:
    assert column_chart([0.0, 0.25, 0.5, 1.0, 7.0], [""] * 5, rows=2).plain == "   ██\n ▄███"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (12_345, "12.3 k"), (999_960, "1 M"), (34.1e9, "34.1 G"), (math.inf, "inf")],
)
def test_quantities_have_three_digits(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (187, "3:07 min"), (8100, "2:15 h"), (273_600, "3 d 4 h")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_pictures_of_a_run(layers: int, steps: int, tmp_path: Path) -> None:
    records: list[Record] = [step(i, layers=layers, skipped=i == 5) for i in range(1, steps + 1)]
    write(tmp_path / METRICS, [*records, validation(steps)])
    names = [path.name for path in write_plots(tmp_path)]
    expected = ["loss.png", "throughput.png", "optimizer.png", *(["router.png"] if layers else [])]
    assert names == (expected if steps else [])
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_smoothing_keeps_a_constant_and_overlooks_nan() -> None:
    np = pytest.importorskip("numpy")
    values = np.full(500, 2.5)
    values[::7] = math.nan
    assert smooth(values) == pytest.approx(2.5)
