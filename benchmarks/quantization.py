"""What quantizing costs, beside llama.cpp's formats: KL divergence, perplexity, and bytes.

    python benchmarks/quantization.py runs/tiny/final --llama-cpp DIR

Models have to be trained: of random weights, nothing depends on the bits. Both sides begin at the folder's own weights,
and are held against these in fp32, on WikiText-2's test text. Ours run on the native kernels, with inputs in int8; of
llama.cpp's files Tenfold reads the weights, and computes in fp32, so their inputs lose nothing. An int4 that is
calibrated has seen another text, of the training split.

MB are 10^6 bytes. "layers" and "vocabulary" (embedding and head) are what weights and their scales take. "MTP" is
apart, since nothing here depends on it. "filling" makes rows a multiple of 32 and experts whole pages; it shrinks in
larger models. "sum" is of layers, vocabulary and filling; the name of a format of theirs says what most tensors have.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from model_files import Tools, make_gguf, say
from timing import machine_lines, print_table
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models.divergence import Divergence, compare_logits
from tenfold.models.gguf import read_gguf
from tenfold.models.packed_file import Entry, open_packed
from tenfold.models.quantize import Text, quantize, read_rows
from tenfold.models.weights import load
from tenfold.train.sources import wikitext_documents

OURS = {"int8": ("int8", False), "int4": ("int4", False), "int4, calibrated": ("int4", True)}
THEIRS = ("Q8_0", "Q4_0", "Q4_K_M")
PARTS = ("layers", "vocabulary", "filling", "MTP")
HEADER = ("model", "format", "KL divergence", "perplexity", "same top", *PARTS[:3], "sum", "MTP")
VOCABULARY = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, kw_only=True)
class Options:
    models: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of trained models
    llama_cpp: Path | None = None  # folder of llama.cpp, as it was built; without it, what is on the PATH
    tokens: int = 8192  # of the test text
    calibration_tokens: int = 16_384  # of the training text
    work: Path = Path("runs/quantization")  # for the files to make


@dataclass(frozen=True, kw_only=True)
class Result:
    """A model in a format."""

    format: str
    divergence: Divergence
    nbytes: Counter[str]  # by PARTS

    def row(self, model: str) -> list[str]:
        found, parts = self.divergence, self.nbytes
        change = found.packed_perplexity / found.perplexity - 1
        total = parts.total() - parts["MTP"]
        sizes = [f"{count / 1e6:.2f}" for count in (*(parts[name] for name in PARTS[:3]), total, parts["MTP"])]
        return [model, self.format, f"{found.kl:.5f}", f"{change:+.2%}", f"{found.same_top:.2%}", *sizes]


# ---- ours --------------------------------------------------------------------------------------------------


def our_result(model: Path, name: str, options: Options) -> Result:
    format, calibrated = OURS[name]
    out = work_folder(model, options) / name.replace(", ", "-")
    shutil.rmtree(out, ignore_errors=True)
    calibration = Text(name="train", documents=wikitext_documents("train"), tokens=options.calibration_tokens)
    report = quantize(model, format, out, test_text(options), calibration if calibrated else None)
    assert report.divergence
    return Result(format=name, divergence=report.divergence, nbytes=our_bytes(out))


def our_bytes(folder: Path) -> Counter[str]:
    """Of a packed folder, by part."""
    sizes: Counter[str] = Counter()
    for owner, entries in open_packed(folder).owners.items():
        for entry in entries:
            used = used_bytes(entry)
            sizes["MTP" if owner.startswith("mtp") else part_of(owner, entry)] += used
            sizes["MTP" if owner.startswith("mtp") else "filling"] += entry.nbytes - used
    return sizes


def part_of(owner: str, entry: Entry) -> str:
    return "vocabulary" if owner == "lm_head" or entry.name.startswith("embed_tokens") else "layers"


def used_bytes(entry: Entry) -> int:
    """What the weights of an entry take, with their scales."""
    if entry.kind == "tensor":
        return entry.nbytes
    matrices = 3 if entry.kind == "experts" else 1
    return matrices * math.prod(entry.shape) * cpu.GROUP_BYTES[entry.format] // (cpu.BLOCK * cpu.GROUP)


# ---- theirs ------------------------------------------------------------------------------------------------


def their_result(model: Path, kind: str, options: Options, tools: Tools) -> Result:
    path = make_gguf(model, work_folder(model, options), kind, tools, source="f32")
    return Result(format=kind, divergence=gguf_divergence(model, path, options), nbytes=gguf_bytes(path))


@torch.no_grad()
def gguf_divergence(model: Path, path: Path, options: Options) -> Divergence:
    """Of the numbers in a GGUF file from those in a folder, both in fp32."""
    (exact, tokenizer), (other, _) = load(model), load(path)
    assert tokenizer
    rows = read_rows(tokenizer, test_text(options), exact.config)
    return compare_logits(rows, logits_of(exact, rows), logits_of(other, rows))


def logits_of(model: torch.nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """`[T, vocab]` of each row."""
    return (model(row[None])[0] for row in rows)


def gguf_bytes(path: Path) -> Counter[str]:
    """Of the tensors in a GGUF file, by part."""
    file = read_gguf(path)
    layers = file.count("qwen3next.block_count", len(file.tensors))
    mtp = layers - int(f"blk.{layers - 1}.nextn.eh_proj.weight" in file.tensors)
    sizes: Counter[str] = Counter()
    for name, tensor in file.tensors.items():
        part = "vocabulary" if name in VOCABULARY else "MTP" if name.startswith(f"blk.{mtp}.") else "layers"
        sizes[part] += tensor.nbytes
    return sizes


# ---- both --------------------------------------------------------------------------------------------------


def name_of(model: Path) -> str:
    """Of the last two folders: every training calls its model `final`."""
    return "-".join(model.resolve().parts[-2:])


def work_folder(model: Path, options: Options) -> Path:
    folder = options.work / name_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_text(options: Options) -> Text:
    return Text(name="WikiText-2", documents=wikitext_documents("test"), tokens=options.tokens)


def results(model: Path, options: Options) -> Iterator[Result]:
    tools = Tools(folder=options.llama_cpp)
    for name in OURS:
        say(f"{model}: {name}")
        yield our_result(model, name, options)
    for kind in THEIRS:
        yield their_result(model, kind, options, tools)


def main(options: Options) -> None:
    torch.set_num_threads(cpu.threads())
    print(machine_lines(cpu.threads()))
    rows = [result.row(name_of(model)) for model in options.models for result in results(model, options)]
    print_table(HEADER, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
