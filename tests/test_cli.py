"""The command line: quick to answer, mistakes told in one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold import cli
from tenfold.engine.llm import continue_text
from tenfold.kernels import cpu
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.weights import save_model
from tenfold.train.optim import OptimConfig
from tenfold.train.recipe import TrainConfig


def tenfold(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "tenfold", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def failing(error: BaseException) -> Callable[[Sequence[str]], cli.Run]:
    def run() -> None:
        raise error

    return lambda args: run


def test_help_needs_no_torch() -> None:
    program = "import sys; from tenfold.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_the_real_command_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    done = tenfold("generate", str(tmp_path), "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("tenfold: error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy'; tenfold --help lists them all"),
        (["data", "biuld"], "unknown command 'data biuld'; did you mean 'data build'?"),
        (["train", "--resume"], "the recipe comes first"),
        (["train", "nowhere.toml"], "nowhere.toml: No such file or directory"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["info", "/nowhere"], "/nowhere"),
        (["info", "--verify"], "--verify needs a MODEL, the packed folder to read"),
        (["init", "--shape", "tiny", "--out", "/dev/null/x"], "/dev/null"),
        (["generate", "/nowhere", "--prompt", "a\udcff"], "--prompt: not UTF-8 at character 1"),
        (["generate", "/nowhere", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["generate", "/nowhere", "--prompt", "x", "--quantization", "int4", "--dtype", "auto"], "place of --dtype"),
        (["data", "tokenizer", "/nowhere.txt", "--out", "/tmp/never"], "/nowhere.txt"),
        (["data", "build", "/nowhere.txt", "--out", "/tmp/never"], "/nowhere.txt"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    told = capsys.readouterr().err
    assert told.startswith("tenfold: error: ") and told.count("\n") == 1 and complaint in told


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (MemoryError(), "out of memory; use a smaller model"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; use a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError("first\nsecond"), "first second"),
    ],
)
def test_what_a_machine_runs_out_of(
    error: Exception, complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", failing(error)))
    assert cli.main(["info"]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", failing(RuntimeError("shapes do not match"))))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main(["info"])
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", failing(ValueError("x"))))
    monkeypatch.setenv("TENFOLD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        cli.main(["info"])


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", failing(KeyboardInterrupt())))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\ntenfold: interrupted\n"


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m tenfold --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: tenfold {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "resume", "expected"),
    [
        ([], (False, None), {}),
        (["--resume"], (True, None), {}),
        (["--resume-step", "7"], (False, 7), {}),
        (["--tokens", "3"], (False, None), {"tokens": 3}),
        (["--optim.adam-betas", "0", "0.5"], (False, None), {"optim": OptimConfig(adam_lr=1.0, adam_betas=(0.0, 0.5))}),
        (["--model.num-hidden-layers", "9"], (False, None), {"model": Qwen3Config(num_hidden_layers=9)}),
    ],
)
def test_options_override_the_recipe(
    options: list[str],
    resume: tuple[bool, int | None],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("tenfold.train.trainer.train", lambda *arguments: calls.append(arguments))
    (tmp_path / "recipe.toml").write_text('tokens = 20\n[model]\nmodel_type = "qwen3"\n[optim]\nadam_lr = 1')
    assert cli.main(["train", str(tmp_path / "recipe.toml"), *options]) == 0
    recipe = TrainConfig(tokens=20, model=Qwen3Config(), optim=OptimConfig(adam_lr=1.0))
    assert calls == [(replace(recipe, **expected), *resume, continue_text)]


@pytest.mark.parametrize("isa", [*cpu.isas(), None] if cpu.available() else [None])
def test_info_names_the_kernels(
    isa: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(Qwen3(Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)), tmp_path)
    monkeypatch.setattr(cpu, "available", lambda: isa is not None)
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    assert cli.main(["info", str(tmp_path)]) == 0
    assert f"native kernels: {isa or 'none, torch runs instead'}" in capsys.readouterr().out
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == isa
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == f"native kernels: {isa or 'none, torch runs instead'}\n"
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kernels": isa}
