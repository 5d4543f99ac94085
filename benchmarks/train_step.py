"""A training step of the shape "tiny", ours against that of transformers: same weights, same batches, same optimizer.

    python benchmarks/train_step.py [--rounds 10] [--threads 2] [--precision float32|bfloat16]

Gate: both lose the same, step by step. Steps alternate, ours and theirs, so that both meet the same neighbours on the
machine. Memory is the peak of a process of its own for each, over what it held before the model was made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from timing import Case, machine_lines, ratio, take_turns
from torch import Tensor
from transformers import AutoModelForCausalLM

from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models import Model
from tenfold.models.flops import mean_context, training_flops
from tenfold.models.qwen3_next import Qwen3Next
from tenfold.models.shapes import SHAPES
from tenfold.models.weights import load_model, save_model
from tenfold.ops.cross_entropy import linear_cross_entropy
from tenfold.ops.precision import matmul_gflops
from tenfold.train.optim import OptimConfig, Optimizer

BATCH, LENGTH = 8, 512
SHAPE = SHAPES["tiny"]
RATE = 1e-4
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # relative: rounding of one step's products, grown over the run
MEMORY_STEPS = 3
Step = Callable[[Tensor], float]  # trains on tokens [B, T] and returns the loss


def ours(folder: Path, precision: str) -> Step:
    """A step as the trainer takes it."""
    model: Model = load_model(folder).train()
    optimizer = Optimizer(model, OptimConfig(kind="adamw", adam_lr=RATE, weight_decay=0.0))

    def step(tokens: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            hidden, _ = model.hidden_states(tokens)
            labels = torch.cat((tokens[:, 1:], torch.full((len(tokens), 1), -100)), 1).flatten()
            loss = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, labels) / (labels >= 0).sum()
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(folder: Path, precision: str) -> Step:
    """A step as anyone writes it with transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), eps=1e-10, weight_decay=0.0)

    def step(tokens: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


ARMS = {"ours": ours, "theirs": theirs}


def batches(count: int) -> list[Tensor]:
    """Random tokens; a router spreads them as it does text at the start of a training."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SHAPE.vocab_size, (BATCH, LENGTH), generator=generator) for _ in range(count)]


def alternate(folder: Path, precision: str, rounds: int) -> tuple[list[Case], dict[str, list[float]]]:
    """The timed steps of both arms, and the losses of all, the one to warm up included."""
    data, losses = batches(rounds + 1), {name: [] for name in ARMS}

    def case(name: str) -> Case:
        step = ARMS[name](folder, precision)
        return Case(group="step", name=name, run=lambda i: losses[name].append(step(data[i])))

    cases = [case(name) for name in ARMS]
    take_turns(cases, rounds, calls=1)
    return cases, losses


def memory_gb(folder: Path, arm: str, precision: str, threads: int) -> float:
    """Peak memory of a process that takes a few steps, over what it held before."""
    command = [sys.executable, __file__, "--memory-of", arm, "--folder", str(folder)]
    options = ["--precision", precision, "--threads", str(threads)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(folder: Path, arm: str, precision: str) -> None:
    """What `memory_gb` reads."""
    reset_peak_memory()
    before = peak_memory_gb()
    step = ARMS[arm](folder, precision)
    for tokens in batches(MEMORY_STEPS):
        step(tokens)
    print(json.dumps(peak_memory_gb() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=LOSS_TOLERANCE, default="float32")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print_memory(args.folder, args.memory_of, args.precision)
    print(machine_lines(args.threads))
    print(
        f"{args.precision}, torch on {torch.backends.cpu.get_cpu_capability()}, transformers {transformers.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Qwen3Next(SHAPE)
        model.init_weights(torch.Generator().manual_seed(0))
        save_model(model, folder)
        cases, losses = alternate(folder, args.precision, args.rounds)
        memory = {arm: memory_gb(folder, arm, args.precision, args.threads) for arm in ARMS}
    report(cases, losses, memory, args.precision)
    return None


def report(cases: list[Case], losses: dict[str, list[float]], memory: dict[str, float], precision: str) -> None:
    """Prints the gate, both arms, and their ratios; exits with 1 where the gate is shut."""
    off = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["theirs"], strict=True))
    allowed = LOSS_TOLERANCE[precision]
    print(f"gate: losses of {len(losses['ours'])} steps differ by {off:.1e} at most, {allowed:.0e} allowed")
    if not off <= allowed:
        sys.exit("the losses differ: the figures would compare two different trainings")
    tokens = BATCH * LENGTH
    flops = tokens * training_flops(SHAPE, mean_context(LENGTH))
    peak = matmul_gflops(torch.float32 if precision == "float32" else torch.bfloat16)
    for case in cases:
        times, speed = case.seconds, flops / case.median / 1e9
        print(
            f"{case.name:<7} {tokens / case.median:7,.0f} tokens/s (step {case.median * 1e3:,.0f} ms, "
            f"{min(times) * 1e3:,.0f} to {max(times) * 1e3:,.0f}), {speed:.0f} GFLOP/s, {speed / peak:.0%} of the "
            f"{peak:.0f} that a square product reaches, {memory[case.name]:.2f} GB"
        )
    first, second = cases
    print(f"ours over theirs, step by step: {ratio(second.seconds, first.seconds)} the speed")
    print(f"ours over theirs: {memory['ours'] / memory['theirs']:.2f}x the memory")


if __name__ == "__main__":
    main()
