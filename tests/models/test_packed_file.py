"""Packed files: what is read is what was packed, and whatever else a file may hold is told in one line."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenfold.kernels import cpu
from tenfold.memory import peak_memory_gb, reset_peak_memory
from tenfold.models import Config, Model
from tenfold.models.layout import PACKED
from tenfold.models.native import NativeModel
from tenfold.models.packed_file import HEAD, MAGIC, PAGE, PackedWriter, open_packed, read_owners, verify
from tenfold.models.packing import complete_owners, owner_by_owner, pack_owner, planned_bytes
from tenfold.models.qwen3 import Qwen3, Qwen3Config
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)

NEXT = Qwen3NextConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    full_attention_interval=3,
    mlp_only_layers=(1,),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
    num_nextn_predict_layers=1,
)
DENSE = Qwen3Config(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
)
TOKENS = [3, 1, 99, 4, 50]


def new_model(config: Config) -> Model:
    model = Qwen3Next(config) if isinstance(config, Qwen3NextConfig) else Qwen3(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def write(model: Model, folder: Path, format: str) -> Path:
    parameters = dict(model.named_parameters())
    in_order = ((name, parameters[name]) for name in owner_by_owner(model))
    with PackedWriter(folder / PACKED) as writer:
        for owner, weights in complete_owners(model, in_order):
            writer.add(owner, pack_owner(model.config, owner, weights, format))
        writer.finish(format, "a test")
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(new_model(NEXT), tmp_path_factory.mktemp("packed"), "int4")


def next_logits(model: NativeModel) -> torch.Tensor:
    return model.next_logits(TOKENS, model.new_cache())


def next_logits_of(folder: Path) -> torch.Tensor:
    file = open_packed(folder)
    return next_logits(NativeModel(file.config, read_owners(file)))


@pytest.mark.parametrize(
    "config", [NEXT, replace(NEXT, tie_word_embeddings=True), DENSE], ids=["next", "tied", "dense"]
)
@pytest.mark.parametrize("format", cpu.FORMATS)
def test_what_is_read_is_what_was_packed(config: Config, format: str, tmp_path: Path) -> None:
    model = new_model(config)
    file = open_packed(write(model, tmp_path, format))
    assert (file.config, file.format, file.source) == (config, format, "a test")
    packed = NativeModel.pack(config, model.named_parameters(), format)
    assert torch.equal(next_logits(NativeModel(file.config, read_owners(file))), next_logits(packed))
    verify(tmp_path)


def test_places(folder: Path) -> None:
    file = open_packed(folder)
    entries = [entry for entries in file.owners.values() for entry in entries]
    experts = [entry for entry in entries if entry.kind == "experts"]
    assert len(experts) == 3  # of two layers and of multi-token prediction
    for entry in experts:
        assert all(offset % PAGE == 0 and length % PAGE == 0 for offset, length, _ in entry.pieces())
        assert len(entry.checksums) == entry.shape[0] == 5  # two of which share the shared one's width
    assert all(entry.offset % 64 == 0 for entry in entries)
    planned = planned_bytes(new_model(NEXT), "int4")
    assert sum(entry.nbytes for entry in entries) <= planned < file.size < planned + 30_000


def test_all_weights_are_parts_of_one_copy(folder: Path) -> None:
    file = open_packed(folder)
    content = np.fromfile(file.path, np.uint8)
    begins = set()
    for owner, packed in read_owners(file):
        offsets = {entry.name: entry.offset for entry in file.owners[owner]}
        for name, matrix in packed.matrices.items():
            begins.add(matrix.bytes.__array_interface__["data"][0] - offsets[name])
            assert np.array_equal(matrix.bytes, content[offsets[name] :][: matrix.nbytes])
    assert len(begins) == 1


def test_every_damaged_byte_of_weights_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = bytearray((folder / PACKED).read_bytes())
    for owner, entries in open_packed(folder).owners.items():
        for entry in entries:
            for i, (offset, length, _) in enumerate(entry.pieces()):
                raw[offset + length // 2] ^= 4
                (tmp_path / PACKED).write_bytes(raw)
                raw[offset + length // 2] ^= 4
                name = f"{owner}.{entry.name}" + (f" {i}" if entry.kind == "experts" else "")
                with pytest.raises(ValueError, match=rf"{PACKED}: {name} is damaged; copy or download the file again$"):
                    verify(tmp_path)


def test_an_unfinished_file_is_none_and_goes_on(folder: Path, tmp_path: Path) -> None:
    model = new_model(NEXT)
    owners = {owner: dict(weights) for owner, weights in complete_owners(model, model.named_parameters())}
    packed = {owner: pack_owner(NEXT, owner, weights, "int4") for owner, weights in owners.items()}
    order = list(open_packed(folder).owners)
    with PackedWriter(tmp_path / PACKED) as writer:
        for owner in order[:3]:
            writer.add(owner, packed[owner])
    kept = {owner: list(writer.owners[owner]) for owner in order[:2]}  # of the third one nobody knew
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="quantize or copy it again"):
        open_packed(tmp_path)
    with PackedWriter(tmp_path / PACKED, kept) as writer:
        for owner in order[2:]:
            writer.add(owner, packed[owner])
        writer.finish("int4", "a test")
    assert (tmp_path / PACKED).read_bytes() == (folder / PACKED).read_bytes()


def test_what_is_kept_is_verified(tmp_path: Path) -> None:
    model = new_model(DENSE)
    with PackedWriter(tmp_path / PACKED) as writer:
        for owner, weights in complete_owners(model, model.named_parameters()):
            writer.add(owner, pack_owner(DENSE, owner, weights, "int8"))
    with (tmp_path / PACKED).open("r+b") as file:
        file.seek(PAGE + 1000)
        file.write(b"damage")
    with pytest.raises(ValueError, match="is damaged"):
        PackedWriter(tmp_path / PACKED, {owner: list(entries) for owner, entries in writer.owners.items()})


def test_opening_needs_no_compiler_of_torch(folder: Path) -> None:
    """Which takes seconds to import, and comes with any random number on the meta device."""
    code = "import sys; from pathlib import Path; from tenfold.models.packed_file import open_packed; "
    code += "open_packed(Path(sys.argv[1])); print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# ---- hostile files -----------------------------------------------------------------------------------------


def parts_of(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The weights with the page before them, and the index."""
    raw = (folder / PACKED).read_bytes()
    _, _, _, offset, length = HEAD.unpack(raw[: HEAD.size])
    return raw[:offset], json.loads(raw[offset : offset + length])


def file_of(weights: bytes, index: bytes, **changes: int) -> bytes:
    """A file whose first page fits its index, but for the changes."""
    head = {"version": 1, "checksum": zlib.crc32(index), "offset": len(weights), "length": len(index)} | changes
    return HEAD.pack(MAGIC, *head.values()) + weights[HEAD.size :] + index


Edit = Callable[[dict[str, Any]], object]


def entry(which: str, **values: object) -> Edit:
    """Changes an entry of layer 0."""

    def edit(index: dict[str, Any]) -> None:
        next(e for e in index["owners"]["model.layers.0"] if e["name"] == which).update(values)

    return edit


def overlap(index: dict[str, Any]) -> None:
    entries = index["owners"]["model.layers.0"]
    entries[2]["offset"] = entries[1]["offset"]


OUT_PROJ = "linear_attn.out_proj.weight"
FAULTS: dict[str, tuple[Edit, str]] = {
    "format": (entry("experts", format="int3"), "unknown kind 'experts' 'int3'; update Tenfold"),
    "kind": (entry("experts", kind="router"), "unknown kind 'router'"),
    "shape": (entry(OUT_PROJ, shape=[64, 64]), r"has 576 bytes, expected 2304 by its shape"),
    "huge shape": (entry(OUT_PROJ, shape=[1 << 60, 32]), r"is \[1152921504606846976, 32\]"),
    "group": (entry(OUT_PROJ, shape=[32, 33]), r"is \[32, 33\], expected multiples of 32"),
    "rank": (entry(OUT_PROJ, shape=[32]), r"is \[32\]"),
    "length": (entry(OUT_PROJ, nbytes=1 << 60), "has 1152921504606846976 bytes, expected 576 by its shape"),
    "outside": (entry(OUT_PROJ, offset=1 << 60), "lie outside of the file"),
    "in the head": (entry(OUT_PROJ, offset=64), "lie outside of the file"),
    "negative": (entry(OUT_PROJ, offset=-4096), "lie outside of the file"),
    "overlap": (overlap, "overlap"),
    "alignment": (entry("experts", offset=4096 + 64), "'experts' is not aligned"),
    "checksums": (entry("experts", checksums=[1]), "'experts' has 1 checksums"),
    "wrong types": (entry(OUT_PROJ, shape="3232"), "shape is of type str, expected list"),
    "fractions": (entry(OUT_PROJ, shape=[32.0, 32]), "no whole numbers"),
    "name": (entry(OUT_PROJ, name="out"), "layers.0.linear_attn.out_proj.weight is not there, expected"),
    "layers": (lambda index: index["owners"].pop("model.layers.2"), "holds 2 layers, expected 3 by config.json"),
    "no head": (lambda index: index["owners"].pop("lm_head"), "has no lm_head, unlike config.json"),
    "more": (lambda index: index["owners"].update(extra=[]), "has extra, unlike config.json"),
    "no owners": (lambda index: index.pop("owners"), "something is missing, or of the wrong type"),
    "source": (lambda index: index.update(source=5), "no text"),
}


@pytest.mark.parametrize(("edit", "complaint"), FAULTS.values(), ids=FAULTS)
def test_faults(edit: Edit, complaint: str, folder: Path, tmp_path: Path) -> None:
    weights, index = parts_of(folder)
    edit(index)
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / PACKED).write_bytes(file_of(weights, json.dumps(index).encode()))
    with pytest.raises(ValueError, match=complaint) as caught:
        open_packed(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", r"begins with b'', expected b'TENFOLD\\x00'"),
        (file_of(bytes(PAGE), b"{}", version=2), "version 2, expected 1; update Tenfold, or quantize again"),
        (file_of(bytes(PAGE), b"{}", length=1 << 60), "truncated or corrupt: 4098 bytes, expected"),
        (file_of(bytes(PAGE), b"{}", checksum=0), "its index has another checksum"),
        (file_of(bytes(PAGE), b"[" * 100_000), "corrupt index, no JSON"),
        (file_of(bytes(PAGE), b'{"owners": {"model": {"name": 1}}}'), "of the wrong type"),
        (file_of(bytes(PAGE), b'{"owners": {}, "format": "int4", "source": ""}'), "lie outside of the file"),
        (file_of(bytes(PAGE), b"9" * 5000), "no JSON"),
    ],
)
def test_files_of_another_kind(raw: bytes, complaint: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / PACKED).write_bytes(raw)
    with pytest.raises(ValueError, match=complaint) as caught:
        open_packed(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_2000_mutated_files(
    folder: Path,
    tmp_path: Path,
    mutate_bytes: Callable[[bytes, random.Random], bytes],
    mutate_json: Callable[[Any, random.Random], Any],
) -> None:
    """Each is run, or refused in one line; none makes memory grow."""
    weights, index = parts_of(folder)
    config = json.loads((folder / "config.json").read_text())
    text, whole = json.dumps(index).encode(), (folder / PACKED).read_bytes()
    path, refused = tmp_path / PACKED, 0
    reset_peak_memory()
    before = peak_memory_gb()
    for seed in range(2000):
        chance, kind = random.Random(seed), seed % 8
        path.unlink(missing_ok=True)  # quicker than to write over it
        if kind < 3:
            path.write_bytes(mutate_bytes(whole, chance))
        elif kind < 5:
            path.write_bytes(file_of(weights, mutate_bytes(text, chance)))
        else:
            path.write_bytes(file_of(weights, json.dumps(mutate_json(index, chance) if kind < 7 else index).encode()))
        if kind in (7, 0):
            (tmp_path / "config.json").write_text(json.dumps(mutate_json(config, chance) if kind else config))
        try:
            assert next_logits_of(tmp_path).shape[0] > 0, seed
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, seed
            refused += 1
    assert refused > 1000
    assert peak_memory_gb() < before + 0.1
