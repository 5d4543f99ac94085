"""The same random weights for every engine: a folder in Hugging Face's layout, and GGUF files made of it.

llama.cpp's own converter writes bf16, its llama-quantize the rest. What is there already is used again; a file that was
not finished has the ending `.part`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.models.gguf import GGUF, read_gguf
from tenfold.models.shapes import init_checkpoint
from tenfold.models.weights import open_checkpoint

CONVERT = """import pathlib, runpy, sys
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
from conversion import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # it knows tokenizers by a hash; ours cut as Qwen's do
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
GGUF_TYPES = {"int4": "Q4_0", "int8": "Q8_0", "bf16": "bf16"}  # of as many bits as our formats


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Programs of llama.cpp or of a fork: in a folder as it was built, or else on the PATH."""

    folder: Path | None

    def find(self, name: str) -> Path | None:
        """The program, or None."""
        if self.folder is None:
            found = shutil.which(name)
            return Path(found) if found else None
        places = (self.folder / "bin" / name, self.folder / "build" / "bin" / name, self.folder / name)
        return next((place for place in places if place.is_file()), None)

    def require(self, name: str) -> Path:
        """The program; ValueError where there is none."""
        found = self.find(name)
        if found is None:
            where = self.folder or "the PATH"
            raise ValueError(f"{name} is not in {where}: build llama.cpp, and name its folder with --llama-cpp")
        return found


def make_folder(folder: Path, shape: str) -> None:
    """A checkpoint with random weights, where there is none yet."""
    if not (folder / "config.json").exists():
        say(f"writing {folder}: random weights of the shape {shape}")
        init_checkpoint(shape, folder)


def make_gguf(folder: Path, work: Path, kind: str, tools: Tools, source: str = "bf16") -> Path:
    """The file with the weights of `folder` in a type of llama.cpp's; the converter writes the source, bf16 or f32."""
    path = work / f"{folder.resolve().name}-{kind}.gguf"
    if path.exists():
        return path
    part = path.with_suffix(".gguf.part")
    if kind == source:
        converter = tools.require("convert_hf_to_gguf.py")
        without_mtp = [] if has_mtp(folder) else ["--no-mtp"]
        command = [
            sys.executable,
            "-c",
            CONVERT,
            converter,
            folder,
            "--outtype",
            source,
            *without_mtp,
            "--outfile",
            part,
        ]
    else:
        original = make_gguf(folder, work, source, tools, source)
        command = [tools.require("llama-quantize"), original, part, kind, str(os.cpu_count() or 1)]
    say(f"writing {path}")
    run_tool([str(word) for word in command])
    part.rename(path)
    return path


def has_mtp(folder: Path) -> bool:
    """Whether the checkpoint has a module for multi-token prediction, of which the converter must know."""
    return any(name.startswith("mtp.") for name in open_checkpoint(folder).tensors)


def run_tool(command: Sequence[str]) -> None:
    """Runs a program to its end; ValueError with the last thing that it said where it fails."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()
        raise ValueError(f"{Path(command[0]).name} ended with {done.returncode}: {told[-1] if told else 'no message'}")


def gguf_token_gb(path: Path) -> float:
    """10^9 bytes of weights that one token reads: all but the embedding, and of the experts the chosen ones."""
    file = read_gguf(path)
    tied = "output.weight" not in file.tensors
    read = sum(
        tensor.nbytes * share_of_experts(file, name)
        for name, tensor in file.tensors.items()
        if name != "token_embd.weight" or tied
    )
    return read / 1e9


def share_of_experts(file: GGUF, name: str) -> float:
    """What part of a tensor one token reads."""
    if "_exps." not in name:
        return 1.0
    family = file.get("general.architecture", str)
    return file.get(f"{family}.expert_used_count", int) / file.get(f"{family}.expert_count", int)


def say(words: str) -> None:
    """A line of progress."""
    print(words, file=sys.stderr, flush=True)
