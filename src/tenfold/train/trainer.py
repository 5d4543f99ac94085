"""The trainer: a recipe in, a model and the story of its training out.

A run's folder holds `recipe.toml`, `metrics.jsonl`, `checkpoints/step-N`, pictures, and at the end the model, in
`final`. A run that was stopped, however it was, goes on from its last checkpoint as if nothing had happened: on one
machine losses and weights are those of a run that was never stopped, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models import ARCHITECTURES, Model
from tenfold.models.flops import training_flops
from tenfold.models.weights import save_model
from tenfold.ops.precision import matmul_gflops
from tenfold.tokenizer import Tokenizer
from tenfold.train.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from tenfold.train.data import Batch, Corpus, PackedLoader, split_rows, validation_batches
from tenfold.train.interrupts import Interrupts
from tenfold.train.metrics import Event, Sample, StepMetrics, Validation
from tenfold.train.objective import balance_loss, count_labels, forward, router_counts, stack_counts
from tenfold.train.optim import Optimizer, learning_rate_factor
from tenfold.train.parallel import Ranks
from tenfold.train.plots import write_plots
from tenfold.train.recipe import CHECKPOINTS, FINAL, TrainConfig, open_corpus, resolve, start_from, step_rows
from tenfold.train.recorder import Recorder

Write = Callable[[Model, Tokenizer, str, int], str]  # continues a prompt by at most so many tokens
SKIPPED_MOST = 20  # steps in a row whose gradient is not finite: the weights are lost
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    config: TrainConfig,
    resume: bool = False,
    resume_step: int | None = None,
    write: Write | None = None,
    console: Console | None = None,
) -> Path:
    """Trains by the recipe and returns the folder of the finished model.

    resume: go on from the last checkpoint, or from that of `resume_step`.
    write: what the model's samples are written with; there are none without it.
    Raises ValueError for a recipe that can't be, or that isn't the one of the run in its folder; OSError where a file
    can't be written; KeyboardInterrupt after an interruption, with everything saved.
    """
    config = resolve(config, resume or resume_step is not None)
    ranks = Ranks(config.device)
    try:
        checkpoint = start_from(config, resume, resume_step, ranks.is_main)
        ranks.barrier()
        corpus = open_corpus(config, ranks, console)
        with Interrupts() as interrupts:
            trainer = Trainer(config, corpus, ranks, checkpoint)
            with Recorder(config.out, trainer.step if checkpoint else None, console, ranks.is_main) as recorder:
                finished = trainer.run(recorder, interrupts, write)
        if not finished:
            raise KeyboardInterrupt
        return trainer.finish()
    finally:
        ranks.close()


class Step(NamedTuple):
    """What the passes of a step found, over the whole batch: losses are means over their labels."""

    loss: float
    mtp_loss: float
    balance: float
    counts: Tensor | None  # router choices int64 [layers, E]


class Trainer:
    """A training in one process, from fresh weights or from a checkpoint."""

    def __init__(self, config: TrainConfig, corpus: Corpus, ranks: Ranks, checkpoint: Path | None = None) -> None:
        self.config, self.corpus, self.ranks = config, corpus, ranks
        data = config.data
        self.rows = step_rows(config, ranks.world)
        length = data.sequence_length
        self.loader = PackedLoader(corpus, "train", length, data.batch_rows, config.seed, ranks.rank, ranks.world)
        self.held_out = list(validation_batches(corpus, length, data.batch_rows, config.validation.tokens))
        self.dtype = DTYPES[config.precision]
        self.peak_flops = matmul_gflops(self.dtype, config.device) * 1e9 * ranks.world
        self.step, self.tokens, self.flops, self.seconds, self.skipped = 0, 0, 0.0, 0.0, 0
        self.begun, self.seconds_before, self.first_step = time.perf_counter(), 0.0, 0
        self.saved = 0  # step of the last checkpoint
        if checkpoint is None:
            self.model: Model = ARCHITECTURES[config.model.model_type][1](config.model)  # type: ignore[arg-type]
            self.model.init_weights(torch.Generator().manual_seed(config.seed))
            self.optimizer = Optimizer(self.model.to(ranks.device), config.optim)
        else:
            self._restore(checkpoint)
        self.model.recompute = config.recompute

    # ---- the loop ------------------------------------------------------------------------------------------

    def run(self, recorder: Recorder, interrupts: Interrupts, write: Write | None = None) -> bool:
        """Trains to the end and returns True, or to an interruption and returns False. Saves in either case."""
        reset_peak_memory()
        if self.step == 0:
            recorder.record(self.validate())
        while not self.finished:
            metrics = self.train_step()
            recorder.record(metrics)
            if metrics.skipped:
                recorder.record(Event(step=self.step, message="skipped, its gradient is not finite"))
            self._at_intervals(recorder, write)
            if any(self.ranks.totals(interrupts.asked)) and not self.finished:
                self.save()
                recorder.record(Event(step=self.step, message="interrupted and saved; go on with --resume"))
                return False
        return True

    def _at_intervals(self, recorder: Recorder, write: Write | None) -> None:
        config, step = self.config, self.step
        if step % config.validation.every == 0 or self.finished:
            recorder.record(self.validate())
        if write is not None and self.ranks.is_main and (step % config.samples.every == 0 or self.finished):
            for prompt in config.samples.prompts:
                recorder.record(self.sample(prompt, write))
        if step % config.checkpoint.every == 0 or self.finished:
            self.save()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == len(self.rows)

    @property
    def seconds_total(self) -> float:
        """Time since the training began, without the pauses between an interruption and a resume."""
        return self.seconds_before + time.perf_counter() - self.begun

    # ---- a step --------------------------------------------------------------------------------------------

    def train_step(self) -> StepMetrics:
        """Forward and backward passes over the next batch, and an update unless the gradient is not finite."""
        begin = time.perf_counter()
        rows = self.rows[self.step]
        batches = split_rows(self.loader.next_batch(rows), self.config.data.micro_rows)
        step = self._passes(batches)
        norm = self._clip_gradients()
        finite = math.isfinite(norm) and math.isfinite(step.loss)
        factor = learning_rate_factor(self.config.optim, self.step, len(self.rows))
        if finite:
            self.optimizer.step(factor)
        self.optimizer.zero_grad()
        self._count_skipped(finite)
        seconds, tokens = time.perf_counter() - begin, rows * self.config.data.sequence_length
        flops = tokens * self._token_flops(len(batches) > 1) + self.optimizer.flops_per_step()
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.flops, self.seconds = self.flops + flops, self.seconds + seconds
        return self._metrics(step, norm, factor, not finite, tokens / seconds, flops / seconds)

    def _passes(self, batches: list[Batch]) -> Step:
        """Gradients of the whole batch's loss, micro-batch by micro-batch, added up over ranks."""
        objective = self.config.objective
        labels = [count_labels(b.labels, b.cu_seqlens, objective.mtp_steps) for b in batches]
        each = (sum(n.next_token for n in labels), sum(n.mtp for n in labels), sum(b.labels.numel() for b in batches))
        next_labels, mtp_labels, tokens = (max(1, int(total)) for total in self.ranks.totals(*each))
        counts = self._counts(batches) if len(batches) > 1 else None
        sums = [0.0, 0.0, 0.0]
        for batch in batches:
            ids, targets, borders = (x.to(self.ranks.device) for x in batch)
            with self._autocast():
                out = forward(self.model, ids, targets, borders, objective.mtp_steps)
            loss, mtp_loss, balance = out.loss / next_labels, out.mtp_loss / mtp_labels, out.loss.new_zeros(())
            if out.loads:
                counts = self.ranks.sum(stack_counts(out.loads)) if counts is None else counts
                balance = balance_loss(out.loads, counts, tokens)
            (loss + objective.mtp_weight * mtp_loss + objective.balance * balance).backward()
            sums = [total + float(x.detach()) for total, x in zip(sums, (loss, mtp_loss, balance), strict=True)]
        self.ranks.sum_gradients(self.model.parameters())
        loss, mtp_loss, balance = self.ranks.totals(*sums)
        return Step(loss, mtp_loss, balance, counts)

    def _counts(self, batches: list[Batch]) -> Tensor | None:
        """The router's choices over the whole batch, which the balance loss of its first part needs already."""
        if not getattr(self.model.config, "num_experts", 0):
            return None
        counted = []
        for batch in batches:
            with self._autocast():
                ids, borders = batch.input_ids.to(self.ranks.device), batch.cu_seqlens.to(self.ranks.device)
                counted.append(router_counts(self.model, ids, borders, self.config.objective.mtp_steps))
        return self.ranks.sum(torch.stack(counted).sum(0))

    def _clip_gradients(self) -> float:
        """The gradient's norm; a larger one than the recipe's `clip` is brought down to it."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if math.isfinite(norm):
            clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        return float(norm)

    def _count_skipped(self, finite: bool) -> None:
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped == SKIPPED_MOST:
            raise ValueError(
                f"the gradients of the last {SKIPPED_MOST} steps were not finite: go back with --resume-step, "
                "or start anew with lower learning rates"
            )

    def _token_flops(self, accumulates: bool) -> float:
        config = self.config
        mtp, context = config.objective.mtp_steps, self.loader.mean_context
        return training_flops(config.model, context, mtp, config.recompute, counting_pass=accumulates)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.config.device, self.dtype, enabled=self.dtype != torch.float32)

    def _metrics(
        self, step: Step, norm: float, factor: float, skipped: bool, tokens_per_second: float, flops_per_second: float
    ) -> StepMetrics:
        optim, load = self.config.optim, None if step.counts is None else step.counts.double()
        pace = (self.seconds_total - self.seconds_before) / (self.step - self.first_step)
        return StepMetrics(
            step=self.step,
            steps_total=len(self.rows),
            tokens=self.tokens,
            loss=step.loss,
            lr=factor * (optim.muon_lr if optim.kind == "muon" else optim.adam_lr),
            grad_norm=norm,
            tokens_per_second=tokens_per_second,
            flops_per_second=flops_per_second,
            utilisation=flops_per_second / self.peak_flops,
            seconds_elapsed=self.seconds_total,
            seconds_left=pace * (len(self.rows) - self.step),
            balance_loss=None if load is None else step.balance,
            load_ratio=() if load is None else tuple((load.amax(-1) / load.mean(-1)).tolist()),
            dead_share=() if load is None else tuple((load == 0).double().mean(-1).tolist()),
            mtp_loss=step.mtp_loss if self.config.objective.mtp_steps else None,
            skipped=skipped,
            memory_gb=peak_memory_gb(),
        )

    # ---- beside the steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> Validation:
        """Next-token loss on the held-out text."""
        loss, labels = 0.0, 0
        for batch in self.held_out[self.ranks.rank :: self.ranks.world]:
            ids, targets, borders = (x.to(self.ranks.device) for x in batch)
            with self._autocast():
                loss += float(forward(self.model, ids, targets, borders, mtp_steps=0).loss)
            labels += count_labels(batch.labels, batch.cu_seqlens, mtp_steps=0).next_token
        loss, count = self.ranks.totals(loss, labels)
        return Validation(step=self.step, tokens=self.tokens, loss=loss / count, flops=self.flops, seconds=self.seconds)

    def sample(self, prompt: str, write: Write) -> Sample:
        """How the model goes on after a prompt."""
        self.model.eval()
        text = write(self.model, self.corpus.tokenizer, prompt, self.config.samples.max_tokens)
        self.model.train()
        return Sample(step=self.step, prompt=prompt, text=text)

    def save(self) -> None:
        """Writes a checkpoint unless this step has one; every process has to call it. Raises OSError."""
        if self.ranks.is_main and self.saved != self.step:
            state = TrainerState(
                step=self.step,
                tokens=self.tokens,
                flops=self.flops,
                seconds=self.seconds,
                seconds_total=self.seconds_total,
                loader=self.loader.state_dict(),
            )
            root, tensors = self.config.out / CHECKPOINTS, self.optimizer.state_dict()
            save_checkpoint(root, self.model, tensors, state, self.corpus.tokenizer, self.config.checkpoint.keep)
        self.saved = self.step
        self.ranks.barrier()

    def _restore(self, checkpoint: Path) -> None:
        model, tensors, state = load_checkpoint(checkpoint)
        self.model = model.to(self.ranks.device).train()
        self.optimizer = Optimizer(self.model, self.config.optim)
        self.optimizer.load_state_dict(tensors)
        self.loader.load_state_dict(state.loader)
        self.step, self.tokens, self.flops, self.seconds = state.step, state.tokens, state.flops, state.seconds
        self.seconds_before, self.first_step, self.saved = state.seconds_total, state.step, state.step

    def finish(self) -> Path:
        """Writes the finished model and the pictures; returns the model's folder."""
        final = self.config.out / FINAL
        if self.ranks.is_main:
            save_model(self.model, final, tokenizer=self.corpus.tokenizer)
            write_plots(self.config.out)
        self.ranks.barrier()
        return final
