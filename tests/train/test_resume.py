"""What an end at any moment promises, with real processes: nothing saved is lost, and resuming changes no bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tenfold import cli
from tenfold.models.qwen3 import Qwen3Config
from tenfold.train.checkpoint import checkpoints
from tenfold.train.metrics import METRICS, Metrics, read_metrics
from tenfold.train.recipe import CHECKPOINTS, FINAL, TrainConfig
from tenfold.train.trainer import train

Make = Callable[..., TrainConfig]
Start = Callable[..., subprocess.Popen[str]]
PATIENCE = 120  # seconds for a process that takes three
STATE_FILES = ("model.safetensors", "trainer.safetensors", "config.json", "tokenizer.json")
CURVE = Path(__file__).with_name("loss_curve.json")
SAME_EVERYWHERE = {  # the same kernels on every x86 processor
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",
}
EVERYTHING: dict[str, object] = {  # MTP and accumulation are in the tiny recipe already
    "recompute": True,
    "data.batch_growth": 0.38,
    "tokens": 8 * 128,
    "checkpoint.every": 3,
}


class Finished(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def end_of(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=PATIENCE)
    return Finished(process.returncode, out, err)


def wait_for_step(process: subprocess.Popen[str], config: TrainConfig, step: int) -> None:
    """Until `metrics.jsonl` shows the step."""
    path, begin = config.out / METRICS, time.monotonic()
    while not path.exists() or f'"kind": "step", "step": {step},' not in path.read_text():
        assert process.poll() is None, f"it ended before step {step}: {process.communicate()}"
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.002)


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


@pytest.fixture(scope="module")
def settings(dense: Qwen3Config) -> dict[str, dict[str, object]]:
    """Changes to the tiny recipe."""
    simple: dict[str, object] = {"model": dense, "optim.kind": "adamw", "tokens": 12 * 128, "checkpoint.every": 3}
    return {"qwen3_next": EVERYTHING, "qwen3": simple}


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3"])
def whole(
    request: pytest.FixtureRequest,
    settings: dict[str, dict[str, object]],
    recipe: Make,
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainConfig, dict[str, object]]:
    """A run that nothing stopped, and its changes to the tiny recipe."""
    changes = settings[request.param]
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
    process = start(config)
    wait_for_step(process, config, 5)
    process.kill()
    assert end_of(process).code == -signal.SIGKILL
    assert 5 <= read_metrics(config.out / METRICS).steps[-1].step < read_metrics(whole[0].out / METRICS).steps[-1].step
    assert end_of(start(config, "--resume")).code == 0
    assert_same_end(config, whole[0])


@pytest.mark.parametrize("whole", ["qwen3_next"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_so(
    number: signal.Signals, whole: tuple[TrainConfig, dict[str, object]], recipe: Make, start: Start, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", whole[1])
    process = start(config)
    wait_for_step(process, config, 4)
    process.send_signal(number)
    done = end_of(process)
    assert done.code == cli.INTERRUPTED and done.err == "\ntenfold: interrupted\n"
    metrics = read_metrics(config.out / METRICS)
    last = metrics.steps[-1].step
    message = "interrupted and saved; go on with --resume"
    assert [(event.step, event.message) for event in metrics.events] == [(last, message)]
    assert f"step {last}: {message}" in done.out
    assert checkpoints(config.out / CHECKPOINTS)[-1].name == f"step-{last:08d}"
    if number == signal.SIGINT:
        assert end_of(start(config, "--resume")).code == 0
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
from tenfold.models import weights
from tenfold.train import checkpoint

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def tear(tensors, path):
    Path(path).write_bytes(b"half of it")
    die()

moment, sys.argv = sys.argv[1], sys.argv[:1] + sys.argv[2:]
places = {
    "model": (weights, "_publish", die),
    "optimizer": (checkpoint, "save_file", tear),
    "flush": (checkpoint, "_flush", die),
    "rename": (checkpoint.Path, "rename", None),
    "old ones": (checkpoint.shutil, "rmtree", None),
}
owner, name, deadly = places[moment]
original = getattr(owner, name)
calls = iter([original, deadly])

def rename(path, target):
    if path.name.endswith("06.partial"):
        die()
    return original(path, target)

def rmtree(path, ignore_errors=False):
    if Path(path).name == "step-00000003":
        die()
    return original(path, ignore_errors)

def second_save(*arguments):
    return (deadly if (Path(sys.argv[2]).with_suffix("") / "checkpoints/step-00000003").exists() else original)(*arguments)

setattr(owner, name, {"rename": rename, "old ones": rmtree}.get(moment, second_save))
raise SystemExit(cli.main())
"""


@pytest.mark.parametrize("whole", ["qwen3_next"], indirect=True)
@pytest.mark.parametrize(
    ("moment", "saved"), [("model", 3), ("optimizer", 3), ("flush", 3), ("rename", 3), ("old ones", 6)]
)
def test_killed_while_saving_the_one_before_is_there(
    moment: str, saved: int, whole: tuple[TrainConfig, dict[str, object]], recipe: Make, start: Start, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", whole[1] | {"checkpoint.keep": 1})
    done = end_of(start(config, program=("-c", DYING, moment)))
    assert done.code == -signal.SIGKILL, done
    assert checkpoints(config.out / CHECKPOINTS)[-1].name == f"step-{saved:08d}"
    if moment in ("optimizer", "old ones"):
        assert end_of(start(config, "--resume")).code == 0
        assert_same_end(config, whole[0])
    else:
        train(config, resume=True)
        assert read_metrics(config.out / METRICS).steps[-1].step == read_metrics(whole[0].out / METRICS).steps[-1].step
