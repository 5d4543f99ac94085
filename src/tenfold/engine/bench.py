"""How fast a model runs on the native kernels here, beside what the machine's memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tenfold.engine.llm import start_native
from tenfold.engine.profile import Profile, profile
from tenfold.kernels import cpu
from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models.native import NativeModel
from tenfold.models.packed_file import is_packed, open_packed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Medians over the rounds; spreads are the distance between the quarters, relative to the median."""

    model: str
    quantization: str
    kv_format: str  # of keys and values
    isa: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    prefill_tok_s: float
    prefill_spread: float
    decode_tok_s: float  # after the prompt, one token at a time
    decode_spread: float
    peak_rss_gb: float  # while running
    loading_rss_gb: float  # while loading, with those parts of the files that the system has mapped
    weights_gb: float
    token_gb: float  # that one decoded token has to read or write: weights, states, keys and values
    memory_read_gb_s: float
    memory_limit_tok_s: float  # decoding can be no faster than the memory gives it weights
    share_of_limit: float
    profiles: Sequence[Profile] = ()  # of a prefill and of a decode step, if asked for

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        title = f"{self.model}, {self.quantization}, {self.isa}, {self.threads} threads, {self.rounds} rounds"
        table = Table(title=title, show_header=False)
        for label, value in _rows(self):
            table.add_row(label, value)
        return table


def _rows(result: BenchResult) -> list[tuple[str, str]]:
    limit = f"{result.memory_limit_tok_s:.2f} tokens/s: {result.memory_read_gb_s:.1f} GB/s"
    return [
        (
            f"prefill of {result.prompt_tokens}",
            f"{result.prefill_tok_s:.1f} tokens/s, spread {result.prefill_spread:.1%}",
        ),
        (f"decode of {result.new_tokens}", f"{result.decode_tok_s:.2f} tokens/s, spread {result.decode_spread:.1%}"),
        ("limit of memory", f"{limit}, {result.token_gb:.3f} GB a token"),
        ("share of the limit", f"{result.share_of_limit:.2f}"),
        ("weights", f"{result.weights_gb:.2f} GB"),
        ("peak memory", f"{result.peak_rss_gb:.2f} GB, in loading {result.loading_rss_gb:.2f} GB"),
    ]


def bench(
    path_or_name: str | Path,
    quantization: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    threads: int | None = None,
    rounds: int = 5,
    kv_format: str = "bf16",
    profiled: bool = False,
) -> BenchResult:
    """Loads a model and measures it, after one round to warm up; the memory is probed before every round.

    quantization: as `load_native`'s format. threads: of the kernels; without it as many as they choose. kv_format: of
    keys and values. Raises ValueError where a count makes no sense or the context is too short, and as `load_native`.
    """
    cpu.require()
    _check(prompt_tokens, new_tokens, rounds)
    if threads is not None:
        cpu.set_threads(threads)
    reset_peak_memory()
    model, _ = start_native(path_or_name, quantization, kv_format)
    packed = Path(path_or_name).expanduser()
    held = open_packed(packed).format if is_packed(packed) else quantization or "bf16"
    loading = peak_memory_gb()
    reset_peak_memory()
    tokens = _tokens(model, prompt_tokens + new_tokens)
    prompt, answer = tokens[:prompt_tokens], tokens[prompt_tokens:]
    measure_round(model, prompt, answer)
    peak = peak_memory_gb()  # the probes' own memory is not the model's
    speeds = [(cpu.memory_read_gb_s(), *measure_round(model, prompt, answer)) for _ in range(rounds)]
    reads, prefills, decodes = zip(*speeds, strict=True)
    token_bytes = model.bytes_per_token() + model.memory_bytes_per_token(prompt_tokens + new_tokens // 2)
    read, limit = statistics.median(reads), statistics.median(reads) * 1e9 / token_bytes
    return BenchResult(
        model=str(path_or_name),
        quantization=held,
        kv_format=kv_format,
        isa=cpu.isa(),
        threads=cpu.threads(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        prefill_tok_s=statistics.median(prefills),
        prefill_spread=spread(prefills),
        decode_tok_s=statistics.median(decodes),
        decode_spread=spread(decodes),
        peak_rss_gb=peak,
        loading_rss_gb=loading,
        weights_gb=model.nbytes() / 1e9,
        token_gb=token_bytes / 1e9,
        memory_read_gb_s=read,
        memory_limit_tok_s=limit,
        share_of_limit=statistics.median(decodes) / limit,
        profiles=profile(model, prompt, answer) if profiled else (),
    )


def _check(prompt_tokens: int, new_tokens: int, rounds: int) -> None:
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "rounds": rounds}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def _tokens(model: NativeModel, count: int) -> list[int]:
    """Random ones, so that they reach all experts; always the same."""
    if count > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"{count} tokens in all, the model takes {limit}: fewer prompt tokens or new tokens")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


@torch.no_grad()
def measure_round(model: NativeModel, prompt: Sequence[int], answer: Sequence[int]) -> tuple[float, float]:
    """Tokens a second in prefill and in decoding; what is decoded is given, and not chosen."""
    cache = model.new_cache(len(prompt) + len(answer))
    start = time.perf_counter()
    model.next_logits(prompt, cache)
    read = time.perf_counter()
    for token in answer:
        model.next_logits([token], cache)
    return len(prompt) / (read - start), len(answer) / (time.perf_counter() - read)


def spread(values: Sequence[float]) -> float:
    """The distance between the first and the third quarter, relative to the median; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / median
