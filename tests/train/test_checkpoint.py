"""What a checkpoint promises: whole or not there, checked before it is used, and never the last one lost."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold import cli
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.train import checkpoint
from tenfold.train.checkpoint import (
    STATE,
    TrainerState,
    checkpoints,
    choose_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tenfold.train.data import Corpus
from tenfold.train.metrics import METRICS, read_metrics
from tenfold.train.recipe import CHECKPOINTS, TrainConfig
from tenfold.train.trainer import train

Make = Callable[..., TrainConfig]
Damage = Callable[[Path], None]
FILES = ("model.safetensors", "trainer.safetensors", "trainer.json", "config.json", "tokenizer.json")


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def delete(path: Path) -> None:
    path.unlink()


@pytest.fixture
def model(sparse: Qwen3NextConfig) -> Qwen3Next:
    model = Qwen3Next(sparse)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def state(step: int) -> TrainerState:
    return TrainerState(
        step=step, tokens=10 * step, flops=0.1 * step, seconds=1 / 3, seconds_total=2.5, loader={"epoch": 0, "row": 4}
    )


def save(root: Path, model: Qwen3Next, corpus: Corpus, *steps: int, keep: int = 9) -> None:
    tensors = {"momentum.x": torch.arange(6.0), "step_count": torch.tensor(3)}
    for step in steps:
        save_checkpoint(root, model, tensors, state(step), corpus.tokenizer, keep)


def steps_under(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(root)]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses longer files, as it refuses them on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- whole -------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path, model: Qwen3Next, opened: Corpus) -> None:
    save(tmp_path, model, opened, 7)
    loaded, tensors, found = load_checkpoint(choose_checkpoint(tmp_path, None))
    assert found == state(7) and isinstance(loaded, Qwen3Next) and loaded.config == model.config
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    assert torch.equal(tensors["momentum.x"], torch.arange(6.0)) and tensors["step_count"] == 3


def test_the_last_ones_are_kept(tmp_path: Path, model: Qwen3Next, opened: Corpus) -> None:
    save(tmp_path, model, opened, 1, 2, 3, keep=2)
    assert steps_under(tmp_path) == [2, 3]
    save(tmp_path, model, opened, 10, keep=1)
    assert steps_under(tmp_path) == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("keep", [1, 2])
def test_going_back_leaves_what_came_after_behind(tmp_path: Path, model: Qwen3Next, opened: Corpus, keep: int) -> None:
    save(tmp_path, model, opened, 10, 20, 30)
    save(tmp_path, model, opened, 15, keep=keep)  # after a resume from step 10
    assert steps_under(tmp_path) == [10, 15][-keep:]


def test_choosing_one_that_is_not_there_tells_which_are(tmp_path: Path, model: Qwen3Next, opened: Corpus) -> None:
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint under"):
        choose_checkpoint(tmp_path, None)
    save(tmp_path, model, opened, 10, 20)
    assert choose_checkpoint(tmp_path, 10) == tmp_path / "step-00000010"
    with pytest.raises(ValueError, match=r"no checkpoint of step 15 under .*: there are 10, 20"):
        choose_checkpoint(tmp_path, 15)


@pytest.mark.parametrize("written", ["nothing", "model.safetensors", "trainer.safetensors"])
def test_an_unfinished_one_is_not_there(tmp_path: Path, model: Qwen3Next, opened: Corpus, written: str) -> None:
    save(tmp_path, model, opened, 1)
    unfinished = tmp_path / "step-00000002"
    unfinished.mkdir()
    if written != "nothing":
        (unfinished / written).write_bytes(b"x")
    assert choose_checkpoint(tmp_path, None).name == "step-00000001"
    save(tmp_path, model, opened, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


# ---- damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, truncate, delete])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_with_the_file_and_the_step_before(
    tmp_path: Path, model: Qwen3Next, opened: Corpus, name: str, damage: Damage
) -> None:
    save(tmp_path, model, opened, 1, 2, 3)
    chosen = tmp_path / "step-00000002"
    damage(chosen / name)
    if (name, damage) == (STATE, delete):
        assert steps_under(tmp_path) == [1, 3]  # it is what makes one whole
        return
    with pytest.raises(ValueError) as caught:
        load_checkpoint(chosen)
    told = str(caught.value)
    assert told.startswith(f"checkpoint {chosen} is damaged: {name} ") and "\n" not in told
    assert told.endswith("resume from the one before with --resume-step 1")
    load_checkpoint(tmp_path / "step-00000003")


@pytest.mark.parametrize("position", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_no_bit_of_the_state_may_change(tmp_path: Path, model: Qwen3Next, opened: Corpus, position: float) -> None:
    save(tmp_path, model, opened, 1000)
    path = tmp_path / "step-00001000" / STATE
    whole = path.read_bytes()
    for bit in range(8):
        content = bytearray(whole)
        content[int(len(whole) * position)] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged: .*; there is none before it"):
            load_checkpoint(path.parent)
    path.write_bytes(whole)
    assert load_checkpoint(path.parent)[2] == state(1000)


# ---- a full disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_disk_without_room_loses_nothing(tmp_path: Path, model: Qwen3Next, opened: Corpus, room: int) -> None:
    save(tmp_path, model, opened, 1)
    with files_of_at_most(room), pytest.raises(OSError) as caught:
        save(tmp_path, model, opened, 2, keep=1)
    told = str(caught.value)
    assert f"checkpoint {tmp_path / 'step-00000002'} could not be written" in told and "earlier checkpoints are" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001")
    save(tmp_path, model, opened, 2, keep=1)
    assert steps_under(tmp_path) == [2]


def test_a_disk_that_fills_up_while_the_optimizer_is_saved(
    tmp_path: Path, model: Qwen3Next, opened: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    save(tmp_path, model, opened, 1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(tmp_path, model, opened, 2, keep=1)
    assert cli.explain(caught.value) == str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.usefixtures("no_pictures")
def test_a_training_whose_disk_was_full_goes_on(recipe: Make, mistake: Callable[..., str], tmp_path: Path) -> None:
    whole = train(recipe(tmp_path / "whole", {"tokens": 6 * 128}))
    stopped = recipe(tmp_path / "run", {"tokens": 6 * 128, "checkpoint.every": 2})
    told = ""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with pytest.MonkeyPatch.context() as patch:
        saves = iter([checkpoint.save_file, full])
        patch.setattr(checkpoint, "save_file", lambda *arguments: next(saves)(*arguments))
        told = mistake(stopped)
    assert "step-00000004 could not be written ([Errno 28] No space left on device: 'x')" in told
    assert steps_under(tmp_path / "run" / CHECKPOINTS) == [2]
    final = train(stopped, resume=True)
    assert (final / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_metrics_without_room_are_one_line(recipe: Make, mistake: Callable[..., str], tmp_path: Path) -> None:
    config = recipe(tmp_path / "run")
    config.out.mkdir()
    (config.out / METRICS).symlink_to("/dev/full")
    told = mistake(config)
    assert f"{config.out / METRICS}: No space left on device; make room, then go on with --resume" in told
    (config.out / METRICS).unlink()


# ---- through the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    config = recipe(tmp_path_factory.mktemp("run") / "run", {"tokens": 6 * 128})
    config = replace(config, checkpoint=replace(config.checkpoint, every=2, keep=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenfold.train.trainer.write_plots", lambda folder: [])
        train(config)
    return config


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_goes_on(
    run: TrainConfig, mistake: Callable[..., str], damage: Damage
) -> None:
    last = run.out / CHECKPOINTS / "step-00000006"
    whole = (last / "model.safetensors").read_bytes()
    damage(last / "trainer.safetensors")
    told = mistake(run, "--resume")
    assert f"checkpoint {last} is damaged: trainer.safetensors " in told and "--resume-step 4" in told
    assert read_metrics(run.out / METRICS).steps[-1].step == 6  # nothing is lost yet
    train(run, resume_step=4)
    assert (last / "model.safetensors").read_bytes() == whole
    assert steps_under(run.out / CHECKPOINTS) == [2, 4, 6]
    assert [step.step for step in read_metrics(run.out / METRICS).steps] == [1, 2, 3, 4, 5, 6]
    load_checkpoint(last)
