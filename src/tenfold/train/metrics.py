"""What a training run tells: records of four kinds, kept as JSON lines in `metrics.jsonl`.

The writer only appends, a line at a time, so a killed process leaves at most one torn line, the last; the
reader overlooks it, and a resumed run cuts the file back to the checkpoint that it resumes from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS = "metrics.jsonl"  # the file's name in a run's folder


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Router tuples hold one number per sparse layer and are empty for dense models."""

    step: int  # steps done, this one included
    steps_total: int
    tokens: int  # trained on so far
    loss: float  # mean cross-entropy of this step's labels, nats per token; may be NaN where skipped
    lr: float
    grad_norm: float  # before clipping
    tokens_per_second: float
    flops_per_second: float
    utilisation: float | None = None  # share of the measured matmul peak, 0..1
    seconds_elapsed: float
    seconds_left: float | None = None
    balance_loss: float | None = None  # 1 at perfect balance
    load_ratio: tuple[float, ...] = ()  # busiest expert's load over the mean load
    dead_share: tuple[float, ...] = ()  # share of experts that no token chose in this step
    mtp_loss: float | None = None
    skipped: bool = False  # no update: the gradient was not finite
    memory_gb: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss on the validation set, nats per token, and what had been spent by then."""

    step: int
    tokens: int
    loss: float
    flops: float  # of training, optimizer included
    seconds: float  # spent in steps


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that the model wrote after a prompt."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth telling: a resume, a checkpoint, a skipped step."""

    step: int
    message: str


Record = StepMetrics | Validation | Sample | Event
KINDS: dict[str, type[Record]] = {
    "step": StepMetrics,
    "validation": Validation,
    "sample": Sample,
    "event": Event,
}
NAMES = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Metrics:
    """All records of a run by kind, in the order they were written."""

    steps: list[StepMetrics] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Files a record under its kind."""
        match record:
            case StepMetrics():
                self.steps.append(record)
            case Validation():
                self.validations.append(record)
            case Sample():
                self.samples.append(record)
            case Event():
                self.events.append(record)


class MetricsLog:
    """Appends records to `metrics.jsonl`. Each line reaches the operating system before `write` returns."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Starts the file anew, or keeps what it recorded up to `resume_step`.

        Raises ValueError where the kept file is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and path.exists():
            cut_back(path, resume_step)
        mode = "w" if resume_step is None else "a"
        self._file = path.open(mode, encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        """Appends one line. Raises OSError, such as on a full disk, after closing the file."""
        try:
            self._file.write(encode(record) + "\n")
        except OSError as error:
            with suppress(OSError):  # it tries to write the rest once more
                self._file.close()
            raise OSError(
                error.errno, f"{error.strerror}; make room, then go on with --resume", self._file.name
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Metrics:
    """Reads a run's records and overlooks a torn last line. Raises ValueError at any other bad line."""
    metrics = Metrics()
    for _, record in _records(path):
        metrics.add(record)
    return metrics


def cut_back(path: Path, step: int) -> None:
    """Drops what came after `step`, and a torn last line, by writing the file anew under its name."""
    partial = path.with_name(path.name + ".partial")
    kept = [line for line, record in _records(path) if record.step <= step]
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def encode(record: Record) -> str:
    """A record as one line of strict JSON."""
    return strict_json({"kind": NAMES[type(record)], **asdict(record)})


def decode(line: str) -> Record:
    """The inverse of `encode`. Raises ValueError for anything else."""
    values = json.loads(line)
    kind = KINDS.get(values.pop("kind", "")) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"expected an object whose kind is one of {', '.join(KINDS)}")
    floats = {f.name for f in fields(kind) if f.type == "float"}
    try:
        return kind(**{name: _value(value, name in floats) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def strict_json(value: object, indent: int | None = None) -> str:
    """JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """Whole lines and what they hold. Only a line that ends in a line break is whole."""
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
            yield text, decode(text)
        except ValueError as error:  # covers JSON and UTF-8 errors
            what = f"{path}, line {number} is no metrics record ({error}); delete that line"
            raise ValueError(what) from error


def _value(value: Any, is_float: bool) -> Any:
    if value is None and is_float:
        return math.nan
    return tuple(value) if isinstance(value, list) else value


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
