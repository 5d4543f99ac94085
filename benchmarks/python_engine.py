"""One engine in Python, measured in a process of its own: takes a line of JSON, prints one. `peers.py` runs it.

    python benchmarks/python_engine.py '{"engine": "tenfold", "model": "runs/peers/mid", "format": "int4", ...}'

It imports what the engine needs and no more, so that it also runs in an environment which has vLLM alone. Prompts are
prefilled once to warm up, then timed; decoding begins with an empty cache, as llama-bench's does. Tokens are random,
so that they reach all experts, and given: nothing is sampled from what is decoded.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run; formats are Tenfold's, the others have one each."""

    engine: str
    model: str
    format: str
    prompts: list[int]
    new_tokens: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Tokens a second; what the engine itself can tell besides."""

    prefill: dict[str, float]  # by the prompt's length
    decode: float
    version: str
    loading_gb: float | None = None  # peak memory while loading, files that are mapped included
    running_gb: float | None = None  # peak memory after that
    token_gb: float | None = None  # of weights, that one token reads


def tokens_of(task: Task) -> list[int]:
    with open(os.path.join(task.model, "config.json"), encoding="utf-8") as file:
        size = json.load(file)["vocab_size"]
    numbers = random.Random(0)
    return [numbers.randrange(size) for _ in range(max(*task.prompts, 1 + task.new_tokens))]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tenfold(task: Task) -> Figures:
    import torch

    from tenfold import __version__
    from tenfold.engine.bench import measure_round
    from tenfold.engine.llm import start_native
    from tenfold.kernels import cpu
    from tenfold.memory import peak_memory_gb, reset_peak_memory

    cpu.set_threads(task.threads)
    with torch.no_grad():
        model, _ = start_native(task.model, task.format)
        loading = peak_memory_gb()
        reset_peak_memory()
        tokens, prefill = tokens_of(task), {}
        for length in task.prompts:
            measure_round(model, tokens[:length], tokens[:1])
            prefill[str(length)], _ = measure_round(model, tokens[:length], tokens[:1])
        _, decode = measure_round(model, tokens[:1], tokens[1 : 1 + task.new_tokens])
    return Figures(
        prefill=prefill,
        decode=decode,
        version=f"{__version__}, {cpu.isa()}",
        loading_gb=loading,
        running_gb=peak_memory_gb(),
        token_gb=model.bytes_per_token() / 1e9,
    )


def transformers(task: Task) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM, __version__

    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    tokens = torch.tensor([tokens_of(task)])

    def decode() -> None:
        cache = None
        for i in range(task.new_tokens):
            cache = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values

    with torch.inference_mode():
        model(tokens[:, :64])
        prefill = {
            str(length): length / seconds(lambda n=length: model(tokens[:, :n], use_cache=True, logits_to_keep=1))
            for length in task.prompts
        }
        return Figures(prefill=prefill, decode=task.new_tokens / seconds(decode), version=f"{__version__}, fp32")


def vllm(task: Task) -> Figures:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{task.threads - 1}")
    from vllm import LLM, SamplingParams, __version__  # pyright: ignore[reportMissingImports]

    tokens = tokens_of(task)
    llm = LLM(task.model, dtype="bfloat16", max_model_len=len(tokens) + task.new_tokens, enable_prefix_caching=False)

    def generate(length: int, new: int) -> float:
        limits = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0)
        return seconds(lambda: llm.generate([{"prompt_token_ids": tokens[:length]}], limits, use_tqdm=False))

    generate(64, 4)
    prefill = {str(length): length / generate(length, 1) for length in task.prompts}
    longer, first = generate(1, 1 + task.new_tokens), generate(1, 1)
    return Figures(prefill=prefill, decode=task.new_tokens / (longer - first), version=f"{__version__}, bf16")


ENGINES = {"tenfold": tenfold, "transformers": transformers, "vllm": vllm}


if __name__ == "__main__":
    task = Task(**json.loads(sys.argv[1]))
    print("\n" + json.dumps(asdict(ENGINES[task.engine](task))))
