"""The engines that `peers.py` compares: how each is started, and what its output says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from model_files import Tools
from python_engine import Figures, Task

from tenfold.memory import reset_peak_memory

WORKER = Path(__file__).with_name("python_engine.py")
SLOW_TOKENS = 16  # that a slow engine decodes
LIMIT_S = 900.0  # after which a process is ended


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one engine is to do in one turn."""

    folder: Path
    gguf: Path | None  # the same weights, where an engine needs them so
    format: str
    prompts: tuple[int, ...]
    new_tokens: int
    threads: int


class Engine(Protocol):
    """Runs in a process of its own; of the settings of one peer, the best counts."""

    @property
    def peer(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def slow(self) -> bool:
        """Whether it runs in the first round only, with the first prompt and few new tokens."""
        ...

    def command(self, job: Job) -> list[str]: ...
    def parse(self, output: str) -> Figures: ...


@dataclass(frozen=True, kw_only=True)
class PythonEngine:
    """Tenfold, transformers or vLLM."""

    peer: str
    python: str = sys.executable
    setting: str = ""
    slow: bool = False

    def command(self, job: Job) -> list[str]:
        task = Task(
            engine=self.peer,
            model=str(job.folder),
            format=job.format,
            prompts=list(job.prompts[:1] if self.slow else job.prompts),
            new_tokens=min(job.new_tokens, SLOW_TOKENS) if self.slow else job.new_tokens,
            threads=job.threads,
        )
        return [self.python, str(WORKER), json.dumps(asdict(task))]

    def parse(self, output: str) -> Figures:
        return Figures(**json.loads(output.strip().splitlines()[-1]))


@dataclass(frozen=True, kw_only=True)
class LlamaBench:
    """llama.cpp or a fork of it, by its own benchmark, with one warm-up before each test."""

    peer: str
    program: Path
    options: tuple[str, ...] = ()
    slow: bool = False

    @property
    def setting(self) -> str:
        return " ".join(self.options)

    def command(self, job: Job) -> list[str]:
        counts = ["-p", ",".join(map(str, job.prompts)), "-n", str(job.new_tokens), "-t", str(job.threads)]
        return [str(self.program), "-m", str(job.gguf), *counts, "-r", "1", "-o", "json", *self.options]

    def parse(self, output: str) -> Figures:
        return parse_llama_bench(output)


def parse_llama_bench(output: str) -> Figures:
    """What `llama-bench -o json` printed, among other lines maybe. Raises ValueError where a test is missing."""
    begin, end = output.find("[\n"), output.rfind("]")
    tests = json.loads(output[begin : end + 1]) if 0 <= begin < end else []
    prefill = {str(test["n_prompt"]): float(test["avg_ts"]) for test in tests if not test["n_gen"]}
    decode = [float(test["avg_ts"]) for test in tests if test["n_gen"] and not test["n_prompt"]]
    if not prefill or not decode:
        raise ValueError("llama-bench printed no JSON with tests of a prompt and of new tokens")
    return Figures(prefill=prefill, decode=decode[0], version=f"build {tests[0]['build_commit']}")


def find_engines(peers: Sequence[str], llama_cpp: Path | None, ik_llama: Path | None, vllm: str) -> Iterator[Engine]:
    """Tenfold, and those of the peers that are here."""
    yield PythonEngine(peer="tenfold")
    if "llama.cpp" in peers and (program := Tools(folder=llama_cpp).find("llama-bench")):
        yield LlamaBench(peer="llama.cpp", program=program)
    if "ik_llama.cpp" in peers and ik_llama and (program := Tools(folder=ik_llama).find("llama-bench")):
        for repack in ("0", "1"):
            yield LlamaBench(peer="ik_llama.cpp", program=program, options=("-rtr", repack))
    if "transformers" in peers and importlib.util.find_spec("transformers"):
        yield PythonEngine(peer="transformers", slow=True)
    if "vllm" in peers and has_module(vllm, "vllm"):
        yield PythonEngine(peer="vllm", python=vllm, slow=True)


def has_module(python: str, name: str) -> bool:
    """Whether the environment of an interpreter has a module."""
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([python, "-c", question], check=False).returncode == 0


def run_process(command: Sequence[str], limit_s: float = LIMIT_S) -> tuple[str, float]:
    """Output and peak memory (10^9 bytes, mapped files included); ValueError with its last line where it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        reset_peak_memory()  # a process begins with its parent's peak
        process = subprocess.Popen(command, stdout=out, stderr=err)
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output, told = read_back(out), read_back(err)
    if process.returncode:
        last = told.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"{Path(command[0]).name} ended with {process.returncode}: {last[0]}")
    return output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def read_back(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
