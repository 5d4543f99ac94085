"""What a recipe promises: mistakes are one line that says what to write, and a run keeps to what it began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.config import load_toml, to_toml
from tenfold.models.qwen3 import Qwen3Config
from tenfold.train import recipe as recipes
from tenfold.train.data import Corpus
from tenfold.train.metrics import METRICS, read_metrics
from tenfold.train.recipe import CHECKPOINTS, RECIPE, SMALLEST_BATCH, DataConfig, TrainConfig, resolve, step_rows
from tenfold.train.trainer import train

Make = Callable[..., TrainConfig]
Mistake = Callable[..., str]


# ---- steps -------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[TrainConfig, int]:
    """A recipe and a number of processes that can share its batch."""
    world = draw(st.integers(1, 8))
    data = DataConfig(
        sequence_length=draw(st.integers(2, 64)),
        batch_rows=world * draw(st.integers(1, 40)),
        batch_growth=draw(st.sampled_from([0.0, 0.38, 1.0]) | st.floats(0.0, 2.0)),
    )
    return TrainConfig(tokens=draw(st.integers(1, 100_000)), data=data), world


@given(batches())
def test_steps_cover_the_tokens_in_batches_that_only_grow(drawn: tuple[TrainConfig, int]) -> None:
    config, world = drawn
    data, rows = config.data, step_rows(*drawn)
    wanted = max(1, round(config.tokens / data.sequence_length))
    assert sum(rows[:-1]) < wanted <= sum(rows)  # and not a step more
    assert all(a <= b for a, b in pairwise(rows))
    assert all(r % world == 0 and world <= r <= data.batch_rows for r in rows)
    assert rows[0] >= data.batch_rows * SMALLEST_BATCH - world / 2  # an eighth, to the nearest that can be shared
    if not data.batch_growth:
        assert set(rows) == {data.batch_rows}
    for seen, count in zip([0, *accumulate(rows)], rows, strict=False):
        share = max(SMALLEST_BATCH, (seen / wanted) ** data.batch_growth)
        assert abs(count - share * data.batch_rows) <= world / 2 + 1e-6 or count == world


def test_rows_that_cannot_be_shared_are_told(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_rows 4 cannot be shared by 3 processes equally"):
        step_rows(recipe(tmp_path), 3)


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sparse", "dense"])
def test_a_recipe_is_read_as_it_was_written(
    family: str, recipe: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = recipe(tmp_path / "run", {"model": request.getfixturevalue(family)})
    (tmp_path / "a.toml").write_text(to_toml(config))
    assert load_toml(TrainConfig, tmp_path / "a.toml") == config


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("token = 5", "unknown key 'token', did you mean 'tokens'?"),
        ("[optim]\nmuon_lrr = 1", "optim: unknown key 'muon_lrr', did you mean 'muon_lr'?"),
        (
            '[model]\nmodel_type = "qwen3_next"\nnum_expert = 4',
            "model: unknown key 'num_expert', did you mean 'num_experts'",
        ),
        (
            '[model]\nmodel_type = "qwen3"\nhidden_sise = 4',
            "model: unknown key 'hidden_sise', did you mean 'hidden_size'?",
        ),
        ('[model]\nmodel_type = "qwen3"\nnum_experts = 4', "model: unknown key 'num_experts', did you mean"),
        ('[model]\nmodel_type = "qwen4"', "model.model_type: expected one of 'qwen3_next', 'qwen3', got 'qwen4'"),
        ("[model]\nvocab_size = 0", "model: vocab_size must be 1 or more, got 0"),
        ("[model]\nnum_experts_per_tok = 9\nnum_experts = 8", "num_experts_per_tok 9 exceeds num_experts 8"),
        ('tokens = "many"', "tokens: expected an integer, got str 'many'"),
        ("tokens = 0", "tokens must be 1 or more, got 0"),
        ("[data]\nbatch_rows = 0", "data.batch_rows must be 1 or more, got 0"),
        ("[data]\nmicro_rows = -1", "data.micro_rows must be 1 or more, got -1"),
        ("[data]\nsequence_length = 1", "data.sequence_length must be 2 or more, got 1"),
        ("[data]\nbatch_growth = -0.1", "data.batch_growth must be 0 or more, got -0.1"),
        ("[checkpoint]\nkeep = 0", "checkpoint.keep must be 1 or more, got 0"),
        ("[optim]\nclip = 0", "optim.clip must be above 0, got 0"),
        ('[optim]\nkind = "sgd"', "optim.kind: expected one of 'muon', 'adamw', got str 'sgd'"),
        ("[objective]\nmtp_steps = 2", "objective.mtp_steps 2 needs model.num_nextn_predict_layers 1"),
        ("[objective]\nmtp_steps = -1", "objective.mtp_steps must be 0 or more, got -1"),
        ("[model]\nnum_nextn_predict_layers = 1", "model.num_nextn_predict_layers 1 needs objective.mtp_steps of 1"),
        ("[data]\nsequence_length = 999999", "data.sequence_length 999999 exceeds max_position_embeddings"),
        ("tokens 5", "not a TOML file"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(lines: str, complaint: str, mistake: Mistake, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"{lines}\n")
    told = mistake(path, "--out", str(tmp_path / "run"))
    assert str(path) in told and complaint in told
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_told(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': torch finds no GPU, or is a build for CPUs only"):
        resolve(replace(recipe(tmp_path), device="cuda"))
    assert resolve(replace(recipe(tmp_path), device="auto")).device == "cpu"


@pytest.mark.parametrize(("faster", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_the_precision_in_which_the_device_is_fast(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool, precision: str
) -> None:
    monkeypatch.setattr(recipes, "multiplies_bfloat16", lambda device: faster)
    assert resolve(replace(recipe(tmp_path), precision="auto")).precision == precision


# ---- the corpus --------------------------------------------------------------------------------------------


def test_a_larger_vocabulary_than_the_models_is_told(recipe: Make, mistake: Mistake, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", {"model.vocab_size": 290})
    told = mistake(config)
    assert (
        f"{config.data.corpus}: its tokenizer has 300 tokens, but model.vocab_size is 290; set it to 300 or more"
        in told
    )


def copied(corpus: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_corrupt_shard_is_one_line(recipe: Make, mistake: Mistake, corpus: Path, tmp_path: Path) -> None:
    folder = copied(corpus, tmp_path / "corpus")
    shard = next(folder.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.write_bytes(content)
    told = mistake(recipe(tmp_path / "run", {"data.corpus": folder}))
    assert f"damaged corpus: {shard} has sha256" in told and "build it again" in told


def test_a_corpus_that_is_not_there_is_one_line(recipe: Make, mistake: Mistake, tmp_path: Path) -> None:
    told = mistake(recipe(tmp_path / "run", {"data.corpus": tmp_path / "nowhere"}))
    assert f"{tmp_path / 'nowhere'}: no corpus, for it has no index.json" in told


# ---- the run's folder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of four steps with checkpoints of steps 2 and 4."""
    config = recipe(tmp_path_factory.mktemp("run") / "run", {"tokens": 4 * 128, "checkpoint.every": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenfold.train.trainer.write_plots", lambda folder: [])
        train(config)
    return config


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "there is a run already; go on with --resume, or choose another --out"),
        (("--resume", "--seed", "1"), "the run was started with another recipe, seed changed; resume with the recipe"),
        (("--resume", "--optim.muon-lr", "0.5", "--data.micro-rows", "1"), "data.micro_rows, optim.muon_lr changed"),
        (("--resume", "--model.hidden-size", "48"), "model.hidden_size changed"),
        (("--resume-step", "3"), "no checkpoint of step 3 under"),
        (("--resume-step", "3", "--seed", "1"), "seed changed"),
    ],
)
def test_a_run_is_not_mixed_with_another(
    options: tuple[str, ...], complaint: str, run: TrainConfig, mistake: Mistake
) -> None:
    before = content(run.out)
    told = mistake(run, *options)
    assert str(run.out) in told and complaint in told
    assert content(run.out) == before


def test_another_architecture_is_not_resumed(run: TrainConfig, mistake: Mistake, dense: Qwen3Config) -> None:
    objective = replace(run.objective, mtp_steps=0)
    before = content(run.out)
    assert "objective.mtp_steps" in mistake(replace(run, model=dense, objective=objective), "--resume")
    assert content(run.out) == before


def test_there_has_to_be_something_to_resume(recipe: Make, mistake: Mistake, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run")
    assert f"{config.out}: nothing to resume, there is no recipe.toml; start without --resume" in mistake(
        config, "--resume"
    )
    assert not config.out.exists()


def test_a_file_where_the_folder_should_be_is_told(recipe: Make, mistake: Mistake, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run")
    config.out.write_text("precious")
    assert str(config.out) in mistake(config)
    assert config.out.read_text() == "precious"
    mistake(config, "--resume")
    assert config.out.read_text() == "precious"


@pytest.mark.usefixtures("no_pictures")
def test_what_the_weights_do_not_see_may_change(run: TrainConfig) -> None:
    changed = replace(run, validation=replace(run.validation, every=1), checkpoint=replace(run.checkpoint, every=3))
    whole = (run.out / "final" / "model.safetensors").read_bytes()
    final = train(changed, resume_step=2)
    assert (final / "model.safetensors").read_bytes() == whole
    assert [v.step for v in read_metrics(run.out / METRICS).validations] == [0, 3, 4]


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_has_nothing_left_to_do(run: TrainConfig) -> None:
    before = content(run.out)
    train(run, resume=True)
    assert content(run.out) == before


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_a_checkpoint_yet_starts_again(recipe: Make, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", {"tokens": 2 * 128})
    final = train(config)
    whole = (final / "model.safetensors").read_bytes()
    for path in sorted(tmp_path.glob("run/checkpoints/*/*")):
        path.unlink()
    train(config, resume=True)
    assert (final / "model.safetensors").read_bytes() == whole
    assert [step.step for step in read_metrics(config.out / METRICS).steps] == [1, 2]


@pytest.mark.usefixtures("no_pictures")
def test_a_measured_precision_stays_that_of_the_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe(tmp_path / "run", {"tokens": 4 * 128, "checkpoint.every": 2}), precision="auto")
    monkeypatch.setattr(recipes, "multiplies_bfloat16", lambda device: True)
    final = train(config)
    whole = (final / "model.safetensors").read_bytes()
    monkeypatch.setattr(recipes, "multiplies_bfloat16", lambda device: False)  # another day, another measurement
    assert train(config, resume_step=2) == final
    assert (final / "model.safetensors").read_bytes() == whole
    assert load_toml(TrainConfig, config.out / RECIPE).precision == "bfloat16"
    assert (config.out / CHECKPOINTS).is_dir() and Corpus(config.data.corpus).vocab_size == 300
