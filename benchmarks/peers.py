"""Tenfold beside its peers on the same weights: prefill, decoding and memory, in turns, as ratios.

    python benchmarks/peers.py --llama-cpp DIR --ik-llama DIR --formats int4 --rounds 3 --json runs/peers/int4.json

Every round runs each engine once, in a process of its own, one after the other, all with the same number of threads;
the order turns from round to round. Ratios are taken round by round. Before each process the memory's read speed is
probed: the share of the limit is the bytes of weights that a token needs, in that engine's own format, times tokens a
second, over the round's best probe. All decode from an empty cache. transformers (fp32) and vLLM (bf16) are slow, and
run in the first round only. The model is random, of the shape "mid" unless --model names a folder; its files are made
once, in --work. A run with the same --json goes on after the last whole round. TENFOLD_ISA=avx2 compares with peers
that were built for AVX2.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from engines import Engine, Job, LlamaBench, find_engines, run_process
from model_files import GGUF_TYPES, Tools, gguf_token_gb, make_folder, make_gguf, say
from timing import machine_lines, print_table, ratio

from tenfold.engine.llm import start_native
from tenfold.kernels import cpu

PEERS = ("llama.cpp", "ik_llama.cpp", "transformers", "vllm")
OTHER_GB_PER_BF16 = {"transformers": 2.0, "vllm": 1.0}  # bytes of a weight there, over those in bf16
SHAPE = "mid"  # of the model to make
PROMPT = [9707, 11, 1879, 0, 785, 6722, 315, 9625]  # of the gate; any tokens do
GATE = 1e-3  # relative difference of logits: the converter stores -exp(A_log), which rounds


@dataclass(frozen=True, kw_only=True)
class Options:
    llama_cpp: Path | None = None  # folder of llama.cpp with bin/llama-bench; without it, what is on the PATH
    ik_llama: Path | None = None  # folder of ik_llama.cpp
    vllm: str = sys.executable  # the Python interpreter of an environment that has vLLM
    peers: tuple[Literal["llama.cpp", "ik_llama.cpp", "transformers", "vllm"], ...] = PEERS  # those that are found
    formats: tuple[Literal["int4", "int8", "bf16"], ...] = ("int4", "int8", "bf16")
    prompts: tuple[int, ...] = (512, 2048)
    new_tokens: int = 64
    rounds: int = 3
    threads: int = os.cpu_count() or 1
    model: Path | None = None  # a checkpoint's folder; without it WORK/mid, which is made if need be
    work: Path = Path("runs/peers")  # for the files to make, 15 GB
    json: Path | None = None  # where to write everything, and to go on from


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one engine reached in one round."""

    round: int
    format: str
    peer: str
    setting: str
    version: str
    prefill: dict[str, float]  # tokens a second, by the prompt's length
    decode: float
    peak_gb: float  # of the process, files that it maps included
    running_gb: float | None  # after loading, where the engine tells
    token_gb: float | None  # of weights, that one token reads
    read_gb_s: float  # of memory, probed right before


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run: what it was, and its turns so far."""

    about: dict[str, object]
    turns: list[Turn] = field(default_factory=list)

    def save(self, path: Path | None) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def resume(path: Path | None, about: dict[str, object]) -> Record:
    """What the file holds; ValueError where that was another run."""
    if not path or not path.exists():
        return Record(about=about)
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["about"] != about:
        other = ", ".join(key for key in about if values["about"].get(key) != about[key])
        raise ValueError(f"{path} holds another run, of which this differs: {other}; name another file")
    return Record(about=about, turns=[Turn(**turn) for turn in values["turns"]])


def missing_rounds(turns: Sequence[Turn], format: str, engines: Sequence[Engine], rounds: int) -> list[int]:
    """Those in which an engine that runs in every round has no turn."""
    there = {(turn.round, turn.peer, turn.setting) for turn in turns if turn.format == format}
    always = [engine for engine in engines if not engine.slow]
    return [i for i in range(rounds) if any((i, engine.peer, engine.setting) not in there for engine in always)]


# ---- one turn ------------------------------------------------------------------------------------------------


def take_turn(engine: Engine, job: Job, number: int, token_gb: dict[str, float]) -> Turn | None:
    """Runs an engine; None, and a word of it, where a peer fails."""
    read, start = cpu.memory_read_gb_s(), time.perf_counter()
    try:
        output, peak = run_process(engine.command(job))
        figures = engine.parse(output)
        peak = max(peak, figures.loading_gb or 0.0)  # the process forgets a peak where it begins to measure anew
    except ValueError as error:
        if engine.peer == "tenfold":
            raise
        say(f"{engine.peer} {engine.setting} is left out of round {number + 1}: {error}")
        return None
    speeds = ", ".join(f"{speed:.0f}" for speed in figures.prefill.values())
    say(
        f"{job.format} round {number + 1}: {engine.peer} {engine.setting}: prefill {speeds}, "
        f"decode {figures.decode:.1f} tokens/s, {peak:.1f} GB, in {time.perf_counter() - start:.0f} s"
    )
    return Turn(
        round=number,
        format=job.format,
        peer=engine.peer,
        setting=engine.setting,
        version=figures.version,
        prefill=figures.prefill,
        decode=figures.decode,
        peak_gb=peak,
        running_gb=figures.running_gb,
        token_gb=figures.token_gb or token_gb.get(engine.peer),
        read_gb_s=read,
    )


def run_rounds(options: Options, engines: Sequence[Engine], record: Record, job: Job) -> None:
    """The rounds of one format that the record lacks."""
    token_gb = token_sizes(job)
    for number in missing_rounds(record.turns, job.format, engines, options.rounds):
        stale = [turn for turn in record.turns if (turn.format, turn.round) == (job.format, number)]
        for turn in stale:  # of a round that was cut off: a round is worth something as a whole
            record.turns.remove(turn)
        present = [engine for engine in engines if number == 0 or not engine.slow]
        for engine in reversed(present) if number % 2 else present:
            turn = take_turn(engine, job, number, token_gb)
            record.turns.extend([turn] if turn else [])
        record.save(options.json)


def token_sizes(job: Job) -> dict[str, float]:
    """10^9 bytes of weights that a token reads in each peer, where there are files to tell."""
    if job.gguf is None:
        return {}
    bf16 = gguf_token_gb(job.gguf.with_name(job.gguf.name.replace(GGUF_TYPES[job.format], GGUF_TYPES["bf16"])))
    others = {peer: bf16 * factor for peer, factor in OTHER_GB_PER_BF16.items()}
    return {"llama.cpp": gguf_token_gb(job.gguf), "ik_llama.cpp": gguf_token_gb(job.gguf), **others}


@torch.no_grad()
def check_files(folder: Path, gguf: Path) -> None:
    """The gate: the file that all others are quantized from holds the folder's model. Raises ValueError if not."""
    passed = gguf.with_suffix(".checked")
    if passed.exists() and passed.stat().st_mtime > max(gguf.stat().st_mtime, (folder / "config.json").stat().st_mtime):
        return
    expected, found = (next_logits(path) for path in (folder, gguf))
    error = ((found - expected).norm() / expected.norm()).item()
    if not (error < GATE and found.argmax() == expected.argmax()):
        raise ValueError(f"{gguf} and {folder} are different models: logits differ by {error:.1e}; delete the file")
    say(f"gate: {gguf} is the model in {folder}: logits differ by {error:.1e}, {GATE:.0e} allowed; same next token")
    passed.touch()


def next_logits(path: Path) -> torch.Tensor:
    model, _ = start_native(path, "bf16")
    return model.next_logits(PROMPT, model.new_cache())


# ---- the report ----------------------------------------------------------------------------------------------


def report(turns: Sequence[Turn], format: str) -> None:
    """A format's table of medians, and the ratios of Tenfold to each peer."""
    turns = [turn for turn in turns if turn.format == format]
    reads, rounds = [turn.read_gb_s for turn in turns], len({turn.round for turn in turns})
    print(f"\n{format} against {GGUF_TYPES[format]}, {rounds} rounds")
    print(
        f"memory read {statistics.median(reads):.1f} GB/s ({min(reads):.1f} to {max(reads):.1f} before the processes)"
    )
    lengths = list(next(turn.prefill for turn in turns if turn.peer == "tenfold"))
    engines = sorted({(turn.peer, turn.setting) for turn in turns}, key=lambda name: (name[0] != "tenfold", name))
    header = ("", *(f"prefill {n}" for n in lengths), "decode", "of limit", "GB a token", "peak GB", "running GB")
    print_table(header, [_row(turns, *engine, lengths) for engine in engines], labels=1)
    peers = sorted({turn.peer for turn in turns} - {"tenfold"})
    columns = [*(f"prefill {n}" for n in lengths), "decode"]
    print_table(
        ("tenfold over, at its best", *columns), [(peer, *ratios(turns, peer, lengths)) for peer in peers], labels=1
    )


def _row(turns: Sequence[Turn], peer: str, setting: str, lengths: Sequence[str]) -> tuple[str, ...]:
    own = [turn for turn in turns if (turn.peer, turn.setting) == (peer, setting)]
    shares = [turn.decode * turn.token_gb / best_read(turns, turn.round) for turn in own if turn.token_gb]
    running = [turn.running_gb for turn in own if turn.running_gb is not None]
    prefills = [[turn.prefill[n] for turn in own if n in turn.prefill] for n in lengths]
    return (
        f"{peer} {setting}".strip(),
        *(f"{statistics.median(speeds):.1f}" if speeds else "" for speeds in prefills),
        f"{statistics.median(turn.decode for turn in own):.2f}",
        f"{statistics.median(shares):.2f}" if shares else "",
        f"{own[0].token_gb:.3f}" if own[0].token_gb else "",
        f"{max(turn.peak_gb for turn in own):.2f}",
        f"{max(running):.2f}" if running else "",
    )


def best_read(turns: Sequence[Turn], number: int) -> float:
    """The best probe of a round; neighbours only ever lower them."""
    return max(turn.read_gb_s for turn in turns if turn.round == number)


def ratios(turns: Sequence[Turn], peer: str, lengths: Sequence[str]) -> list[str]:
    """Tenfold's speeds over the peer's, of whose settings the best of each round counts."""
    return [speed_ratio(turns, peer, length) for length in (*lengths, None)]


def speed_ratio(turns: Sequence[Turn], peer: str, length: str | None) -> str:
    """Over the rounds that have both; length: of the prompt, None for decoding."""
    ours, theirs = best_by_round(turns, "tenfold", length), best_by_round(turns, peer, length)
    both = sorted(ours.keys() & theirs.keys())
    return str(ratio([ours[i] for i in both], [theirs[i] for i in both])) if both else ""


def best_by_round(turns: Sequence[Turn], peer: str, length: str | None) -> dict[int, float]:
    """Tokens a second by round."""
    best: dict[int, float] = {}
    for turn in turns:
        if turn.peer == peer and (length is None or length in turn.prefill):
            speed = turn.decode if length is None else turn.prefill[length]
            best[turn.round] = max(speed, best.get(turn.round, 0.0))
    return best


def run(options: Options) -> None:
    """Files, gate, rounds, report."""
    cpu.require()
    engines = list(find_engines(options.peers, options.llama_cpp, options.ik_llama, options.vllm))
    found = {engine.peer for engine in engines}
    say(f"engines: {', '.join(sorted(found))}; not here: {', '.join(set(options.peers) - found) or 'none'}")
    cpu.set_threads(options.threads)
    folder = options.model or options.work / SHAPE
    about = machine_lines(options.threads)
    counts = {"prompts": list(options.prompts), "new_tokens": options.new_tokens, "model": str(folder)}
    record = resume(options.json, {"machine": about, "threads": options.threads, **counts})
    options.work.mkdir(parents=True, exist_ok=True)
    make_folder(folder, SHAPE)
    tools, files = Tools(folder=options.llama_cpp), {}
    if any(isinstance(engine, LlamaBench) for engine in engines):
        files = {
            format: make_gguf(folder, options.work, GGUF_TYPES[format], tools) for format in ("bf16", *options.formats)
        }
        check_files(folder, files["bf16"])
    for format in options.formats:
        job = Job(
            folder=folder,
            gguf=files.get(format),
            format=format,
            prompts=options.prompts,
            new_tokens=options.new_tokens,
            threads=options.threads,
        )
        run_rounds(options, engines, record, job)
    print(f"{about}; {folder}")
    for format in options.formats:
        report(record.turns, format)


def main() -> None:
    try:
        run(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"peers: error: {error}")


if __name__ == "__main__":
    main()
