"""The demo: the dense predecessor, twice, and Qwen3-Next, trained with everything else held fixed.

Tokenizer, text and its order, validation set, sequence length, precision and machine are the same for all arms. D0 is
what the predecessor was: AdamW, cosine, many tokens for each parameter. D2 is the strong control: dense, with all of
Qwen3-Next's recipe, and of the size that spends its budget best. N1 is the whole Qwen3-Next block.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from tenfold import __version__
from tenfold.models import Config
from tenfold.models.info import describe
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import build_on_meta, load_model
from tenfold.ops.precision import matmul_gflops
from tenfold.study.report import (
    CONTROL,
    NEW,
    OLD,
    ArmReport,
    CurvePoint,
    DemoReport,
    Sample,
    print_summary,
    ratios,
    write_report,
)
from tenfold.train.data import Corpus, validation_batches
from tenfold.train.metrics import METRICS, Metrics, read_metrics
from tenfold.train.objective import ObjectiveConfig, router_counts
from tenfold.train.optim import OptimConfig, Optimizer
from tenfold.train.parallel import Ranks
from tenfold.train.recipe import (
    FINAL,
    RECIPE,
    CheckpointConfig,
    DataConfig,
    Precision,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
    open_corpus,
    resolve,
)
from tenfold.train.sources import WIKITEXT
from tenfold.train.trainer import DTYPES, Write, train

PROMPTS = (" = History of the city = \n\n The city", " The film was released in")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo trains on this machine."""

    out: Path = Path("runs/demo")  # folder of the report, and of a folder for each arm
    corpus: Path = Path(WIKITEXT)  # folder of `tenfold data build` with 4,096 tokens at most, or wikitext-2
    seed: int = 0  # of weights and data; FLOPs to equal loss are the same for the same seed
    scale: float = 1.0  # of every arm's tokens; below 1 for a quick look
    precision: Precision = "float32"  # of products; matrices as small as these gain nothing from bfloat16

    def __post_init__(self) -> None:
        if not 0.0 < self.scale <= 1000.0:
            raise ValueError(f"scale must be above 0 and at most 1000, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model to train, and how the report names it."""

    name: str
    title: str
    recipe: TrainConfig


def run_demo(config: DemoConfig, write: Write, console: Console | None = None) -> None:
    """Trains the arms, or goes on where they were, and writes `report.json` and `report.html`.

    Raises ValueError where the folder holds a demo of other settings, and what `train` raises.
    """
    console = console or Console()
    arms = demo_arms(config)
    for number, arm in enumerate(arms, start=1):
        console.print(f"\n[bold]{arm.name}[/], {number} of {len(arms)}: {arm.title}")
        train(arm.recipe, resume=(arm.recipe.out / RECIPE).is_file(), write=write, console=console)
    report = make_report(config, arms)
    write_report(report, config.out)
    console.print()
    print_summary(report, console)
    console.print(f"\n{config.out / 'report.html'}: the whole report", soft_wrap=True)
    for arm in arms:
        console.print(f"{arm.recipe.out / FINAL}: the model {arm.name}", soft_wrap=True)


# ---- the arms ----------------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 4096, 512
DENSE_OLD = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=96,
    intermediate_size=288,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=4096,
    rope_theta=10_000.0,
)
DENSE_CONTROL = replace(DENSE_OLD, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
HYBRID = Qwen3NextConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    rope_theta=10_000.0,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    num_experts=64,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
)
BALANCE = 1e-2  # ten times the released coefficient: a short training has to balance its routers at once


def demo_arms(config: DemoConfig) -> list[Arm]:
    """The three arms. Learning rates are the best of the trials in docs/log.md."""
    old = OptimConfig(kind="adamw", adam_lr=3e-3, schedule="cosine", final_lr=0.1)
    ours = OptimConfig(muon_lr=0.006, adam_lr=0.02)
    chosen = [
        (OLD, "Qwen3, dense, as it was trained", DENSE_OLD, old, 1_300_000),
        (CONTROL, "Qwen3, dense, with Qwen3-Next's recipe", DENSE_CONTROL, ours, 450_000),
        (NEW, "Qwen3-Next, hybrid and sparse", HYBRID, ours, 440_000),
    ]
    first = TrainConfig(out=config.out / OLD.lower(), seed=config.seed, precision=config.precision)
    base = resolve(first, resume=True)  # once: the same precision for all arms, today's and those of an earlier start
    return [
        Arm(name=name, title=title, recipe=_recipe(base, config, name, model, optim, round(tokens * config.scale)))
        for name, title, model, optim, tokens in chosen
    ]


def _recipe(
    base: TrainConfig, config: DemoConfig, name: str, model: Config, optim: OptimConfig, tokens: int
) -> TrainConfig:
    data = DataConfig(corpus=config.corpus, sequence_length=LENGTH, batch_rows=4)
    steps = max(1, tokens // (data.batch_rows * data.sequence_length))
    return replace(
        base,
        out=config.out / name.lower(),
        tokens=max(1, tokens),
        model=model,
        data=data,
        objective=ObjectiveConfig(balance=BALANCE),
        optim=optim,
        checkpoint=CheckpointConfig(every=max(1, steps // 4), keep=1),
        validation=ValidationConfig(every=max(1, steps // 10), tokens=32_768),
        samples=SampleConfig(every=steps + 1, prompts=PROMPTS, max_tokens=80),
    )


# ---- what came out -----------------------------------------------------------------------------------------


def make_report(config: DemoConfig, arms: Sequence[Arm]) -> DemoReport:
    """Everything that the finished arms have recorded."""
    recipe = arms[0].recipe
    corpus = open_corpus(recipe, Ranks("cpu"))
    peak = matmul_gflops(DTYPES[recipe.precision], recipe.device)
    reports = [_arm_report(arm, corpus, peak) for arm in arms]
    data = recipe.data
    held_out = validation_batches(corpus, data.sequence_length, data.batch_rows, recipe.validation.tokens)
    return DemoReport(
        tenfold_version=__version__,
        torch_version=torch.__version__,
        date=datetime.date.today().isoformat(),
        machine=machine_name(),
        threads=torch.get_num_threads(),
        matmul_peak_gflops=peak,
        precision=recipe.precision,
        seed=config.seed,
        corpus="WikiText-2" if str(config.corpus) == WIKITEXT else str(config.corpus),
        tokenizer_vocab=corpus.vocab_size,
        sequence_length=data.sequence_length,
        validation_tokens=sum(int((batch.labels >= 0).sum()) for batch in held_out),
        arms=reports,
        ratios=ratios(reports),
        caveats=[],
    )


def _arm_report(arm: Arm, corpus: Corpus, peak_gflops: float) -> ArmReport:
    recipe, optim = arm.recipe, arm.recipe.optim
    final = recipe.out / FINAL
    metrics, info = read_metrics(recipe.out / METRICS), describe(final)
    last, end = metrics.steps[-1], metrics.validations[-1]
    updates = sum(not step.skipped for step in metrics.steps)
    gflops = end.flops / end.seconds / 1e9
    return ArmReport(
        name=arm.name,
        title=arm.title,
        description=description(recipe),
        optimizer="AdamW" if optim.kind == "adamw" else "Muon and AdamW",
        schedule="cosine" if optim.schedule == "cosine" else "warmup-stable-decay",
        learning_rate=optim.adam_lr if optim.kind == "adamw" else optim.muon_lr,
        parameters_total=info.parameters,
        parameters_active=info.active_with_head,
        tokens=end.tokens,
        flops=end.flops,
        optimizer_flops=updates * Optimizer(build_on_meta(recipe.model), optim).flops_per_step(),
        seconds_steps=end.seconds,
        seconds_total=last.seconds_elapsed,
        tokens_per_second=end.tokens / end.seconds,
        gflops_per_second=gflops,
        utilisation=gflops / peak_gflops,
        peak_memory_gb=max(step.memory_gb for step in metrics.steps),
        final_validation_loss=end.loss,
        curve=_curve(metrics),
        train_curve=[(step.tokens, step.loss) for step in metrics.steps],
        samples=[Sample(prompt=s.prompt, text=s.text) for s in metrics.samples if s.step == last.step],
        router_load=router_load(final, recipe, corpus),
        checkpoint=str(final),
    )


def _curve(metrics: Metrics) -> list[CurvePoint]:
    return [
        CurvePoint(tokens=v.tokens, flops=v.flops, seconds=v.seconds, validation_loss=v.loss)
        for v in metrics.validations
    ]


def description(recipe: TrainConfig) -> str:
    """An arm in a sentence."""
    model, tokens = recipe.model, recipe.tokens / 1e6
    layers = f"{model.num_hidden_layers} layers of {model.hidden_size}"
    if isinstance(model, Qwen3Config):
        return f"{layers}, feed-forward of {model.intermediate_size}, {tokens:.2g} million tokens."
    attending = sum(kind == "full_attention" for kind in model.layer_kinds)
    return (
        f"{layers}, {attending} of them with gated attention and the others with Gated DeltaNet; "
        f"{model.num_experts_per_tok} of {model.num_experts} experts of {model.moe_intermediate_size} "
        f"and a shared one of {model.shared_expert_intermediate_size}, {tokens:.2g} million tokens."
    )


def router_load(final: Path, recipe: TrainConfig, corpus: Corpus) -> list[list[float]]:
    """Each layer's experts with their share of the choices on the held-out text; nothing for a dense model."""
    model = load_model(final)
    if isinstance(model.config, Qwen3Config):
        return []
    data = recipe.data
    batches = validation_batches(corpus, data.sequence_length, data.batch_rows, recipe.validation.tokens)
    counts = sum(
        (router_counts(model, b.input_ids, b.cu_seqlens, 0) for b in batches), torch.zeros((), dtype=torch.int64)
    )
    return (counts / counts.sum(-1, keepdim=True)).tolist()


def machine_name() -> str:
    """The processor, as its maker names it where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else name
