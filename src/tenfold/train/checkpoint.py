"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00001200`: the model as a Hugging Face folder that anything can load, beside the
trainer's own state. It is written under another name, flushed to the disk, and renamed; a process killed at any
moment leaves the previous one as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenfold.models import Model
from tenfold.models.weights import load_model, save_model
from tenfold.tokenizer import Tokenizer

STATE, TENSORS = "trainer.json", "trainer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands, beside its tensors."""

    step: int  # optimizer steps done
    tokens: int
    flops: float
    seconds: float  # spent in steps
    seconds_total: float  # spent at all, validation, samples and checkpoints included
    loader: dict[str, int]


def save_checkpoint(
    root: Path,
    model: Model,
    tensors: dict[str, Tensor],
    state: TrainerState,
    tokenizer: Tokenizer | None,
    keep: int,
) -> Path:
    """Writes `root/step-N`, then removes all but the last `keep` checkpoints up to it, and those of later steps, which
    a run left behind that went back. Raises OSError; nothing else is lost."""
    final = root / f"step-{state.step:08d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_model(model, partial, tokenizer=tokenizer)
        save_file(tensors, partial / TENSORS)
        values = asdict(state) | {"files": {path.name: _digest(path) for path in sorted(partial.iterdir())}}
        (partial / STATE).write_text(json.dumps(values | {"sha256": _seal(values)}, indent=1))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints are untouched"
        ) from error
    _flush(root)
    kept = [path for path in checkpoints(root) if path <= final][-keep:]
    for old in sorted({*root.glob("step-*"), *root.glob(".step-*.partial")} - set(kept)):
        (old / STATE).unlink(missing_ok=True)  # first, for it is what makes one whole
        shutil.rmtree(old)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / STATE).is_file())


def choose_checkpoint(root: Path, step: int | None) -> Path:
    """The last checkpoint, or the one of `step`. Raises ValueError where there is none."""
    found = checkpoints(root)
    if not found:
        raise ValueError(f"nothing to resume: no checkpoint under {root}; start without --resume")
    if step is None:
        return found[-1]
    chosen = root / f"step-{step:08d}"
    if chosen not in found:
        steps = ", ".join(str(int(path.name[5:])) for path in found)
        raise ValueError(f"no checkpoint of step {step} under {root}: there are {steps}")
    return chosen


def load_checkpoint(folder: Path) -> tuple[Model, dict[str, Tensor], TrainerState]:
    """Reads a checkpoint after comparing every file with its checksum. Raises ValueError where it is damaged."""
    try:
        values = json.loads((folder / STATE).read_text())
        seal = values.pop("sha256")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(_damaged(folder, f"{STATE} is no trainer state ({error})")) from error
    if seal != _seal(values):
        raise ValueError(_damaged(folder, f"{STATE} does not have the sha256 it was saved with"))
    for name, digest in values.pop("files").items():
        path = folder / name
        if not path.is_file():
            raise ValueError(_damaged(folder, f"{name} is missing"))
        if _digest(path) != digest:
            raise ValueError(_damaged(folder, f"{name} does not have the sha256 {digest[:12]}.. it was saved with"))
    model = load_model(folder, dtype="float32", device="cpu")
    return model, load_file(folder / TENSORS), TrainerState(**values)


def _damaged(folder: Path, what: str) -> str:
    earlier = [int(path.name[5:]) for path in checkpoints(folder.parent) if path < folder]
    advice = f"resume from the one before with --resume-step {earlier[-1]}" if earlier else "there is none before it"
    return f"checkpoint {folder} is damaged: {what}; {advice}"


def _seal(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
