"""GGUF files give the model that they were made of, and whatever is wrong with one is told in one line."""

from __future__ import annotations

import lzma
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import cli
from tenfold.models import Model
from tenfold.models.ggml import BLOCK_TYPES, dequantize
from tenfold.models.gguf import MOST_ITEMS, read_gguf
from tenfold.models.info import describe
from tenfold.models.llama_cpp import match_parts, read_configuration, read_tokenizer
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from tenfold.models.weights import build_on_meta, load, load_model, open_checkpoint
from tenfold.tokenizer import Tokenizer

PACKED = Path(__file__).parent / "gguf"
TEXT = "Hello <|im_start|>the quick 12345 brown\n\n  naïve 漢字 e\u0301<|im_end|>"
CONVERTED = 1e-5  # relative error of logits: norms have gone through `1 + w`, and A_log through exp, in fp32
Values = dict[str, tuple[object, GGUFValueType, GGUFValueType]]
Tensors = dict[str, np.ndarray]
Edit = Callable[[Values, Tensors], None]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with everything that llama.cpp wrote, unpacked."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(PACKED, folder, dirs_exist_ok=True)
    for path in folder.rglob("*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    return folder


def rewrite(source: Path, target: Path, edit: Edit, parts_of: int = 0) -> Path:
    """The file once more, by the gguf package: dequantised, edited, in several parts if so wished."""
    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values: Values = {name: (field.contents(), field.types[0], field.types[-1]) for name, field in fields.items()}
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    edit(values, tensors)
    writer = GGUFWriter(target, str(values.pop("general.architecture")[0]), split_max_tensors=parts_of)
    for name, (value, kind, element) in values.items():
        writer.add_key_value(name, value, kind, element if kind == GGUFValueType.ARRAY else None)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def unchanged(values: Values, tensors: Tensors) -> None:
    pass


def setting(name: str, value: object, kind: GGUFValueType = GGUFValueType.UINT32) -> Edit:
    return lambda values, tensors: values.update({name: (value, kind, kind)})


def without(name: str) -> Edit:
    def edit(values: Values, tensors: Tensors) -> None:
        assert (values.pop(name, None) is None) != (tensors.pop(name, None) is None), name

    return edit


def holding(name: str, tensor: np.ndarray) -> Edit:
    return lambda values, tensors: tensors.update({name: tensor})


def same_weights(found: Model, expected: Model) -> bool:
    state, other = found.state_dict(), expected.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- what the converter was given comes out --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["next", "dense"])
def test_a_converted_model_is_the_original(name: str, files: Path) -> None:
    ours, original = load_model(files / f"{name}-f32.gguf"), load_model(files / name)
    assert ours.config == replace(original.config, eos_token_id=277)  # the converter adds the tokenizer's
    tokens = torch.randperm(288, generator=torch.Generator().manual_seed(0))[None]
    assert relative_error(ours(tokens), original(tokens)) < CONVERTED
    state = ours.state_dict()
    for key, expected in original.state_dict().items():
        torch.testing.assert_close(state[key], expected, atol=1e-7, rtol=1e-6, msg=key)


@torch.no_grad()
def test_multi_token_prediction_is_read(files: Path) -> None:
    tokens = torch.arange(40)[None]
    drafts = []
    for model in load_model(files / "next-f32.gguf"), load_model(files / "next"):
        assert isinstance(model, Qwen3Next)
        drafts.append(model.draft_states(tokens, model.hidden_states(tokens)[0], 2)[1][0])
    assert relative_error(*drafts) < CONVERTED


@pytest.mark.parametrize("name", ["next-q8_0", "wide-mixed"])
def test_quantised_files_are_what_the_gguf_package_takes_them_for(name: str, files: Path, tmp_path: Path) -> None:
    plain = rewrite(files / f"{name}.gguf", tmp_path / "plain.gguf", unchanged)
    assert {tensor.dtype for tensor in read_gguf(plain).tensors.values()} == {"F32"}
    assert same_weights(load_model(files / f"{name}.gguf"), load_model(plain))


def test_every_type_is_in_a_file(files: Path) -> None:
    found = {tensor.dtype for tensor in read_gguf(files / "wide-mixed.gguf").tensors.values()}
    substitutes = {"Q5_0", "Q5_1"}  # of Q4_K and Q5_K, in rows of other lengths
    assert found == set(BLOCK_TYPES) - substitutes


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_of_any_bytes(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]] == (kind.weights, kind.bytes)
    assert GGMLQuantizationType[name] == kind.number
    raw = np.random.default_rng(0).integers(0, 256, (4000, kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # scales may be infinite or no number
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[name]).flatten().astype(np.float32)
    found = dequantize(torch.from_numpy(raw).flatten(), name).float().numpy()
    np.testing.assert_array_equal(found, expected)


def test_dtypes(files: Path) -> None:
    for name, chosen, expected in (
        ("next-q8_0", "auto", torch.bfloat16),
        ("next-f32", "auto", torch.float32),
        ("next-f32", "float16", torch.float16),
    ):
        model = load_model(files / f"{name}.gguf", chosen)
        for key, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if key.endswith(("A_log", "dt_bias")) else expected), key


def test_parts_of_a_file(files: Path, tmp_path: Path) -> None:
    rewrite(files / "next-f32.gguf", tmp_path / "model.gguf", unchanged, parts_of=20)
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"model-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for path in parts:
        assert same_weights(load_model(path), load_model(files / "next-f32.gguf"))
    assert describe(parts[0]).files == 3
    with pytest.raises(ValueError, match="one of 3 parts"):
        open_checkpoint(parts[0].rename(tmp_path / "renamed.gguf"))
    with pytest.raises(FileNotFoundError, match="00001-of-00003"):
        open_checkpoint(parts[1])


def test_what_other_converters_write(files: Path, tmp_path: Path) -> None:
    def merge(values: Values, tensors: Tensors) -> None:
        """Experts by `--fuse-gate-up-exps`; qkvz as in the model, in 2025's; layers by their interval alone."""
        for i in range(3):
            gate, up = (tensors.pop(f"blk.{i}.ffn_{half}_exps.weight") for half in ("gate", "up"))
            tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate((gate, up), 1)
        del tensors["blk.0.attn_qkv.weight"], tensors["blk.0.attn_gate.weight"]
        original = load_model(files / "next").state_dict()["model.layers.0.linear_attn.in_proj_qkvz.weight"]
        tensors["blk.0.ssm_in.weight"] = original.numpy()
        del values["qwen3next.attention.recurrent_layers"]

    merged = rewrite(files / "next-f32.gguf", tmp_path / "merged.gguf", merge)
    assert same_weights(load_model(merged), load_model(files / "next-f32.gguf"))


def test_files_that_do_not_say_which_layers_attend(files: Path, tmp_path: Path) -> None:
    def edit(values: Values, tensors: Tensors) -> None:
        del values["qwen3next.attention.recurrent_layers"], values["qwen3next.full_attention_interval"]

    config = read_configuration(read_gguf(rewrite(files / "next-f32.gguf", tmp_path / "old.gguf", edit)))
    assert config.layer_kinds == Qwen3NextConfig(num_hidden_layers=2).layer_kinds


def test_yarn(files: Path, tmp_path: Path) -> None:
    def stretch(values: Values, tensors: Tensors) -> None:
        number = GGUFValueType.FLOAT32
        values["qwen3.rope.scaling.type"] = ("yarn", GGUFValueType.STRING, GGUFValueType.STRING)
        values["qwen3.rope.scaling.factor"] = (4.0, number, number)
        values["qwen3.rope.scaling.original_context_length"] = (128, GGUFValueType.UINT32, GGUFValueType.UINT32)

    config = open_checkpoint(rewrite(files / "dense-f32.gguf", tmp_path / "yarn.gguf", stretch)).config
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_the_tokenizer_is_the_original(files: Path, tmp_path: Path) -> None:
    ours, original = load(files / "next-q8_0.gguf")[1], Tokenizer.from_folder(files / "next")
    assert ours is not None and original is not None
    assert (ours.vocab_size, ours.stop_ids) == (original.vocab_size, original.stop_ids)
    ours.save(tmp_path)
    for tokenizer in ours, Tokenizer.from_folder(tmp_path):
        assert tokenizer is not None
        for special in (True, False):
            assert tokenizer.encode(TEXT, special) == original.encode(TEXT, special)
        ids = original.encode(TEXT)
        assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
        messages = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)


def test_a_file_without_tokenizer(files: Path, tmp_path: Path) -> None:
    bare = rewrite(files / "dense-f32.gguf", tmp_path / "bare.gguf", without("tokenizer.ggml.model"))
    assert load(bare)[1] is None and not describe(bare).tokenizer


def test_the_description(files: Path) -> None:
    info, original = describe(files / "next-q8_0.gguf"), describe(files / "next")
    assert set(info.bytes_by_dtype) == {"F32", "F16", "Q8_0"} and info.expert_layout == "stacked" and info.tokenizer
    same = ("parameters", "mtp_parameters", "active_body", "active_with_head", "layout", "state_bytes", "experts")
    assert all(getattr(info, name) == getattr(original, name) for name in same)


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.parse(["generate", str(files / "wide-mixed.gguf"), "--prompt", "the quick", "--max-tokens", "3"])()
    assert capsys.readouterr().out.startswith("the quick")
    cli.parse(["info", str(files / "wide-mixed.gguf")])()
    assert "Q4_K" in capsys.readouterr().out


# ---- what can be wrong with a file ---------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(*tensors: bytes, values: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(values))))
    return head + b"".join(values) + b"".join(tensors) + bytes(1024)


KEY = text("key")
HOSTILE = {
    "nothing": (b"", "0 bytes, but the header wants 4"),
    "another format": (b"PK\3\4" + bytes(99), "begins with b'PK.x03.x04', expected b'GGUF'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian GGUF, expected little-endian of version 2 or 3"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 1, 1), "version 1 GGUF"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 1, 1), "version 4 GGUF"),
    "tensors without end": (file_of(counts=(1 << 60, 0)), "corrupt: '' has 0 dimensions"),
    "values without end": (file_of(counts=(0, 1 << 60)), "truncated or corrupt"),
    "a long name": (file_of(struct.pack("<Q", 1 << 62)), f"the header wants {1 << 62}"),
    "a name in Latin-1": (file_of(struct.pack("<Q", 1) + b"\xe9"), "no UTF-8"),
    "a type of value": (file_of(values=(KEY + struct.pack("<I", 99),)), "a value of type 99"),
    "a type of element": (file_of(values=(KEY + struct.pack("<IIQ", 9, 13, 1),)), "a value of type 13"),
    "a nest": (file_of(values=(KEY + struct.pack("<IIQIQ", 9, 9, 1, 9, 1),)), "a value of type 9"),
    "a long array": (file_of(values=(KEY + struct.pack("<IIQ", 9, 0, 1 << 60),)), f"{1 << 60} values"),
    "a longish array": (file_of(values=(KEY + struct.pack("<IIQ", 9, 12, MOST_ITEMS),)), "truncated or corrupt"),
    "many texts": (file_of(values=(KEY + struct.pack("<IIQ", 9, 8, MOST_ITEMS),)), "truncated or corrupt"),
    "dimensions without end": (file_of(text("t") + struct.pack("<I", 1 << 31)), f"{1 << 31} dimensions"),
    "no dimensions": (file_of(tensor(shape=())), "0 dimensions"),
    "a huge shape": (file_of(tensor(shape=((1 << 64) - 1,) * 4)), "truncated"),
    "an empty shape": (file_of(tensor(shape=(32, 0))), r"'t' is \[0, 32\]"),
    "an unknown type": (file_of(tensor(kind=16)), "'t' is of GGML type 16, known are F32, F16, .*; quantise"),
    "half a block": (file_of(tensor(shape=(48,), kind=8)), r"'t' is \[48\], expected rows of a multiple of 32"),
    "a far offset": (file_of(tensor(offset=(1 << 64) - 1)), "truncated"),
    "an overlap": (file_of(tensor("a"), tensor("b", offset=64)), "tensors overlap"),
    "a tensor twice": (file_of(tensor(), tensor(offset=128)), "holds a tensor twice"),
    "alignment 0": (file_of(tensor(), values=(text("general.alignment") + bytes([4]) + bytes(7),)), "alignment is 0"),
    "no values": (file_of(tensor()), "general.architecture is missing"),
}


@pytest.mark.parametrize(("raw", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(raw: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=complaint) as caught:
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert peak < 1 << 20


FAULTS: dict[str, tuple[str, Edit, str]] = {
    "architecture": ("dense", setting("general.architecture", "llama"), "unknown architecture 'llama', known are"),
    "no layers": ("dense", without("qwen3.block_count"), "block_count is missing, expected int"),
    "many layers": ("dense", setting("qwen3.block_count", 1 << 31), f"block_count is {1 << 31}, expected 1 to 24"),
    "no heads": ("dense", setting("qwen3.attention.head_count", 0), "head_count is 0, expected 1 to"),
    "odd heads": ("dense", setting("qwen3.attention.head_count", 3), "num_attention_heads 3 is no multiple"),
    "heads in words": ("dense", setting("qwen3.attention.head_count", "4", GGUFValueType.STRING), "is of type str"),
    "wide": (
        "dense",
        setting("qwen3.embedding_length", 64),
        r"embed_tokens.weight is \[288, 32\], expected \[288, 64\]",
    ),
    "huge": ("next", setting("qwen3next.expert_count", 1 << 30), f"expert_count is {1 << 30}, expected 1 to"),
    "eps": ("dense", setting("qwen3.attention.layer_norm_rms_epsilon", 0.0, GGUFValueType.FLOAT32), "is 0.0, expected"),
    "theta": (
        "dense",
        setting("qwen3.rope.freq_base", 1.0, GGUFValueType.FLOAT32),
        "rope_theta must be above 1, got 1",
    ),
    "scaling": ("dense", setting("qwen3.rope.scaling.type", "linear", GGUFValueType.STRING), "rope_type 'linear'"),
    "rotation": ("next", setting("qwen3next.rope.dimension_count", 16), "dimension_count is 16, expected 1 to 8"),
    "MTP": ("next", setting("qwen3next.nextn_predict_layers", 9), "nextn_predict_layers is 9, expected 1 to 3"),
    "no embedding": ("dense", without("token_embd.weight"), "no token_embd.weight"),
    "missing": ("next", without("blk.0.ssm_a"), r"missing a tensor \(model.layers.0.linear_attn.A_log\); its metadata"),
    "half missing": ("next", without("blk.1.ffn_up_exps.weight"), "missing a tensor .*experts.up_proj"),
    "unexpected": ("dense", holding("blk.0.attn_q.bias", np.zeros(64)), r"unexpected a tensor \(blk.0.attn_q.bias\)"),
    "shape": (
        "next",
        holding("blk.0.attn_gate.weight", np.zeros((32, 32))),
        r"in_proj_z.weight is \[32, 32\], expected",
    ),
    "growth": ("next", holding("blk.0.ssm_a", np.ones(6)), r"A_log holds numbers above 0, expected -exp\(A_log\)"),
    "words": (
        "dense",
        setting("tokenizer.ggml.model", "llama", GGUFValueType.STRING),
        "tokenizer of the kind .'llama'",
    ),
    "cuts": ("dense", setting("tokenizer.ggml.pre", "llama-bpe", GGUFValueType.STRING), "'llama-bpe'"),
    "no merges": ("dense", without("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing, expected list"),
    "no types": ("dense", without("tokenizer.ggml.token_type"), "tokenizer.ggml.token_type is missing"),
}


@pytest.mark.parametrize(("name", "edit", "complaint"), FAULTS.values(), ids=FAULTS)
def test_faults(name: str, edit: Edit, complaint: str, files: Path, tmp_path: Path) -> None:
    path = rewrite(files / f"{name}-f32.gguf", tmp_path / "model.gguf", edit)
    with pytest.raises(ValueError, match=complaint) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short(files: Path, tmp_path: Path) -> None:
    raw, path = (files / "dense-f32.gguf").read_bytes(), tmp_path / "cut.gguf"
    for size in (*range(0, 256), *range(256, len(raw), 499), len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"truncated.*download it again$"):
            open_checkpoint(path)


def test_merges_of_unknown_tokens(files: Path, tmp_path: Path) -> None:
    raw = (files / "dense-f32.gguf").read_bytes()
    begin = raw.index(b"tokenizer.ggml.merges") + len("tokenizer.ggml.merges") + 4 + 4 + 8 + 8
    path = tmp_path / "merges.gguf"
    path.write_bytes(raw[:begin] + b"\x01" + raw[begin + 1 :])
    with pytest.raises(ValueError, match="no tokenizer") as caught:
        read_tokenizer(read_gguf(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def header_of(path: Path) -> bytes:
    return path.read_bytes()[: min(tensor.begin for tensor in read_gguf(path).tensors.values())]


NUMBERS = st.sampled_from([0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1])
BYTES = st.binary(min_size=1, max_size=4) | NUMBERS.map(lambda n: struct.pack("<Q", n))


@settings(max_examples=2000)
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), BYTES), min_size=1, max_size=3), cut=st.booleans())
def test_mutated_headers(places: list[tuple[float, bytes]], cut: bool, files: Path) -> None:
    """Every one opens, or is refused in one line."""
    path, mutated = files / "next-q8_0.gguf", files / "mutated.gguf"
    raw, size = bytearray(header_of(path)), path.stat().st_size
    for place, new in places:
        at = int(place * len(raw))
        raw[at : at + len(new)] = new
    with mutated.open("wb") as file:
        file.write(raw[: int(places[0][0] * len(raw))] if cut and len(places) == 3 else raw)
        file.truncate(size)
    try:
        header = read_gguf(mutated)
        config = read_configuration(header)
        read_tokenizer(header)
        match_parts(open_checkpoint(mutated).tensors, build_on_meta(config), mutated)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
