"""What several processes promise: together they are one, sums over ranks are sums, and one interrupt stops all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tenfold.train.checkpoint import checkpoints
from tenfold.train.data import Corpus
from tenfold.train.metrics import METRICS, Metrics, read_metrics
from tenfold.train.parallel import Ranks
from tenfold.train.recipe import CHECKPOINTS, FINAL, TrainConfig

Make = Callable[..., TrainConfig]
Start = Callable[..., subprocess.Popen[str]]
PATIENCE = 600  # seconds for processes that take five
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tenfold")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
ROUNDING = 128 * 2**-24  # relative: fp32 sums over 128 tokens in another order; measured: up to 4e-7
GROWN = 10 * ROUNDING  # after six steps: Muon enlarges what rounds in directions without much gradient; measured: 8e-6
STEPS = 6


@pytest.fixture(scope="module")
def one(recipe: Make, start: Start, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of one process, every checkpoint kept."""
    config = recipe(tmp_path_factory.mktemp("one") / "run", shared(micro_rows=2))
    process = start(config, pictures=False)
    assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == 0
    return config


def shared(micro_rows: int) -> dict[str, object]:
    """Changes to the tiny recipe: a balance loss that shows in the gradients, and lower learning rates."""
    return {
        "tokens": STEPS * 128,
        "data.micro_rows": micro_rows,
        "objective.balance": 0.5,
        "optim.muon_lr": 0.005,
        "optim.adam_lr": 1e-3,
        "checkpoint.every": 1,
        "checkpoint.keep": STEPS,
    }


def assert_same_losses(found: Metrics, expected: Metrics) -> None:
    assert [step.step for step in found.steps] == [step.step for step in expected.steps]
    for a, b in zip(found.steps, expected.steps, strict=True):
        assert a.tokens == b.tokens
        for name in ("loss", "mtp_loss", "balance_loss"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=ROUNDING), (a.step, name)
    assert found.steps[0].load_ratio == expected.steps[0].load_ratio
    for a, b in zip(found.validations, expected.validations, strict=True):
        assert a.step == b.step and a.loss == pytest.approx(b.loss, rel=ROUNDING)


def differences(found: Path, expected: Path) -> dict[str, float]:
    """By tensor, relative to its size."""
    one, other = load_file(found), load_file(expected)
    assert one.keys() == other.keys()
    return {name: float((x - other[name]).norm() / (x.norm() + 1e-30)) for name, x in one.items() if x.ndim}


def test_two_processes_are_one(one: TrainConfig, recipe: Make, start: Start, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", shared(micro_rows=2))  # all that a process gets
    process = start(config, program=TWO, **LOOPBACK)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert_same_losses(read_metrics(config.out / METRICS), read_metrics(one.out / METRICS))
    assert out.count(f"step {STEPS}/{STEPS}") == 1  # one of them talks
    first = "step-00000001/trainer.safetensors"  # averages of the first gradient
    gradients = differences(config.out / CHECKPOINTS / first, one.out / CHECKPOINTS / first)
    assert max(gradients.values()) < ROUNDING, gradients
    weights = differences(config.out / FINAL / "model.safetensors", one.out / FINAL / "model.safetensors")
    assert max(weights.values()) < GROWN, weights


INTERRUPTED = """
import os, signal
from tenfold import cli
from tenfold.train.trainer import Trainer
step = Trainer.train_step
def interrupted(self):
    if self.step == 2 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)
Trainer.train_step = interrupted
raise SystemExit(cli.main())
"""


def test_an_interrupt_of_one_process_saves_and_stops_both(recipe: Make, start: Start, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", shared(micro_rows=1))
    (tmp_path / "program.py").write_text(INTERRUPTED)
    process = start(config, program=(*TWO[:-2], str(tmp_path / "program.py")), **LOOPBACK)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "tenfold: interrupted" in err
    path = config.out / METRICS
    stopped = read_metrics(path)
    assert [event.message for event in stopped.events] == ["interrupted and saved; go on with --resume"]
    assert stopped.steps[-1].step == 3 and checkpoints(config.out / CHECKPOINTS)[-1].name == "step-00000003"


SUMS = """
import torch
from torch import nn
from tenfold.train import parallel
ranks = parallel.Ranks("cpu")
assert ranks.world == 2 and ranks.is_main == (ranks.rank == 0)
mine = torch.arange(3.0) + ranks.rank
assert ranks.sum(mine).tolist() == [1.0, 3.0, 5.0] and mine.tolist() == [ranks.rank + x for x in range(3)]
assert ranks.sum(torch.tensor([2**40 + ranks.rank])).tolist() == [2**41 + 1]  # counts are exact
assert ranks.totals(ranks.rank, 0.1, True) == [1.0, 0.2, 2.0]
parallel.BUCKET_ELEMENTS = 10  # several buckets, one of them for a parameter that is larger
parameters = [nn.Parameter(torch.zeros(size)) for size in (4, 3, 25, 2, 7)]
for number, parameter in enumerate(parameters):
    if number != 2 * ranks.rank + 1:  # of 1 on one rank and of 3 on the other there is no gradient
        parameter.grad = torch.full_like(parameter, (number + 1) * (ranks.rank + 1))
ranks.sum_gradients(parameters)
expected = [3.0, 4.0, 9.0, 4.0, 15.0]
assert [p.grad.unique().tolist() for p in parameters] == [[x] for x in expected], [p.grad for p in parameters]
ranks.barrier()
ranks.close()
"""


def test_sums_over_ranks_are_sums(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"} | LOOPBACK
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SUMS],
            env=os.environ | group | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err


def test_a_process_alone_sums_nothing() -> None:
    ranks = Ranks("cpu")
    x, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    assert ranks.sum(x) is x and ranks.totals(1, 2.5) == [1.0, 2.5]
    ranks.sum_gradients([parameter])
    ranks.barrier()
    ranks.close()
    assert parameter.grad is None and ranks.is_main and ranks.world == 1


def test_processes_that_cannot_share_a_batch_are_told(
    recipe: Make, opened: Corpus, tmp_path: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("tenfold.train.parallel.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("tenfold.train.parallel.distributed.barrier", lambda: None)
    monkeypatch.setattr("tenfold.train.parallel.distributed.destroy_process_group", lambda: None)
    assert "data.batch_rows 4 cannot be shared by 3 processes equally" in mistake(recipe(tmp_path / "run"))
