"""A checkpoint's description agrees with the published figures of the shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

from tenfold.models import weights
from tenfold.models.info import ModelInfo, describe, layer_layout
from tenfold.models.layout import TensorSource
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.shapes import SHAPES, init_checkpoint
from tenfold.models.weights import save_model
from tenfold.tokenizer import Tokenizer


class Disk(NamedTuple):
    free: int


@pytest.fixture
def holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints get headers and sizes, and no values: 160 GB take no room and no time."""

    def write_hole(path: Path, header: bytes, shard: list[TensorSource], advance: Callable[[int], None]) -> None:
        path.write_bytes(header)
        with path.open("ab") as file:
            file.truncate(len(header) + sum(source.nbytes for source in shard))

    monkeypatch.setattr(weights, "_write_shard", write_hole)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(free=10**12))
    monkeypatch.setattr("tenfold.models.shapes.shape_tokenizer", lambda _: Tokenizer.train(["to be"], 300))


def described(shape: str, folder: Path) -> ModelInfo:
    init_checkpoint(shape, folder / shape)
    return describe(folder / shape)


@pytest.mark.usefixtures("holes")
def test_80b_a3b(tmp_path: Path) -> None:
    info = described("80b-a3b", tmp_path)
    assert info.layout == "12 x (3 GDN + 1 attention)"
    assert round(info.parameters / 1e9, 2) == 79.67
    assert round(info.mtp_parameters / 1e9, 2) == 1.65
    assert round(info.active_body / 1e9, 2) == 3.25
    assert round(info.active_with_head / 1e9, 2) == 3.56
    assert round(info.state_bytes / 2**20, 1) == 75.4
    assert info.kv_bytes_per_token == 24 * 1024
    assert sum(info.bytes_by_dtype.values()) // 10**9 == 162
    assert info.files == 33 and info.expert_layout == "separate" and info.tokenizer


@pytest.mark.usefixtures("holes")
def test_mid(tmp_path: Path) -> None:
    info = described("mid", tmp_path)
    assert info.layout == "2 x (3 GDN + 1 attention)"
    assert round(info.parameters / 1e9, 3) == 2.516
    assert info.active_with_head // 10**6 == 845
    assert round((info.active_with_head - info.active_body) / 1e6) == 311
    assert info.mtp_parameters == 0


@pytest.mark.usefixtures("holes")
def test_tiny(tmp_path: Path) -> None:
    info = described("tiny", tmp_path)
    assert round(info.parameters / 1e6, 2) == 9.87
    embedding = 4096 * 256
    assert round((info.active_with_head + embedding) / 1e6, 2) == 5.15


def test_counts_agree_with_the_model_in_memory(tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], hidden_size=32, num_experts=4, num_nextn_predict_layers=1)
    model = weights.ARCHITECTURES["qwen3_next"][1](shape)  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path, experts="stacked")
    info = describe(tmp_path)
    assert info.parameters + info.mtp_parameters == sum(p.numel() for p in model.parameters())
    assert info.expert_layout == "stacked" and not info.tokenizer
    body = info.parameters - 2 * 4096 * 32
    assert info.active_body == body  # all four experts work on each token


def test_dense_and_tied(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = Qwen3(config)
    save_model(model, tmp_path)
    info = describe(tmp_path)
    assert (info.layout, info.experts, info.expert_layout, info.state_bytes) == ("2 attention", 0, None, 0)
    assert info.parameters == info.active_with_head == sum(p.numel() for p in model.parameters())
    assert info.active_body == info.parameters - 50 * 16
    assert info.kv_bytes_per_token == 2 * 2 * 8 * 2


def test_table(tmp_path: Path) -> None:
    save_model(Qwen3(Qwen3Config(vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=1)), tmp_path)
    console = Console(width=100, file=StringIO())
    with console.capture() as capture:
        console.print(describe(tmp_path).table())
    text = capture.get()
    assert "1: 1 attention" in text and "in 1 file" in text


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", "1 attention"),
        ("gggg", "4 GDN"),
        ("ggaggagga", "3 x (2 GDN + 1 attention)"),
        ("gaag", "1 x (1 GDN + 2 attention + 1 GDN)"),
    ],
)
def test_layout(pattern: str, expected: str) -> None:
    kinds = {"g": "linear_attention", "a": "full_attention"}
    assert layer_layout(tuple(kinds[letter] for letter in pattern)) == expected
