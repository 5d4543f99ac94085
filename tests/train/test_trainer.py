"""What a training promises, in this process: parts make the same whole, bad steps are skipped, the model comes out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tenfold.models import Model
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.weights import load, save_model
from tenfold.tokenizer import Tokenizer
from tenfold.train.checkpoint import checkpoints
from tenfold.train.data import Corpus
from tenfold.train.interrupts import Interrupts
from tenfold.train.metrics import METRICS, Metrics, StepMetrics, read_metrics
from tenfold.train.parallel import Ranks
from tenfold.train.recipe import CHECKPOINTS, RECIPE, TrainConfig
from tenfold.train.recorder import Recorder
from tenfold.train.shards import Index, ShardWriter, file_sha256, write_index
from tenfold.train.trainer import SKIPPED_MOST, Trainer, train

ROUNDING = 128 * 2**-24  # relative: fp32 sums over 128 tokens in another order
EXPORTED = 2e-5  # of logits, relative, as in tests/models/test_transformers_parity.py; measured: 2e-7
Make = Callable[..., TrainConfig]


def trainer_of(config: TrainConfig, corpus: Corpus) -> Trainer:
    return Trainer(config, corpus, Ranks("cpu"))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def losses(metrics: Metrics) -> list[tuple[float, float | None, float | None]]:
    return [(step.loss, step.mtp_loss, step.balance_loss) for step in metrics.steps]


# ---- learning ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Corpus:
    """A corpus whose epoch is one batch of two rows, to be learnt by heart."""
    folder = tmp_path_factory.mktemp("two")
    writer = ShardWriter(folder, "train", np.dtype(np.uint16), 1000)
    writer.add(np.arange(1, 65, dtype=np.uint32) * 37 % 251, np.array([32, 20, 12], np.int64))
    split = writer.finish()
    shutil.copy(corpus / "tokenizer.json", folder)
    index = Index(
        dtype="uint16",
        vocab_size=300,
        eos_id=299,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
        splits={"train": split, "validation": split},
        duplicates=0,
        empty=0,
        source="",
    )
    write_index(folder, index)
    return Corpus(folder)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_a_batch_is_learnt_by_heart(
    family: str, kind: str, two_rows: Corpus, recipe: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    changes: dict[str, object] = {
        "model": request.getfixturevalue(family),
        "optim.kind": kind,
        "optim.adam_lr": 0.01,
        "data.batch_rows": 2,
        "data.micro_rows": None,
        "tokens": 40 * 64,
    }
    trainer = trainer_of(recipe(tmp_path, changes), two_rows)
    steps = [trainer.train_step() for _ in range(40)]
    assert trainer.finished and math.log(300) - 0.3 < steps[0].loss < math.log(300) + 0.3
    assert steps[-1].loss < 0.1
    if family == "sparse":
        assert steps[-1].mtp_loss is not None and steps[-1].mtp_loss < 0.5 * math.log(300)


# ---- parts and the whole -----------------------------------------------------------------------------------


def first_step(config: TrainConfig, corpus: Corpus) -> tuple[StepMetrics, dict[str, Tensor]]:
    """A step's metrics, and the averages of its gradient: its share of it, parameter by parameter."""
    trainer = trainer_of(config, corpus)
    metrics = trainer.train_step()
    state = trainer.optimizer.state_dict()
    return metrics, {name: x for name, x in state.items() if name.startswith(("momentum.", "first."))}


@pytest.fixture(scope="module")
def big_batch(
    recipe: Make, opened: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[StepMetrics, dict[str, Tensor]]]:
    """A step over one batch of four rows, by the kind of optimizer; the balance loss counts as much as the others."""
    changes = {"data.micro_rows": None, "objective.balance": 1.0, "objective.mtp_weight": 1.0}
    folder = tmp_path_factory.mktemp("big")
    return {
        kind: first_step(recipe(folder, changes | {"optim.kind": kind}), opened)  # type: ignore[dict-item]
        for kind in ("muon", "adamw")
    }


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_accumulated_micro_batches_are_one_big_batch(
    micro_rows: int,
    recompute: bool,
    kind: str,
    big_batch: dict[str, tuple[StepMetrics, dict[str, Tensor]]],
    recipe: Make,
    opened: Corpus,
    tmp_path: Path,
) -> None:
    expected, gradients = big_batch[kind]
    changes = {"objective.balance": 1.0, "objective.mtp_weight": 1.0, "optim.kind": kind}
    parts = changes | {"data.micro_rows": micro_rows, "recompute": recompute}
    found, accumulated = first_step(recipe(tmp_path, parts), opened)
    assert found.load_ratio == expected.load_ratio and found.dead_share == expected.dead_share
    assert len(found.load_ratio) == 3 + 2 and found.tokens == expected.tokens
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=ROUNDING), name
    assert accumulated.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (accumulated[name] - gradient).norm() <= ROUNDING * gradient.norm(), name


@pytest.mark.parametrize("micro_rows", [None, 2])
@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_recomputation_changes_no_bit(
    family: str, micro_rows: int | None, recipe: Make, opened: Corpus, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    changes = {"model": request.getfixturevalue(family), "data.micro_rows": micro_rows}
    kept, again = (
        trainer_of(recipe(tmp_path, changes | {"recompute": recompute}), opened) for recompute in (False, True)
    )
    for _ in range(3):
        one, other = kept.train_step(), again.train_step()
        names = ("loss", "mtp_loss", "balance_loss", "grad_norm", "load_ratio", "dead_share")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
        assert other.flops_per_second > 0
    assert equal(weights(kept), weights(again))
    assert kept.flops < again.flops


def test_the_batch_grows_as_the_recipe_says(recipe: Make, opened: Corpus, tmp_path: Path) -> None:
    changes = {"data.batch_rows": 8, "data.batch_growth": 0.5, "tokens": 20 * 32}
    trainer = trainer_of(recipe(tmp_path, changes), opened)
    seen = []
    while not trainer.finished:
        seen.append(trainer.train_step().tokens)
    rows = np.diff([0, *seen]) // 32
    assert rows.tolist() == trainer.rows == sorted(trainer.rows) and rows[0] == 1 and rows[-1] > 4


# ---- steps that go wrong -----------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_told(recipe: Make, opened: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(recipe(tmp_path, {"tokens": 3 * 128, "checkpoint.every": 99}), opened)
    trainer.train_step()
    before, state = weights(trainer), {k: v.clone() for k, v in trainer.optimizer.state_dict().items()}
    spoilt = trainer.model.model.norm.weight  # one of many: the norm over all has to find it
    hook = spoilt.register_hook(lambda gradient: gradient * torch.tensor(float("nan")))  # type: ignore[operator]
    with Recorder(tmp_path, None, None) as recorder, Interrupts() as interrupts:
        step = trainer.train_step()
        recorder.record(step)
        assert equal(before, weights(trainer)) and equal(state, trainer.optimizer.state_dict())
        assert step.skipped and step.step == 2 and step.tokens == 2 * 128 and math.isnan(step.grad_norm)
        trainer.run(recorder, interrupts)
        hook.remove()
    metrics = read_metrics(tmp_path / METRICS)
    assert [s.skipped for s in metrics.steps] == [True, True]
    assert [(e.step, e.message) for e in metrics.events] == [(3, "skipped, its gradient is not finite")]
    assert equal(before, load_file_weights(checkpoints(tmp_path / CHECKPOINTS)[-1]))


def load_file_weights(folder: Path) -> dict[str, Tensor]:
    model, _ = load(folder)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_training_goes_on_after_a_skipped_step(recipe: Make, opened: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(recipe(tmp_path, {}), opened)
    spoilt = trainer.model.model.norm.weight
    for _ in range(SKIPPED_MOST // 2):  # never so many in a row
        hook = spoilt.register_hook(lambda gradient: gradient * torch.tensor(float("inf")))  # type: ignore[operator]
        if trainer.finished:
            break
        assert trainer.train_step().skipped
        hook.remove()
        if not trainer.finished:
            assert not trainer.train_step().skipped
    assert trainer.optimizer.step_count == 6


def test_a_diverged_training_ends_with_what_to_do(recipe: Make, mistake: Callable[..., str], tmp_path: Path) -> None:
    changes = {"optim.muon_lr": 1e30, "optim.adam_lr": 1e30, "tokens": 99 * 128, "optim.warmup": 0.0}
    told = mistake(recipe(tmp_path / "run", changes))
    assert "the gradients of the last 20 steps were not finite: go back with --resume-step, or start anew" in told
    metrics = read_metrics(tmp_path / "run" / METRICS)
    assert [step.skipped for step in metrics.steps[-SKIPPED_MOST + 1 :]] == [True] * (SKIPPED_MOST - 1)
    assert checkpoints(tmp_path / "run" / CHECKPOINTS)


# ---- what comes out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe: Make, dense: Qwen3Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of finished trainings of both architectures, pictures and samples included."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"tokens": 6 * 128, "samples.every": 4, "validation.every": 3}
    final = train(recipe(folder / "sparse", changes), write=written_text)
    other = train(recipe(folder / "dense", changes | {"model": dense}))
    return {"sparse": final, "dense": other}


def written_text(model: Model, tokenizer: Tokenizer, prompt: str, most: int) -> str:
    assert not model.training and tokenizer.vocab_size == 300
    return f" {prompt} and {most} more"


@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_transformers_reads_the_trained_model(family: str, finished: dict[str, Path]) -> None:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(finished[family], output_loading_info=True)
    theirs, report = loaded
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ours, tokenizer = load(finished[family])
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode("the old man sees a small boat at the harbour. " * 6)])
    with torch.no_grad():
        found, expected = ours(ids), theirs.eval()(ids, use_cache=False).logits
    assert (found - expected).norm() < EXPORTED * expected.norm()
    again = transformers.AutoTokenizer.from_pretrained(finished[family])
    assert again("the grey sea")["input_ids"] == tokenizer.encode("the grey sea")


def test_the_trained_model_keeps_its_multi_token_prediction(finished: dict[str, Path]) -> None:
    with safe_open(finished["sparse"] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for name in ("mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.experts.4.down_proj.weight"):
        assert name in names
    assert load(finished["sparse"])[0].config.num_nextn_predict_layers == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_a_model_read_and_written_again_is_the_same_bytes(
    family: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load(finished[family])
    save_model(model, tmp_path, tokenizer=tokenizer)
    names = sorted(path.name for path in finished[family].iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and "model.safetensors" in names
    for name in names:
        assert (tmp_path / name).read_bytes() == (finished[family] / name).read_bytes(), name


def test_the_story_of_a_training_is_whole(finished: dict[str, Path]) -> None:
    run = finished["sparse"].parent
    metrics = read_metrics(run / METRICS)
    assert [step.step for step in metrics.steps] == [1, 2, 3, 4, 5, 6]
    assert [step.tokens for step in metrics.steps] == [128 * n for n in range(1, 7)]
    assert [(v.step, v.tokens) for v in metrics.validations] == [(0, 0), (3, 384), (6, 768)]
    assert [(s.step, s.prompt, s.text) for s in metrics.samples] == [(n, "the", " the and 4 more") for n in (4, 6)]
    last = metrics.steps[-1]
    assert last.seconds_left == 0.0 and last.utilisation is not None and 0 < last.utilisation < 1
    assert last.memory_gb > 0.05 and last.steps_total == 6
    assert metrics.validations[-1].loss < metrics.validations[0].loss
    assert [path.name for path in checkpoints(run / CHECKPOINTS)] == ["step-00000004", "step-00000006"]
    for picture in ("loss", "throughput", "optimizer", "router"):
        assert (run / f"{picture}.png").stat().st_size > 1000
    assert (run / RECIPE).is_file()


def test_the_last_checkpoint_is_the_trained_model(finished: dict[str, Path]) -> None:
    last = checkpoints(finished["sparse"].parent / CHECKPOINTS)[-1]
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((last / name).read_bytes() == (finished["sparse"] / name).read_bytes() for name in names)
    state: dict[str, Any] = json.loads((last / "trainer.json").read_text())
    assert state["step"] == 6 and state["tokens"] == 768 and load_file(last / "trainer.safetensors")


@pytest.mark.usefixtures("no_pictures")
def test_what_is_only_watched_does_not_change_the_training(recipe: Make, tmp_path: Path) -> None:
    quiet = {"tokens": 4 * 128, "validation.every": 99, "checkpoint.every": 99}
    busy = {"tokens": 4 * 128, "validation.every": 1, "checkpoint.every": 1, "samples.every": 1}
    runs = [train(recipe(tmp_path / "quiet", quiet)), train(recipe(tmp_path / "busy", busy), write=written_text)]
    stories = [read_metrics(run.parent / METRICS) for run in runs]
    assert losses(stories[0]) == losses(stories[1]) and len(stories[1].validations) == 5
    first, second = ((run / "model.safetensors").read_bytes() for run in runs)
    assert first == second


@pytest.mark.usefixtures("no_pictures")
def test_bfloat16_trains_too_with_weights_in_float32(recipe: Make, tmp_path: Path) -> None:
    final = train(recipe(tmp_path / "run", {"precision": "bfloat16", "tokens": 4 * 128}))
    metrics = read_metrics(tmp_path / "run" / METRICS)
    assert all(math.isfinite(step.loss) and not step.skipped for step in metrics.steps)
    assert metrics.validations[-1].loss < metrics.validations[0].loss
    assert {x.dtype for x in load_file(final / "model.safetensors").values()} == {torch.float32}
