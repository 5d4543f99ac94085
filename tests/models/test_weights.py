"""Checkpoints come back as they were, and everything that can be wrong with a folder is told in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models import Config, Model, weights
from tenfold.models.layout import ExpertLayout
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.models.shapes import SHAPES, init_checkpoint
from tenfold.models.weights import (
    INDEX,
    SINGLE,
    STAGING,
    load,
    load_model,
    open_checkpoint,
    read_config,
    read_header,
    read_parameters,
    save_model,
)
from tenfold.tokenizer import Tokenizer

NEXT = Qwen3NextConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    full_attention_interval=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    mlp_only_layers=(1,),
    num_nextn_predict_layers=1,
)
DENSE = Qwen3Config(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)


def new_model(config: Config = NEXT, seed: int = 0) -> Model:
    model = Qwen3Next(config) if isinstance(config, Qwen3NextConfig) else Qwen3(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def same_weights(found: Model, expected: Model) -> bool:
    state, other = found.state_dict(), expected.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder: Path, **changes: object) -> None:  # a test's shorthand: the names are config.json's
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# ---- what goes in comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [NEXT, replace(NEXT, tie_word_embeddings=True), DENSE])
@pytest.mark.parametrize("experts", ["separate", "stacked"])
@pytest.mark.parametrize("shard_bytes", [5e9, 3000])
def test_round_trip(config: Config, experts: ExpertLayout, shard_bytes: float, tmp_path: Path) -> None:
    model = new_model(config)
    save_model(model, tmp_path / "a", experts=experts, shard_bytes=shard_bytes)
    loaded = load_model(tmp_path / "a")
    assert loaded.config == config
    assert same_weights(loaded, model) and not loaded.training
    save_model(loaded, tmp_path / "b", experts=experts, shard_bytes=shard_bytes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert torch.equal(loaded(torch.arange(9)[None]), model.eval()(torch.arange(9)[None]))


@given(shard_bytes=st.integers(1, 40_000))
def test_files_hold_at_most_shard_bytes(tmp_path_factory: pytest.TempPathFactory, shard_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("sharded")
    model = new_model(DENSE)
    save_model(model, folder, shard_bytes=shard_bytes)
    for path in folder.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in read_header(path).values()]
        assert sum(sizes) <= shard_bytes or len(sizes) == 1
    assert same_weights(load_model(folder), model)


def test_released_names(tmp_path: Path) -> None:
    save_model(new_model(), tmp_path)
    names = load_file(tmp_path / SINGLE).keys()
    expected = {
        "model.layers.0.mlp.experts.2.up_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "model.layers.2.self_attn.q_norm.weight",
        "mtp.fc.weight",
        "mtp.layers.0.mlp.experts.0.down_proj.weight",
        "lm_head.weight",
    }
    assert expected <= names
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in names)


def test_gate_rows_come_first(tmp_path: Path) -> None:
    model = new_model()
    save_model(model, tmp_path)
    held = load_file(tmp_path / SINGLE)
    prefix = "model.layers.0.mlp.experts"
    stacked = model.state_dict()[f"{prefix}.gate_up_proj"][1]
    assert torch.equal(stacked[:8], held[f"{prefix}.1.gate_proj.weight"])
    assert torch.equal(stacked[8:], held[f"{prefix}.1.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    save_model(new_model(), tmp_path / "a")
    model = load_model(tmp_path / "a", dtype)
    for name, parameter in model.named_parameters():
        decay = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if decay else getattr(torch, dtype)), name
    save_model(model, tmp_path / "b")
    assert same_weights(load_model(tmp_path / "b", "auto"), model)
    edit_config(tmp_path / "b", dtype=None, torch_dtype=None)
    assert same_weights(load_model(tmp_path / "b", "auto"), model)


def test_multi_token_prediction_is_what_the_files_say(tmp_path: Path) -> None:
    save_model(new_model(), tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=None)
    assert load_model(tmp_path).config == NEXT
    tensors = load_file(tmp_path / SINGLE)
    save_file({name: t for name, t in tensors.items() if not name.startswith("mtp.")}, tmp_path / SINGLE)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    assert load_model(tmp_path).mtp is None


def test_redundant_tensors_are_passed_over(tmp_path: Path) -> None:
    model = new_model(DENSE)
    save_model(model, tmp_path)
    held = load_file(tmp_path / SINGLE)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(held, tmp_path / SINGLE)
    assert same_weights(load_model(tmp_path), model)


def test_load_brings_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["to be or not to be"], 300)
    save_model(new_model(), tmp_path / "with", tokenizer=tokenizer)
    save_model(new_model(), tmp_path / "without")
    found = load(tmp_path / "with")[1]
    assert found is not None and found.encode("to be") == tokenizer.encode("to be")
    assert load(tmp_path / "without")[1] is None


# ---- whole or not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [5e9, 3000])
@pytest.mark.parametrize("after", [5e9, 2000])
def test_a_checkpoint_is_replaced_as_a_whole(before: float, after: float, tmp_path: Path) -> None:
    save_model(new_model(seed=1), tmp_path / "a", shard_bytes=before)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    save_model(new_model(seed=2), tmp_path / "a", shard_bytes=after)
    save_model(new_model(seed=2), tmp_path / "b", shard_bytes=after)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") | {"notes.txt": b"mine"}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The `call`-th call of a function is Ctrl-C instead."""
    real, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def interrupted(*args: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = new_model(seed=1)
    save_model(old, tmp_path, shard_bytes=3000)
    before = contents(tmp_path)
    interrupt_at(monkeypatch, os, "fsync", call)
    with pytest.raises(KeyboardInterrupt):
        save_model(new_model(seed=2), tmp_path, shard_bytes=3000)
    assert contents(tmp_path) == before


@given(call=st.integers(1, 12))
def test_an_interrupted_publication_never_looks_whole(tmp_path_factory: pytest.TempPathFactory, call: int) -> None:
    folder = tmp_path_factory.mktemp("published")
    old, new = new_model(seed=1), new_model(seed=2)
    save_model(old, folder, shard_bytes=8000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, Path, "replace", call)
        try:
            save_model(new, folder, shard_bytes=8000)
        except KeyboardInterrupt:
            with pytest.raises(OSError, match="no weights"):
                load_model(folder)
        else:
            assert same_weights(load_model(folder), new)


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, "small", replace(NEXT, vocab_size=300))
    monkeypatch.setattr("tenfold.models.shapes.shape_tokenizer", lambda _: Tokenizer.train(["to be"], 300))
    return "small"


def test_init_is_a_function_of_its_arguments(small_shape: str, tmp_path: Path) -> None:
    for name, seed, dtype in (
        ("a", 0, "bfloat16"),
        ("b", 0, "bfloat16"),
        ("c", 1, "bfloat16"),
        ("d", 0, "float32"),
    ):
        init_checkpoint(small_shape, tmp_path / name, seed, dtype)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    model, tokenizer = load(tmp_path / "a")
    assert tokenizer is not None and model.config.eos_token_id == tokenizer.eos_id
    assert same_weights(load_model(tmp_path / "d", "bfloat16"), load_model(tmp_path / "a", "bfloat16"))
    assert not same_weights(load_model(tmp_path / "c"), model)
    assert model.mtp is not None
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("call", [1, 4, 9])
def test_an_interrupted_init_goes_on(
    call: int, small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_checkpoint(small_shape, tmp_path / "whole", shard_bytes=4000)
    with monkeypatch.context() as patched:
        interrupt_at(patched, os, "fsync", call)
        with pytest.raises(KeyboardInterrupt):
            init_checkpoint(small_shape, tmp_path / "cut", shard_bytes=4000)
    with pytest.raises(OSError, match=r"no config\.json"):
        load_model(tmp_path / "cut")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / STAGING).glob("*.safetensors")}
    assert len(kept) == call - 1
    init_checkpoint(small_shape, tmp_path / "cut", shard_bytes=4000)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert kept == {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in kept}


def test_an_interrupted_init_does_not_mix_seeds(
    small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, os, "fsync", 5)
        with pytest.raises(KeyboardInterrupt):
            init_checkpoint(small_shape, tmp_path / "a", seed=1, shard_bytes=4000)
    init_checkpoint(small_shape, tmp_path / "a", seed=2, shard_bytes=4000)
    init_checkpoint(small_shape, tmp_path / "b", seed=2, shard_bytes=4000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_init_refuses(small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown shape 'huge', known are tiny, mid, 80b-a3b"):
        init_checkpoint("huge", tmp_path / "a")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        init_checkpoint(small_shape, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"needs .* GB, the disk has 0\.0 GB free"):
        init_checkpoint(small_shape, tmp_path / "full")


# ---- what can be wrong -------------------------------------------------------------------------------------


def drop(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        save_file({name: tensor for name, tensor in held.items() if not name.startswith(names)}, folder / SINGLE)

    return damage


def add(name: str, shape: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(load_file(folder / SINGLE) | {name: torch.ones(shape).to(dtype)}, folder / SINGLE)

    return damage


def cut(bytes_left: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / SINGLE
        os.truncate(path, int(bytes_left * path.stat().st_size) if bytes_left < 1 else int(bytes_left))

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void(folder.joinpath(name).write_text(text))


def void(_: object) -> None: ...


def configure(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **{name: value})


def append_bytes(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")


def pickled_instead(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


PREFIX = "model.layers.0.mlp.experts.1"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor missing": (drop("model.norm"), r"missing a tensor \(model\.norm\.weight\)"),
    "many missing": (
        drop("model.layers.0.mlp.experts.1."),
        rf"missing 3 tensors \({PREFIX}\.gate_proj\.weight, .*up_proj\.weight, .*down_proj\.weight\)",
    ),
    "more missing": (drop("model.layers.0.mlp.experts."), r"missing 9 tensors \(.*, \.\.\.\)"),
    "unexpected": (add("model.layers.7.x"), r"unexpected a tensor \(model\.layers\.7\.x\)"),
    "wrong shape": (
        add("lm_head.weight"),
        r"lm_head\.weight is \[3, 4\], expected \[48, 16\] by config\.json",
    ),
    "config of another shape": (
        configure("hidden_size", 24),
        r"is \[48, 16\], expected \[48, 24\] by config",
    ),
    "fewer experts than stored": (
        configure("num_experts", 2),
        r"mlp\.gate\.weight is \[3, 16\], expected \[2, 16\]",
    ),
    "truncated": (
        cut(0.7),
        r"model\.safetensors: truncated: \d+ bytes, expected \d+; copy or download it again",
    ),
    "truncated in the header": (
        cut(100),
        r"truncated, or no safetensors file: 100 bytes, expected \d+ for the header",
    ),
    "empty file": (cut(0.0), "truncated, or no safetensors file: 0 bytes"),
    "too long": (append_bytes, r"corrupt: \d+ bytes, expected \d+"),
    "no safetensors at all": (
        write(SINGLE, "version https://git-lfs.github.com/spec/v1"),
        "no safetensors file",
    ),
    "corrupt header": (write(SINGLE, "\x08\0\0\0\0\0\0\0{'a': 1}"), "corrupt header"),
    "header of something else": (write(SINGLE, '\x08\0\0\0\0\0\0\0{"a": 1}'), "corrupt header"),
    "stored as float8": (
        add("lm_head.weight", (48, 16), torch.float8_e4m3fn),
        r"lm_head\.weight is of dtype F8_E4M3, supported are F64, F32, BF16, F16",
    ),
    "shard missing": (
        write(INDEX, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        r"model-00001-of-00002\.safetensors: the index names it, but it is missing \(1 of 1 files are\)",
    ),
    "index outside the folder": (
        write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'),
        "no file of this folder",
    ),
    "index without map": (write(INDEX, "{}"), "no weight_map"),
    "pickled": (pickled_instead, "only pickled weights"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "no weights, expected model.safetensors or"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "config is no JSON": (write("config.json", "{"), r"config\.json: not valid JSON"),
    "config is a list": (write("config.json", "[]"), "expected a JSON object, got list"),
    "unknown architecture": (
        configure("model_type", "llama"),
        "unknown model_type 'llama', known are qwen3, qwen3_next",
    ),
    "no architecture": (configure("model_type", None), "unknown model_type 'None'"),
    "quantised": (
        configure("quantization_config", {"quant_method": "fp8"}),
        r"quantised weights \(fp8\) are not supported yet",
    ),
    "a number as text": (configure("hidden_size", "16"), "hidden_size must be of type int, got '16'"),
    "no width": (configure("hidden_size", -3), "hidden_size must be 1 or more, got -3"),
    "no step": (configure("decoder_sparse_step", 0), "decoder_sparse_step must be 1 or more, got 0"),
    "zero heads": (configure("num_key_value_heads", 0), "num_key_value_heads|makes no model"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_faults_are_told_in_one_line(fault: str, tmp_path: Path) -> None:
    save_model(new_model(), tmp_path)
    damage, message = DAMAGES[fault]
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_unsupported_dtype(tmp_path: Path) -> None:
    save_model(new_model(DENSE), tmp_path)
    with pytest.raises(ValueError, match="dtype 'int4' is not supported, expected float32, bfloat16, float16 or auto"):
        load_model(tmp_path, "int4")


def test_no_folder_and_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "OfflineModeIsEnabled"])
def test_hub_out_of_reach(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(weights.PICKLED) for pattern in allow_patterns)
        raise getattr(huggingface_hub.errors, error)("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        OSError, match="owner/model: no such folder, and not to be had from the hub: cannot reach the hub"
    ):
        load("owner/model")


def test_hub_names_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(new_model(DENSE), tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert same_weights(load("owner/model")[0], new_model(DENSE))


def test_read_config(tmp_path: Path) -> None:
    save_model(new_model(), tmp_path)
    assert read_config(tmp_path) == NEXT


def test_2000_mutated_folders(
    tmp_path: Path,
    mutate_bytes: Callable[[bytes, random.Random], bytes],
    mutate_json: Callable[[Any, random.Random], Any],
) -> None:
    """Each is read, or refused in one line; none makes memory grow."""
    save_model(new_model(NEXT), tmp_path, shard_bytes=20_000)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    refused = 0
    reset_peak_memory()
    before = peak_memory_gb()
    for seed in range(2000):
        chance = random.Random(seed)
        name = chance.choice([*shards, *shards, INDEX, "config.json"])
        path, raw = tmp_path / name, files[name]
        path.unlink()  # quicker than to write over it
        path.write_bytes(mutated_file(raw, chance, mutate_bytes, mutate_json))
        try:
            for _ in read_parameters(open_checkpoint(tmp_path), torch.float32):
                pass
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, seed
            refused += 1
        path.write_bytes(raw)
    assert refused > 1000
    assert peak_memory_gb() < before + 0.1


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_json_without_bottom(name: str, tmp_path: Path) -> None:
    save_model(new_model(), tmp_path)
    text = b"[" * 100_000
    (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text if name == SINGLE else text)
    with pytest.raises(ValueError, match=r"corrupt header|not valid JSON"):
        open_checkpoint(tmp_path)


def mutated_file(
    raw: bytes,
    chance: random.Random,
    mutate_bytes: Callable[[bytes, random.Random], bytes],
    mutate_json: Callable[[Any, random.Random], Any],
) -> bytes:
    """Of a file of tensors mostly the header is changed, and its length fits."""
    if raw[:1] == b"{":
        return mutate_bytes(raw, chance) if chance.random() < 0.5 else dump(mutate_json(json.loads(raw), chance))
    length = int.from_bytes(raw[:8], "little")
    header, tensors = raw[8 : 8 + length], raw[8 + length :]
    kind = chance.random()
    if kind < 0.2:
        return mutate_bytes(raw, chance)
    header = mutate_bytes(header, chance) if kind < 0.4 else dump(mutate_json(json.loads(header), chance))
    return len(header).to_bytes(8, "little") + header + tensors


def dump(value: object) -> bytes:
    return json.dumps(value).encode()
