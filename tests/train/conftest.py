"""What the trainer's tests share: a corpus of small text, a recipe that takes a second, and the command to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tenfold import cli
from tenfold.config import to_toml
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.train import trainer
from tenfold.train.corpus import CorpusConfig, build_corpus
from tenfold.train.data import Corpus
from tenfold.train.objective import ObjectiveConfig
from tenfold.train.recipe import CheckpointConfig, DataConfig, SampleConfig, TrainConfig, ValidationConfig

VOCABULARY, LENGTH, ROWS, STEPS = 300, 32, 4, 12
SUBJECTS = ("the old man", "a small boat", "the grey sea", "my sister", "every child", "the last train")
VERBS = ("sees", "follows", "leaves", "remembers", "turns to", "waits for")
PLACES = ("at the harbour", "in the evening", "without a word", "under the bridge", "once more", "before the rain")
TINY = Qwen3NextConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=3,
    full_attention_interval=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_nextn_predict_layers=1,
)
PROGRAM = ("-m", "tenfold")
WITHOUT_PICTURES = """
from tenfold import cli
from tenfold.train import trainer
trainer.write_plots = lambda run: []
raise SystemExit(cli.main())
"""
DENSE = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)


def documents(count: int) -> list[str]:
    """Sentences of few words, a few to a document; of our own numbers, which no library's version changes."""
    state, texts = 1, []

    def pick(options: tuple[str, ...]) -> str:
        nonlocal state
        state = (state * 1103515245 + 12345) % 2**31
        return options[(state >> 16) % len(options)]

    for number in range(count):
        sentences = [f"{pick(SUBJECTS)} {pick(VERBS)} {pick(SUBJECTS)} {pick(PLACES)}." for _ in range(1 + number % 5)]
        texts.append(f"{number}. {' '.join(sentences)}")
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a corpus with 300 tokens in its vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) + "\n" for text in documents(300)]
    (folder / "text.jsonl").write_text("".join(lines))
    config = CorpusConfig(vocab_size=VOCABULARY, validation_fraction=0.05)
    build_corpus([folder / "text.jsonl"], folder / "corpus", config, workers=1)
    return folder / "corpus"


@pytest.fixture(scope="session")
def opened(corpus: Path) -> Corpus:
    """The same corpus, opened."""
    return Corpus(corpus)


@pytest.fixture(scope="session")
def sparse() -> Qwen3NextConfig:
    """Qwen3-Next with all that it has: both kinds of layers, experts, MTP."""
    return TINY


@pytest.fixture(scope="session")
def dense() -> Qwen3Config:
    """Its predecessor."""
    return DENSE


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Callable[..., TrainConfig]:
    """`recipe(out, {"optim.kind": "adamw"})`: the tiny recipe with changes by dotted name."""
    tiny = TrainConfig(
        tokens=STEPS * ROWS * LENGTH,
        precision="float32",
        device="cpu",
        model=TINY,
        data=DataConfig(corpus=corpus, sequence_length=LENGTH, batch_rows=ROWS, micro_rows=2),
        objective=ObjectiveConfig(mtp_steps=2, balance=0.01),
        checkpoint=CheckpointConfig(every=4, keep=2),
        validation=ValidationConfig(every=6, tokens=256),
        samples=SampleConfig(every=1000, prompts=("the",), max_tokens=4),
    )

    def make(out: Path, changes: Mapping[str, object] | None = None) -> TrainConfig:
        changed = replace(tiny, out=out)
        changes = dict(changes or {})
        if isinstance(changes.get("model"), Qwen3Config):
            changes.setdefault("objective.mtp_steps", 0)
        return _changed(changed, changes)

    return make


def _changed(config: Any, changes: Mapping[str, object]) -> Any:
    """All changes at once, for the checks of a configuration see the whole."""
    inner: dict[str, dict[str, object]] = {}
    outer: dict[str, object] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            outer[first] = value
    for first, values in inner.items():
        table = outer.get(first, getattr(config, first))
        assert is_dataclass(table), first
        outer[first] = _changed(table, values)
    return replace(config, **outer)


@pytest.fixture(scope="session")
def written() -> Callable[[TrainConfig], Path]:
    """Writes a recipe beside its run and returns the file."""

    def write(config: TrainConfig) -> Path:
        path = config.out.with_suffix(".toml")
        path.write_text(to_toml(config))
        return path

    return write


@pytest.fixture(scope="session")
def start(written: Callable[[TrainConfig], Path]) -> Callable[..., subprocess.Popen[str]]:
    """`start(config, "--resume", program=...)`: the real command in a process of its own, one thread."""

    def popen(
        config: TrainConfig,
        *options: str,
        program: tuple[str, ...] = PROGRAM,
        pictures: bool = True,
        **variables: str,
    ) -> subprocess.Popen[str]:
        if not pictures:  # they take a second
            program = ("-c", WITHOUT_PICTURES)
        command = [sys.executable, *program, "train", str(written(config)), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | variables
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    return popen


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process draw no plots, which would take longer than they do."""
    monkeypatch.setattr(trainer, "write_plots", lambda run: [])


@pytest.fixture
def mistake(
    written: Callable[[TrainConfig], Path], capsys: pytest.CaptureFixture[str], no_pictures: None
) -> Callable[..., str]:
    """Runs the command in this process; it has to end with exit code 2 and one line, which is returned."""

    def run(config: TrainConfig | Path, *options: str) -> str:
        path = config if isinstance(config, Path) else written(config)
        assert cli.main(["train", str(path), *options]) == cli.MISTAKE
        told = capsys.readouterr().err
        assert told.startswith("tenfold: error: ") and told.count("\n") == 1, told
        return told

    return run
