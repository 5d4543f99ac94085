"""Quantizing: the folder runs as the model packed in memory does, the report is true, and stopping costs nothing."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tenfold import cli
from tenfold.kernels import cpu
from tenfold.models import Config, Model, quantize, room
from tenfold.models.layout import PACKED
from tenfold.models.native import load_native
from tenfold.models.packed_file import PackedWriter, open_packed
from tenfold.models.quantize import STATE, Text, default_out
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.models.room import packing_bytes, torch_bytes
from tenfold.models.weights import STAGING, build_on_meta, load, save_model
from tenfold.tokenizer import Tokenizer

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

TEXTS = ["the city of the north lies by the sea, and " * 20, "its history is long: wars, kings, trade. " * 20]
NEXT = Qwen3NextConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    full_attention_interval=2,
    mlp_only_layers=(1,),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=48,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
)
DENSE = Qwen3Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
CONFIGS: dict[str, Config] = {
    "next": NEXT,
    "next-tied": replace(NEXT, tie_word_embeddings=True),
    "next-mtp": replace(NEXT, num_nextn_predict_layers=1),
    "dense": DENSE,
    "dense-tied": replace(DENSE, tie_word_embeddings=True),
}


def new_model(config: Config) -> Model:
    """Columns of very different importance, so that it shows whether errors are weighed."""
    model = Qwen3Next(config) if isinstance(config, Qwen3NextConfig) else Qwen3(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter += torch.randn(parameter.shape, generator=generator).exp()
            elif parameter.ndim > 1:
                parameter *= 3
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        save_model(new_model(config), root / name, tokenizer=tokenizer)
    return {name: root / name for name in CONFIGS}


def text(tokens: int) -> Text:
    return Text(name="a text", documents=TEXTS, tokens=tokens)


def rows(tokenizer: Tokenizer, tokens: int, config: Config) -> torch.Tensor:
    """The sequences that the text makes."""
    length = config.max_position_embeddings
    ids = [i for document in TEXTS for i in tokenizer.encode(document)][: tokens // length * length]
    return torch.tensor(ids).view(-1, length)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_runs_as_the_model_packed_in_memory(name: str, format: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize.quantize(folders[name], format, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        PACKED,
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, tokenizer = load_native(out)
    expected, _ = load_native(folders[name], format)
    assert tokenizer and tokenizer.decode([100, 120]) == load(folders[name])[1].decode([100, 120])  # type: ignore[union-attr]
    assert torch.equal(
        model.next_logits([5, 7, 9], model.new_cache()), expected.next_logits([5, 7, 9], expected.new_cache())
    )
    assert (report.divergence, report.layers) == (None, ())
    held = sum(entry.nbytes for entries in open_packed(out).owners.values() for entry in entries)
    assert report.packed_bytes == held and abs(report.bits_per_weight - held * 8 / report.parameters) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_comparison_is_that_of_whole_models(
    name: str, folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = quantize.quantize(folders[name], "int4", tmp_path / "out", text(150)).divergence
    exact, _ = load(folders[name])
    packed, _ = load_native(tmp_path / "out")
    tokens = rows(tokenizer, 150, exact.config)
    p = exact(tokens).log_softmax(-1)
    q = torch.stack(
        [packed.logits(packed.hidden_states(row.tolist(), packed.new_cache())) for row in tokens]
    ).log_softmax(-1)
    assert found and found.tokens == tokens.numel()
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.011)
    for logs, perplexity in ((p, found.perplexity), (q, found.packed_perplexity)):
        loss = F.nll_loss(logs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_layers_err_less_with_more_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    eight = quantize.quantize(folders["next"], "int8", tmp_path / "int8", text(96)).layers
    four = quantize.quantize(folders["next"], "int4", tmp_path / "int4", text(96)).layers
    assert [layer.layer for layer in four] == [0, 1, 2, 3]
    assert [layer.mixer for layer in four] == ["GDN", "attention"] * 2

    assert all(0 < fine.own < coarse.own < 0.5 for fine, coarse in zip(eight, four, strict=True))


@pytest.mark.parametrize("name", ["next", "dense"])
def test_weighed_errors_disturb_the_text_less(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = quantize.quantize(folders[name], "int4", tmp_path / "plain", text(600))
    weighed = quantize.quantize(folders[name], "int4", tmp_path / "weighed", text(600), text(600))
    assert weighed.packed_bytes == plain.packed_bytes
    for better, worse in zip(weighed.layers, plain.layers, strict=True):
        assert better.own < worse.own
    assert weighed.divergence and plain.divergence and weighed.divergence.kl < plain.divergence.kl


# ---- stopping and going on ---------------------------------------------------------------------------------


def interrupt_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = PackedWriter.add, iter(range(100))

    def interrupted(self: PackedWriter, *args: object) -> None:
        if next(calls) == call:
            self._file.write(b"half of something")
            self._file.flush()
            raise KeyboardInterrupt
        add(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedWriter, "add", interrupted)


@pytest.mark.parametrize("name", ["next-mtp", "next-tied"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = quantize.quantize(folders[name], "int4", whole, text(96), text(200))
    for call in range(len(open_packed(whole).owners)):
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            interrupt_at(call, context)
            quantize.quantize(folders[name], "int4", out, text(96), text(200))
        assert not (out / PACKED).exists()
        report = quantize.quantize(folders[name], "int4", out, text(96), text(200))
        assert replace(report, seconds=0) == replace(expected, seconds=0)
        assert (out / PACKED).read_bytes() == (whole / PACKED).read_bytes()
        shutil.rmtree(out)


def test_finished_owners_are_not_packed_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_at(4, context)
        quantize.quantize(folders["next"], "int8", tmp_path / "out")
    packed: list[str] = []
    pack_owner = quantize.pack_owner
    monkeypatch.setattr(quantize, "pack_owner", lambda *args: packed.append(args[1]) or pack_owner(*args))
    quantize.quantize(folders["next"], "int8", tmp_path / "out")
    assert packed == ["model.layers.3", "lm_head"]


STALLED = """
import signal, sys, time
from tenfold import cli
from tenfold.models import quantize
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
pack_owner = quantize.pack_owner

def stall(*args):
    if args[1] == "model.layers.1":
        print("here", flush=True)
        time.sleep(60)
    return pack_owner(*args)

quantize.pack_owner = stall
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_process_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """Killed in the middle, and once more interrupted as by Ctrl-C."""
    command = ["quantize", str(folders["next"]), "--to", "int4", "--test-tokens", "96", "--out"]
    errors = ""
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, cli.INTERRUPTED)):
        arguments = [sys.executable, "-c", STALLED, *command, str(tmp_path / "out")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "here\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert b"model.layers.0" in (tmp_path / "out" / STAGING / STATE).read_bytes()
    assert errors == "\ntenfold: the same command goes on from here\n\ntenfold: interrupted\n"
    for out in ("out", "whole"):
        assert cli.main([*command, str(tmp_path / out)]) == 0
    assert (tmp_path / "out" / PACKED).read_bytes() == (tmp_path / "whole" / PACKED).read_bytes()


# ---- what is refused ---------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_another_models_folder_is_left_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = tmp_path / "out", ["quantize", folders["dense"], "--test-tokens", 0, "--to"]
    assert "holds another model" in refused(capsys, *command, "int4", "--out", folders["next"])
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_at(2, context)
        quantize.quantize(folders["next"], "int4", out)
    assert "begun from another model or with other options" in refused(capsys, *command, "int4", "--out", out)
    with (out / STAGING / PACKED).open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with pytest.raises(ValueError, match="an earlier attempt left damaged files; delete it, and repeat"):
        quantize.quantize(folders["next"], "int4", out)
    shutil.rmtree(out)
    assert cli.main([*map(str, command), "int8", "--out", str(out)]) == 0
    before = (out / PACKED).read_bytes()
    capsys.readouterr()
    assert f"holds {folders['dense']} as int8 already" in refused(capsys, *command, "int4", "--out", out)
    assert "is packed already; quantize the original" in refused(capsys, "quantize", out, "--to", "int4")
    assert (out / PACKED).read_bytes() == before
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, *command, "int4", "--out", tmp_path / "file")


def test_mistakes_in_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "int8"
    quantize.quantize(folders["dense"], "int8", out)
    run = ["--prompt", "the", "--max-tokens", 3]
    assert cli.main([str(x) for x in ("generate", out, *run)]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert cli.main([str(x) for x in ("generate", out, *run, "--quantization", "int8")]) == 0
    capsys.readouterr()
    assert "packed as int8, not int4; leave out --quantization" in refused(
        capsys, "generate", out, *run, "--quantization", "int4"
    )
    assert "leave out --dtype and --device" in refused(capsys, "generate", out, *run, "--dtype", "bfloat16")
    with pytest.raises(ValueError, match="packed weights, which the native kernels alone can run"):
        load(out)
    assert cli.main(["info", str(out), "--verify"]) == 0
    assert "all weights are as they were written" in capsys.readouterr().out
    assert "tenfold quantize writes one" in refused(capsys, "info", folders["next"], "--verify")
    assert "--test-tokens must be 0 or more" in refused(capsys, "quantize", out, "--to", "int4", "--test-tokens", -1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "the disk has 0.0 GB free" in refused(
        capsys, "quantize", folders["next"], "--to", "int4", "--out", tmp_path / "full", "--test-tokens", 0
    )


def test_bench_says_what_the_file_holds(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize.quantize(folders["dense"], "int8", tmp_path / "out")
    counts = ["--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1", "--threads", str(cpu.threads()), "--json"]
    assert cli.main(["bench", str(tmp_path / "out"), *counts]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "int8"


def test_without_a_tokenizer_it_packs_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders["dense"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    command = ["quantize", tmp_path / "model", "--to", "int4"]
    assert "no tokenizer, so no text can be read" in refused(capsys, *command)
    assert cli.main([*map(str, command), "--test-tokens", "0"]) == 0
    assert (tmp_path / "model-int4" / PACKED).is_file()


def test_default_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.b").mkdir()
    (tmp_path / "c.gguf").touch()
    monkeypatch.chdir(tmp_path / "a.b")
    assert default_out(".", Path(), "int4") == tmp_path / "a.b-int4"
    assert default_out("../c.gguf", Path("../c.gguf"), "int8") == tmp_path / "c-int8"
    assert default_out("Qwen/Next", tmp_path / "snapshot", "int4") == Path("Next-int4")


# ---- memory ------------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_first(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = build_on_meta(NEXT)
    needs = {format: packing_bytes(skeleton, format, 4) for format in cpu.FORMATS}
    quantize.quantize(folders["next"], "int8", tmp_path / "int8")
    packed = (tmp_path / "int8" / PACKED).stat().st_size
    for free, model, options, advice in (
        (torch_bytes(skeleton, "bfloat16"), folders["next"], [], "; --dtype bfloat16 takes"),
        (needs["int4"], folders["next"], [], "; --quantization int4 takes"),
        (needs["bf16"] - 1, folders["next"], ["--quantization", "bf16"], "; --quantization int8 takes"),
        (needs["int8"] - 1, folders["next"], ["--quantization", "bf16"], "; --quantization int4 takes"),
        (needs["int4"] - 1, folders["next"], ["--quantization", "int4"], "; free some, or take a machine with"),
        (packed - 1, tmp_path / "int8", [], "; quantize --to int4 takes"),
    ):
        monkeypatch.setattr(room, "available_memory", lambda free=free: free)
        error = refused(capsys, "generate", model, "--prompt", "the", *options)
        assert f"{model}: needs " in error and f" are available{advice}" in error


MEASURE = """
import sys, torch
from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models.native import load_native
from tenfold.models.quantize import quantize
torch.set_num_threads(1)
load_native(sys.argv[1], "int4")
reset_peak_memory()
before = peak_memory_gb()
if sys.argv[3] == "load":
    model, _ = load_native(sys.argv[2], "int4")
else:
    quantize(sys.argv[2], "int4")
print(peak_memory_gb() - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of 25 MB in bf16."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 256}
    config = replace(NEXT, **sizes, mlp_only_layers=())
    model = build_on_meta(config).to_empty(device="cpu").bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    path = tmp_path_factory.mktemp("wide")
    save_model(model, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin to measure anew")
@pytest.mark.parametrize(("task", "most_mb"), [("load", 59 + 2.5 * 26), ("quantize", 2.5 * 26)])
def test_memory_stays_near_a_layer(task: str, most_mb: float, wide: Path, folders: dict[str, Path]) -> None:
    """The packed model, two layers, and half of one that the allocator keeps: from run to run 98 to 115 MB, of 260."""
    command = [sys.executable, "-c", MEASURE, str(folders["next"]), str(wide), task]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert float(result.stdout) * 1000 < most_mb
