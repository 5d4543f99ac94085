"""Makes the fixtures: random checkpoints, and what llama.cpp's converter and quantiser make of them.

    python make.py LLAMA_CPP LLAMA_QUANTIZE OUT

LLAMA_CPP is the source tree (the one in llama-cpp-python 0.3.36), whose `convert_hf_to_gguf.py` runs here, and
LLAMA_QUANTIZE the program `llama-quantize` built from it.
"""

from __future__ import annotations

import lzma
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tenfold.models import ARCHITECTURES, Config
from tenfold.models.qwen3 import Qwen3Config
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import load_model, save_model
from tenfold.tokenizer import Tokenizer

NEXT = Qwen3NextConfig(
    vocab_size=288,
    hidden_size=32,
    num_hidden_layers=2,
    full_attention_interval=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    num_nextn_predict_layers=1,
)
DENSE = Qwen3Config(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
WIDE = replace(DENSE, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=1, head_dim=64)
MIXED = {  # a tensor of the wide model in each type
    "token_embd": "q8_0",
    "attn_q": "q4_k",
    "attn_k": "q4_0",
    "attn_v": "q4_1",
    "attn_output": "q5_k",
    "ffn_gate": "q6_k",
    "ffn_up": "bf16",
    "ffn_down": "f16",
}
TEXT = "the quick brown fox jumps over the lazy dog, and 12 more: naïve, déjà vu, 漢字\n" * 20


def main(llama_cpp: Path, quantize: Path, out: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 280)
    for name, config in {"next": NEXT, "dense": DENSE, "wide": WIDE}.items():
        save(config, out / name, tokenizer)
        convert(llama_cpp, out / name, out / f"{name}-f32.gguf")
    subprocess.run([quantize, out / "next-f32.gguf", out / "next-q8_0.gguf", "q8_0"], check=True)
    types = [word for name, kind in MIXED.items() for word in ("--tensor-type", f"{name}={kind}")]
    subprocess.run([quantize, *types, out / "wide-f32.gguf", out / "wide-mixed.gguf", "q4_k_m"], check=True)
    (out / "wide-f32.gguf").unlink()
    shutil.rmtree(out / "wide")
    for path in (*out.glob("*.gguf"), *out.glob("*/model.safetensors")):
        path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
        path.unlink()


def save(config: Config, folder: Path, tokenizer: Tokenizer) -> None:
    """A checkpoint of random weights, none of which is what it would be in a fresh model."""
    model = ARCHITECTURES[config.model_type][1](config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_model(model, folder)
    save_model(load_model(folder, "bfloat16"), folder, tokenizer=tokenizer)


def convert(llama_cpp: Path, folder: Path, path: Path) -> None:
    """Runs the converter, which knows tokenizers by a hash, and is told that this one cuts text as Qwen's do."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(path)]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
