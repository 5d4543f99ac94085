"""The benchmark: its figures agree with each other, and mistakes are told in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold import cli
from tenfold.engine.bench import spread
from tenfold.kernels import cpu
from tenfold.models.qwen3_next import Qwen3Next
from tenfold.models.shapes import SHAPES
from tenfold.models.weights import save_model

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = cpu.threads()
    yield
    cpu.set_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Qwen3Next(replace(SHAPES["tiny"], max_position_embeddings=64))
    model.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("tiny")
    save_model(model, path)
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    counts = ["--prompt-tokens", "20", "--new-tokens", "3", "--threads", "1", "--rounds", "2"]
    return ["bench", str(folder), *counts, *more]


@pytest.mark.parametrize("quantization", cpu.FORMATS)
def test_figures_agree(folder: Path, quantization: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--quantization", quantization, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["quantization"], result["isa"], result["threads"]) == (quantization, cpu.isa(), 1)
    assert (result["prompt_tokens"], result["new_tokens"], result["rounds"]) == (20, 3, 2)
    assert min(result["prefill_tok_s"], result["decode_tok_s"]) > 0
    limit = result["memory_read_gb_s"] / result["token_gb"]
    assert result["memory_limit_tok_s"] == pytest.approx(limit)
    assert result["share_of_limit"] == pytest.approx(result["decode_tok_s"] / limit)
    assert 0 < result["token_gb"] < result["weights_gb"] < result["peak_rss_gb"]


def test_the_format_of_keys_and_values_is_taken_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--kv-format", "int8", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["kv_format"] == "int8"


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder)) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in ("prefill of 20", "decode of 3", "share of the limit", "tokens/s"))


def test_a_profile_accounts_for_the_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--quantization", "int4", "--profile", "--json")) == 0
    prefill, decode = json.loads(capsys.readouterr().out)["profiles"]
    for profile in (prefill, decode):
        kernels = {kernel["kernel"]: kernel for kernel in profile["kernels"]}
        assert {"linear int4", "experts int4", "gated delta net", "attention bf16", "norm"} <= set(kernels)
        assert 0 < sum(kernel["share"] for kernel in kernels.values()) < 1
        assert sum(kernel["milliseconds"] for kernel in kernels.values()) < profile["milliseconds"]
        assert kernels["norm"]["limit_share"] is None
        assert kernels["linear int4"]["limit_share"] > 0
        assert kernels["gated delta net"]["calls"] == 3  # of four layers
    assert cli.main(arguments(folder, "--profile")) == 0
    assert "outside the kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--prompt-tokens", "62"], "65 tokens in all, the model takes 64"),
        (["--new-tokens", "0"], "new tokens must be 1 or more, got 0"),
        (["--rounds", "0"], "rounds must be 1 or more, got 0"),
        (["--threads", "0"], "threads must be between 1 and"),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(folder, *more)) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_spread() -> None:
    assert spread([3.0]) == 0
    assert spread([10.0, 8.0, 12.0, 9.0, 11.0]) == pytest.approx(0.2)
