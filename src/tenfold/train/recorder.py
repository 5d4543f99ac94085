"""Where the records of a run go: into its `metrics.jsonl`, and before somebody's eyes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from tenfold.train.display import TrainingDisplay
from tenfold.train.metrics import METRICS, Event, MetricsLog, Record, Sample, StepMetrics, Validation


class Recorder:
    """A context manager, in which every record is written and shown; of several processes, by the main one."""

    def __init__(self, run: Path, resume_step: int | None, console: Console | None, is_main: bool = True) -> None:
        """Goes on with the records up to `resume_step`, or begins anew. Raises as `MetricsLog` does."""
        silent = Console(file=io.StringIO())
        self._log = MetricsLog(run / METRICS if is_main else Path(os.devnull), resume_step if is_main else None)
        self._display = TrainingDisplay(str(run), console if is_main else silent)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)
        self._log.close()

    def record(self, record: Record) -> None:
        """Writes and shows. Raises OSError where the disk is full."""
        self._log.write(record)
        match record:
            case StepMetrics():
                self._display.update(record)
            case Validation():
                self._display.validation(record)
            case Sample():
                self._display.sample(record.prompt + record.text)
            case Event():
                self._display.message(f"step {record.step:,}: {record.message}")
