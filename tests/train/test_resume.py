"""What an end at any moment promises, with real processes: nothing saved is lost, and resuming changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tenfold import cli
from tenfold.models.qwen3 import Qwen3Config
from tenfold.train.checkpoint import checkpoints, load_checkpoint
from tenfold.train.metrics import METRICS, Metrics, read_metrics
from tenfold.train.recipe import CHECKPOINTS, FINAL, TrainConfig

Make = Callable[..., TrainConfig]
Start = Callable[..., subprocess.Popen[str]]
PATIENCE = 600  # seconds for a process that takes three
STATE_FILES = ("model.safetensors", "trainer.safetensors", "config.json", "tokenizer.json")
CURVE = Path(__file__).with_name("loss_curve.json")
SAME_EVERYWHERE = {  # the same kernels on every x86 processor
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",
}
VARIANTS: dict[str, dict[str, object]] = {  # MTP and accumulation are in the tiny recipe already
    "qwen3_next": {"data.batch_growth": 0.38, "tokens": 7 * 128, "checkpoint.every": 2, "checkpoint.keep": 1},
    "qwen3": {"recompute": True, "optim.kind": "adamw", "tokens": 12 * 128, "checkpoint.every": 3},
}


class Finished(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def end_of(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=PATIENCE)
    return Finished(process.returncode, out, err)


PAUSING = """
import sys, time
from pathlib import Path
from tenfold import cli
from tenfold.train.metrics import StepMetrics
from tenfold.train.recorder import Recorder

step, sys.argv = int(sys.argv[1]), [*sys.argv[:1], *sys.argv[2:]]
go, record = Path(sys.argv[2]).with_suffix(".go"), Recorder.record

def pausing(self, told):
    record(self, told)
    while isinstance(told, StepMetrics) and told.step == step and not go.exists():
        time.sleep(0.01)

Recorder.record = pausing
raise SystemExit(cli.main())
"""


def at_step(start: Start, config: TrainConfig, step: int) -> subprocess.Popen[str]:
    """A process whose `metrics.jsonl` shows the step, and that waits there for a signal and for `go`."""
    process, path, begin = start(config, program=("-c", PAUSING, str(step))), config.out / METRICS, time.monotonic()
    while not path.exists() or f'"kind": "step", "step": {step},' not in path.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.005)
    return process


def told_losses(metrics: Metrics) -> list[tuple[Any, ...]]:
    """All that is known of every step, except for times."""
    names = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "load_ratio", "dead_share")
    return [tuple(getattr(step, name) for name in names) for step in metrics.steps]


def assert_same_end(found: TrainConfig, expected: TrainConfig) -> None:
    """Losses, validation, final weights, optimizer state and data position, bit for bit."""
    stories = [read_metrics(config.out / METRICS) for config in (found, expected)]
    assert told_losses(stories[0]) == told_losses(stories[1])
    assert [(v.step, v.loss, v.flops) for v in stories[0].validations] == [
        (v.step, v.loss, v.flops) for v in stories[1].validations
    ]
    one, other = (checkpoints(config.out / CHECKPOINTS)[-1] for config in (found, expected))
    for name in STATE_FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((folder / "trainer.json").read_text()) for folder in (one, other)]
    for name in ("step", "tokens", "flops", "loader"):
        assert states[0][name] == states[1][name], name
    weights = [(config.out / FINAL / "model.safetensors").read_bytes() for config in (found, expected)]
    assert weights[0] == weights[1]
    assert not list(found.out.rglob(".*")), "left behind"


# ---- whole runs to compare with ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def whole(
    request: pytest.FixtureRequest,
    dense: Qwen3Config,
    recipe: Make,
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainConfig, dict[str, object]]:
    """A run that nothing stopped, and its changes to the tiny recipe."""
    changes = VARIANTS[request.param] | ({"model": dense} if request.param == "qwen3" else {})
    config = recipe(tmp_path_factory.mktemp(request.param) / "run", changes)
    done = end_of(start(config))
    assert done.code == 0 and done.err == ""
    assert done.out.splitlines()[-1].startswith(f"{config.out / FINAL}: the trained model")
    return config, changes


# ---- stopped -----------------------------------------------------------------------------------------------


def test_killed_and_resumed_is_never_stopped(
    whole: tuple[TrainConfig, dict[str, object]], recipe: Make, start: Start, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", whole[1])
    process = at_step(start, config, 5)
    process.kill()
    assert end_of(process).code == -signal.SIGKILL
    assert read_metrics(config.out / METRICS).steps[-1].step == 5
    assert int(checkpoints(config.out / CHECKPOINTS)[-1].name[5:]) in (3, 4)  # by the variant
    assert end_of(start(config, "--resume")).code == 0
    assert_same_end(config, whole[0])


@pytest.mark.parametrize("whole", ["qwen3_next"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_so(
    number: signal.Signals, whole: tuple[TrainConfig, dict[str, object]], recipe: Make, start: Start, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", whole[1])
    process = at_step(start, config, 3)
    process.send_signal(number)
    config.out.with_suffix(".go").touch()
    done = end_of(process)
    assert done.code == cli.INTERRUPTED and done.err == "\ntenfold: interrupted\n"
    metrics = read_metrics(config.out / METRICS)
    message = "interrupted and saved; go on with --resume"
    assert [(event.step, event.message) for event in metrics.events] == [(3, message)]
    assert f"step 3: {message}" in done.out and metrics.steps[-1].step == 3
    assert checkpoints(config.out / CHECKPOINTS)[-1].name == "step-00000003"
    if number == signal.SIGINT:
        assert end_of(start(config, "--resume", pictures=False)).code == 0
        assert_same_end(config, whole[0])


SLOW = """
import time
from tenfold import cli
from tenfold.train import trainer
def passes(self, batches):
    print("in a step", flush=True)
    time.sleep(60)
trainer.Trainer._passes = passes
raise SystemExit(cli.main())
"""


def test_a_second_interrupt_ends_at_once(recipe: Make, start: Start, tmp_path: Path) -> None:
    process = start(recipe(tmp_path / "run"), program=("-c", SLOW))
    assert process.stdout is not None
    while "in a step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # the first waits for the step
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = end_of(process)
    assert time.monotonic() - begin < 30 and done.code == cli.INTERRUPTED
    assert done.err == "\ntenfold: interrupted\n"
    assert not checkpoints(tmp_path / "run" / CHECKPOINTS)


# ---- killed while saving -----------------------------------------------------------------------------------

DYING = """
import os, shutil, signal, sys
from pathlib import Path
from tenfold import cli
from tenfold.train import checkpoint

moment, folder, sys.argv = sys.argv[1], sys.argv[2], [*sys.argv[:1], *sys.argv[3:]]
save_file, rename, rmtree = checkpoint.save_file, Path.rename, shutil.rmtree

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying_save(tensors, path):
    save_file(tensors, path)
    if moment == "the optimizer is half written" and folder in str(path):
        os.truncate(path, path.stat().st_size // 2)
        die()

def dying_rename(path, target):
    if moment == "all is written" and target.name == folder:
        die()
    rename(path, target)
    if moment == "the one before is still there" and target.name == folder:
        die()

def dying_rmtree(path, ignore_errors=False):
    if moment == "the one before is half removed" and (path.parent / folder).exists():
        next(path.iterdir()).unlink()
        die()
    rmtree(path, ignore_errors)

checkpoint.save_file, Path.rename, shutil.rmtree = dying_save, dying_rename, dying_rmtree
raise SystemExit(cli.main())
"""
DEATHS = (  # moment, step that is being saved, steps that are saved then
    ("the optimizer is half written", 4, [2]),
    ("all is written", 6, [4]),
    ("the one before is still there", 8, [6, 8]),
    ("the one before is half removed", 10, [8, 10]),
)


@pytest.mark.parametrize("whole", ["qwen3_next"], indirect=True)
def test_killed_again_and_again_while_saving(
    whole: tuple[TrainConfig, dict[str, object]], recipe: Make, start: Start, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", whole[1])
    for number, (moment, step, saved) in enumerate(DEATHS):
        options = ("--resume",) if number else ()
        done = end_of(start(config, *options, program=("-c", DYING, moment, f"step-{step:08d}")))
        assert done.code == -signal.SIGKILL, (moment, done)
        assert [int(path.name[5:]) for path in checkpoints(config.out / CHECKPOINTS)] == saved, moment
        load_checkpoint(checkpoints(config.out / CHECKPOINTS)[-1])
    assert end_of(start(config, "--resume", pictures=False)).code == 0
    assert_same_end(config, whole[0])


# ---- a stored curve ----------------------------------------------------------------------------------------


def pinned_torch() -> str:
    constraints = Path(__file__).parents[2] / "constraints.txt"
    return next(line[7:] for line in constraints.read_text().splitlines() if line.startswith("torch=="))


@pytest.mark.skipif(torch.__version__.split("+")[0] != pinned_torch(), reason="another torch rounds otherwise")
@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_the_loss_curve_is_the_stored_one(
    family: str, recipe: Make, start: Start, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To store a new one after a change that is meant to change it: TENFOLD_STORE_CURVE=1.

    Not to the bit: a processor of another maker rounds some last bits otherwise, SSE or not.
    """
    schedule: dict[str, object] = {} if family == "sparse" else {"optim.kind": "adamw", "optim.schedule": "cosine"}
    config = recipe(tmp_path / "run", schedule | {"model": request.getfixturevalue(family), "tokens": 8 * 128})
    assert end_of(start(config, pictures=False, **SAME_EVERYWHERE)).code == 0
    metrics = read_metrics(config.out / METRICS)
    found = [x.loss.hex() for x in (*metrics.steps, metrics.validations[-1])]
    stored: dict[str, list[str]] = json.loads(CURVE.read_text()) if CURVE.exists() else {}
    if os.environ.get("TENFOLD_STORE_CURVE") == "1":
        CURVE.write_text(json.dumps(stored | {family: found}, indent=1) + "\n")
    else:
        assert [float.fromhex(x) for x in found] == pytest.approx([float.fromhex(x) for x in stored[family]], rel=1e-5)
