"""The recipe of a training, everything that decides what comes out, and the folder that keeps to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from tyro.conf import AvoidSubcommands

from tenfold.config import load_toml, to_toml
from tenfold.models import Config
from tenfold.models.shapes import SHAPES
from tenfold.ops.precision import multiplies_bfloat16
from tenfold.train.checkpoint import checkpoints, choose_checkpoint
from tenfold.train.corpus import CorpusConfig, build_corpus
from tenfold.train.data import Corpus
from tenfold.train.objective import ObjectiveConfig
from tenfold.train.optim import OptimConfig
from tenfold.train.parallel import Ranks
from tenfold.train.shards import write_atomic
from tenfold.train.sources import WIKITEXT

RECIPE, CHECKPOINTS, FINAL = "recipe.toml", "checkpoints", "final"
QWEN_VOCABULARY = 151_669  # tokens of the embedded tokenizer; for a smaller vocabulary one is trained
Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
SMALLEST_BATCH = 1 / 8  # of the full batch, where the batch grows
FREE = ("out", "device", "checkpoint", "validation", "samples")  # may change on a resume: the weights don't see them


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how much of it at a time."""

    corpus: Path = Path(WIKITEXT)  # folder of `tenfold data build`; WikiText-2 is built where it is needed
    sequence_length: int = 512  # tokens in a row
    batch_rows: int = 8  # of a full step, all processes together
    micro_rows: int | None = None  # of one forward pass in one process; without it all that a process gets
    batch_growth: float = 0.0  # the batch grows with the tokens seen to this power; 0.38 is a published fit


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving on the way; the end and an interruption are saved in any case."""

    every: int = 500  # steps
    keep: int = 2  # the last so many


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on text that is not trained on."""

    every: int = 100  # steps
    tokens: int = 65_536  # of the held-out split, at most


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text that the model writes meanwhile."""

    every: int = 200  # steps
    prompts: tuple[str, ...] = ("The history of",)
    max_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A recipe."""

    out: Path = Path("runs/train")  # folder of the results
    tokens: int = 4_000_000  # to train on, rounded to whole steps
    seed: int = 0  # of the weights and of the order of the data
    precision: Precision = "auto"  # of products; auto is bfloat16 where this device is faster in it
    device: Device = "auto"
    recompute: bool = False  # drop activations, and make them again in the backward pass: less memory, more time
    model: AvoidSubcommands[Config] = field(default_factory=lambda: SHAPES["tiny"])
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        data, mtp = self.data, self.objective.mtp_steps
        has_mtp = bool(getattr(self.model, "num_nextn_predict_layers", 0))
        counts = {
            "tokens": self.tokens,
            "data.batch_rows": data.batch_rows,
            "data.micro_rows": data.micro_rows or 1,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "validation.every": self.validation.every,
            "samples.every": self.samples.every,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if data.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be 2 or more, got {data.sequence_length}")
        if data.batch_growth < 0.0:
            raise ValueError(f"data.batch_growth must be 0 or more, got {data.batch_growth}")
        if data.sequence_length > self.model.max_position_embeddings:
            limit = self.model.max_position_embeddings
            raise ValueError(f"data.sequence_length {data.sequence_length} exceeds max_position_embeddings {limit}")
        if mtp < 0:
            raise ValueError(f"objective.mtp_steps must be 0 or more, got {mtp}")
        if mtp and not has_mtp:
            raise ValueError(f"objective.mtp_steps {mtp} needs model.num_nextn_predict_layers 1")
        if has_mtp and not mtp:
            raise ValueError("model.num_nextn_predict_layers 1 needs objective.mtp_steps of 1 or more")


def resolve(config: TrainConfig, resume: bool = False) -> TrainConfig:
    """The recipe with `auto` replaced by what this machine is, or by the precision that a run to resume has.

    Raises ValueError for a device that the machine lacks.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ValueError("device 'cuda': torch finds no GPU, or is a build for CPUs only; take device 'cpu'")
    device: Device = ("cuda" if gpu else "cpu") if config.device == "auto" else config.device
    precision = config.precision
    if precision == "auto" and resume and (config.out / RECIPE).is_file():
        precision = load_toml(TrainConfig, config.out / RECIPE).precision  # it was measured, and may come out otherwise
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return replace(config, device=device, precision=precision)


def step_rows(config: TrainConfig, world: int = 1) -> list[int]:
    """Rows of every step's batch, all processes together: the recipe's tokens, in whole steps.

    With `batch_growth` p a step that begins after a share s of the tokens has `batch_rows * s^p` rows, though not
    fewer than an eighth of `batch_rows`, in multiples of what the processes share.
    """
    data = config.data
    if data.batch_rows % world:
        raise ValueError(f"data.batch_rows {data.batch_rows} cannot be shared by {world} processes equally")
    total = max(1, round(config.tokens / data.sequence_length))
    rows: list[int] = []
    seen = 0
    while seen < total:
        share = (seen / total) ** data.batch_growth
        wanted = max(SMALLEST_BATCH, share) * data.batch_rows
        rows.append(max(1, round(wanted / world)) * world)
        seen += rows[-1]
    return rows


def start_from(config: TrainConfig, resume: bool, resume_step: int | None, is_main: bool) -> Path | None:
    """The checkpoint to go on from; None for a fresh start, for which the recipe is written into the run's folder.

    Raises ValueError where the run in the folder is another, or none was asked for and there is one.
    """
    root = config.out / CHECKPOINTS
    if resume or resume_step is not None:
        _check_unchanged(config)
        return choose_checkpoint(root, resume_step) if checkpoints(root) or resume_step is not None else None
    if checkpoints(root):
        raise ValueError(f"{config.out}: there is a run already; go on with --resume, or choose another --out")
    if is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out / RECIPE, to_toml(config).encode())
    return None


def _check_unchanged(config: TrainConfig) -> None:
    path = config.out / RECIPE
    if not path.is_file():
        raise ValueError(f"{config.out}: nothing to resume, there is no {RECIPE}; start without --resume")
    changed = [key for key in _differences(config, load_toml(TrainConfig, path)) if key.split(".")[0] not in FREE]
    if changed:
        raise ValueError(
            f"{path}: the run was started with another recipe, {', '.join(changed)} changed; "
            "resume with the recipe that it has, or start anew with another --out"
        )


def _differences(a: object, b: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields in which two configurations differ."""
    for name in (f.name for f in fields(a)):  # type: ignore[arg-type]
        left, right = getattr(a, name), getattr(b, name)
        if is_dataclass(left) and type(left) is type(right):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield prefix + name


def open_corpus(config: TrainConfig, ranks: Ranks, console: Console | None = None) -> Corpus:
    """The recipe's corpus; the embedded text is built into one beside the run, once.

    Raises ValueError where its tokens are not all in the model's vocabulary.
    """
    folder, vocabulary = config.data.corpus, config.model.vocab_size
    if str(folder) == WIKITEXT:
        own = None if vocabulary >= QWEN_VOCABULARY else vocabulary
        folder = config.out.parent / (f"{WIKITEXT}-{own}" if own else WIKITEXT)
        if ranks.is_main:
            build_corpus([WIKITEXT], folder, CorpusConfig(vocab_size=own), console=console)
        ranks.barrier()
    corpus = Corpus(folder)
    if corpus.vocab_size > vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has {corpus.vocab_size} tokens, but model.vocab_size is {vocabulary}; "
            f"set it to {corpus.vocab_size} or more, or build the corpus with --vocab-size {vocabulary}"
        )
    return corpus
