"""What building a corpus promises: the same bytes however often interrupted, or one line saying why not."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tenfold.tokenizer import Tokenizer
from tenfold.train import corpus, sources
from tenfold.train.corpus import FREE, CorpusConfig, assign_splits, build_corpus, first_of_equals
from tenfold.train.data import Corpus
from tenfold.train.shards import ShardWriter
from tenfold.train.sources import SPLITS, Form, Span, plan_spans, read_documents, wikitext_documents

SMALL = CorpusConfig(vocab_size=300, validation_fraction=0.0)
WORDS = [
    "the",
    "sea",
    "rises",
    "under",
    "grey",
    "light",
    "and",
    "small",
    "boats",
    "turn",
    "home",
    "0",
    "1",
    "2",
    "3",
    "é",
    "日本",
    "👍",
]


def text_of(number: int, words: int = 60) -> str:
    generator = np.random.default_rng(number)
    return f"{number} " + " ".join(generator.choice(WORDS, words)) + "\n"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_in(folder: Path, split: str = "train") -> list[str]:
    opened = Corpus(folder)
    documents = opened.documents(split)
    assert all(documents[i][-1] == opened.eos_id for i in range(len(documents)))
    return [opened.tokenizer.decode(documents[i][:-1].tolist()) for i in range(len(documents))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPAN_BYTES", 1000)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 3000)


# ---- what is read ------------------------------------------------------------------------------------------


def test_wikitext_is_the_canonical_one_and_splits_into_its_articles() -> None:
    raw = lzma.decompress(files("tenfold").joinpath("data/test.raw.xz").read_bytes())
    digest = hashlib.sha256(raw).hexdigest()
    assert digest.startswith("173c87a5") and digest.endswith("9e7dd08")
    for split, count in (("train", 600), ("validation", 60), ("test", 60)):
        documents = wikitext_documents(split)
        assert len(documents) == count
        assert all(text.startswith(" = ") and not text.startswith(" = =") for text in documents)
        assert all(text.count("\n = = ") for text in documents[:50])
    assert " \n" + "".join(wikitext_documents("test")) == raw.decode()


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [text_of(i) for i in range(20)]
    folders = [tmp_path / name for name in ("txt", "jsonl", "parquet", "gz", "xz", "separated")]
    for folder in folders:
        folder.mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"txt/{i:02d}.txt").write_text(text, encoding="utf-8", newline="")
    lines = write_jsonl(tmp_path / "jsonl/a.jsonl", texts).read_bytes()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "parquet/a.parquet", row_group_size=7)
    (tmp_path / "gz/a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "xz/a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "separated/a.txt").write_text("<|sep|>\n".join(texts), encoding="utf-8", newline="")
    for folder in folders:
        separator = "<|sep|>" if folder.name == "separated" else None
        config = CorpusConfig(vocab_size=300, validation_fraction=0.0, separator=separator)
        build_corpus([folder], tmp_path / "out" / folder.name, config)
        assert texts_in(tmp_path / "out" / folder.name) == texts


def test_folders_are_searched_globs_expanded_and_files_taken_once(tmp_path: Path) -> None:
    (tmp_path / "in/deep/.git").mkdir(parents=True)
    for name in ("deep/b.txt", "a.txt", "c.md", "deep/.git/d.txt", "e.bin"):
        (tmp_path / "in" / name).write_text(name)
    build_corpus([tmp_path / "in", str(tmp_path / "in/**/*.txt")], tmp_path / "x", SMALL)
    assert texts_in(tmp_path / "x") == ["a.txt", "deep/b.txt"]
    build_corpus([str(tmp_path / "in/*.md"), tmp_path / "in/e.bin"], tmp_path / "y", SMALL)
    assert texts_in(tmp_path / "y") == ["c.md", "e.bin"]


@given(
    lines=st.lists(st.sampled_from(["--", " -- ", "", "a", "bc", "d\r"])),
    ending=st.sampled_from(["", "\n"]),
    size=st.integers(1, 9),
)
def test_documents_do_not_depend_on_where_a_file_is_cut(
    lines: list[str], ending: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_text("\n".join(lines) + ending, encoding="utf-8", newline="")
    total, form = path.stat().st_size, Form("text", "--")
    spans = [Span(str(path), a, min(a + size, total), size) for a in range(0, total, size)]
    whole = [Span(str(path), 0, total, total)]
    found = [[d.text for span in cut for d in read_documents(span, form)] for cut in (spans, whole)]
    assert found[0] == found[1]
    assert "".join(found[0]) == "".join(line for line in path.open(newline="\n") if line.strip() != "--")


def test_large_files_are_read_in_parts(tmp_path: Path, small_units: None) -> None:
    texts = [text_of(i) for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert len(plan_spans([str(path)], Form("text", None))) > 20
    build_corpus([path], tmp_path / "out", SMALL)
    assert texts_in(tmp_path / "out") == texts


def test_long_documents_are_whole(tmp_path: Path) -> None:
    text = "".join(text_of(i) for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    build_corpus([tmp_path / "a.txt"], tmp_path / "out", SMALL)
    opened = Corpus(tmp_path / "out")
    assert opened.documents()[0].tolist() == [*opened.tokenizer.encode(text), opened.eos_id]


def test_special_tokens_in_text_end_no_document(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b", "c"])
    build_corpus([path], tmp_path / "out", SMALL)
    opened = Corpus(tmp_path / "out")
    assert [row.tolist().count(opened.eos_id) for row in opened.documents()] == [1, 1]


# ---- what is kept, and for what ----------------------------------------------------------------------------


def test_duplicates_and_empty_documents_are_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", " \n", "one", "three", "", "two", "one"])
    index = build_corpus([path], tmp_path / "out", SMALL)
    assert texts_in(tmp_path / "out") == ["one", "two", "three"]
    assert (index.duplicates, index.empty) == (3, 2)


def test_held_out_documents_depend_on_their_text_alone(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(200)]
    config = CorpusConfig(vocab_size=300, validation_fraction=0.2)
    build_corpus([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "a", config)
    build_corpus([write_jsonl(tmp_path / "b.jsonl", texts[::-1])], tmp_path / "b", config)
    held = texts_in(tmp_path / "a", "validation")
    assert 20 <= len(held) <= 60 and sorted(held) == sorted(texts_in(tmp_path / "b", "validation"))
    assert sorted(held + texts_in(tmp_path / "a")) == sorted(texts)


def test_wikitext_keeps_its_own_splits(tmp_path: Path) -> None:
    copied = wikitext_documents("test")[3]
    (tmp_path / "a.txt").write_text(copied, encoding="utf-8", newline="")
    index = build_corpus([tmp_path / "a.txt", "wikitext-2"], tmp_path / "out", CorpusConfig(vocab_size=400))
    assert {name: split.documents for name, split in index.splits.items()} == {
        "train": 600,
        "validation": 60,
        "test": 60,
    }
    assert index.duplicates == 1 and index.dtype == "uint16"  # training gave way to the test


@given(
    hashes=npst.arrays(np.uint64, st.tuples(st.integers(1, 12), st.just(2)), elements=st.integers(0, 5)),
    fraction=st.sampled_from([0.0, 1e-9, 0.5, 0.999]),
    data=st.data(),
)
def test_splits(hashes: np.ndarray, fraction: float, data: st.DataObject) -> None:
    hashes = hashes << np.uint64(61)
    codes = st.sampled_from([FREE, FREE, 0, 1, 2])
    given_splits = np.array(data.draw(st.lists(codes, min_size=len(hashes), max_size=len(hashes))), np.uint8)
    splits = assign_splits(hashes, given_splits, fraction)
    kept = first_of_equals(hashes, splits)
    free = given_splits == FREE
    assert (splits[~free] == given_splits[~free]).all()
    if free.all():
        assert (splits == SPLITS.index("train")).any()
        assert (splits == SPLITS.index("validation")).any() == (fraction > 0 and len(np.unique(hashes[:, 0])) > 1)
    equal = {tuple(row) for row in hashes.tolist()}
    assert len(equal) == kept.sum() == len({tuple(row) for row in hashes[kept].tolist()})
    for i in np.flatnonzero(kept & (splits == SPLITS.index("train"))):
        assert (splits[(hashes == hashes[i]).all(axis=1)] == SPLITS.index("train")).all()


@given(lengths=st.lists(st.integers(1, 9)), limit=st.integers(1, 12), parts=st.integers(1, 4))
def test_shards_are_bounded_and_lose_nothing(
    lengths: list[int], limit: int, parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    writer = ShardWriter(folder, "train", np.dtype(np.uint16), limit)
    begin = 0
    for part in np.array_split(np.array(lengths, np.int64), parts):
        writer.add(tokens[begin : begin + part.sum()], part)
        begin += part.sum()
    split = writer.finish()
    read = [np.fromfile(folder / shard.file, "<u2") for shard in split.shards]
    offsets = [np.fromfile(folder / shard.offsets_file, "<i8") for shard in split.shards]
    assert [int(n) for each in offsets for n in np.diff(each)] == lengths
    assert np.concatenate([np.empty(0), *read]).tolist() == tokens.tolist()
    assert all(shard.tokens <= limit or shard.documents == 1 for shard in split.shards)


def test_a_large_vocabulary_takes_four_bytes_and_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    Tokenizer.embedded().save(tmp_path / "qwen")
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two 日本"])
    config = CorpusConfig(tokenizer=tmp_path / "qwen", validation_fraction=0.0)
    index = build_corpus([path], tmp_path / "out", config)
    assert (index.dtype, index.vocab_size, index.eos_id) == ("uint32", 151669, 151643)
    assert texts_in(tmp_path / "out") == ["one", "two 日本"]
    assert contents(tmp_path / "qwen").items() <= contents(tmp_path / "out").items()


# ---- workers and interruptions -----------------------------------------------------------------------------


def test_result_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i % 150) for i in range(200)])
    config = CorpusConfig(vocab_size=300, validation_fraction=0.1, shard_tokens=2000)
    build_corpus([path], tmp_path / "one", config, workers=1)
    monkeypatch.setattr(corpus, "POOL_BYTES", 0)
    build_corpus([path], tmp_path / "two", config, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(Corpus(tmp_path / "one").index.splits["train"].shards) > 3


SCRIPT = """
import sys
from tenfold.train import corpus, sources
from tenfold.train.corpus import CorpusConfig, build_corpus
if __name__ == "__main__":
    sources.SPAN_BYTES, corpus.UNIT_BYTES, corpus.POOL_BYTES = 20_000, 20_000, 0
    config = CorpusConfig(vocab_size=300, validation_fraction=0.1, shard_tokens=50_000)
    build_corpus([sys.argv[1]], corpus.Path(sys.argv[2]), config, workers=2)
"""


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i, 200) for i in range(2500)])
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(path), str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def parts() -> int:
        return len(list((tmp_path / "killed/.build").glob("part-*.npz")))

    assert start("whole").wait() == 0
    seen = []
    for least in (1, 15):
        process = start("killed")
        while parts() < least and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # until its workers, which share its output, are gone too
        seen.append(parts())
        assert not (tmp_path / "killed/index.json").exists()
    assert 0 < seen[0] < seen[1] and start("killed").wait() == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_killed_while_merging(tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(50)])
    build_corpus([path], tmp_path / "whole", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_index", lambda folder, index: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus([path], tmp_path / "killed", SMALL)
    monkeypatch.setattr(corpus, "_encode", None)  # all parts are there
    build_corpus([path], tmp_path / "killed", SMALL)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_a_finished_corpus_is_kept_and_a_damaged_one_built_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(50)])
    build_corpus([path], tmp_path / "out", SMALL)
    before, shard = contents(tmp_path / "out"), tmp_path / "out/train-00000.bin"
    times = shard.stat().st_mtime_ns
    build_corpus([path], tmp_path / "out", SMALL)
    assert shard.stat().st_mtime_ns == times
    shard.write_bytes(b"\0" * shard.stat().st_size)
    build_corpus([path], tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == before


# ---- errors ------------------------------------------------------------------------------------------------


def complaint(tmp_path: Path, name: str, content: bytes | None, config: CorpusConfig = SMALL) -> str:
    """The one line that building from this file fails with."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build_corpus([path], tmp_path / "out", config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/index.json").exists()
    return str(caught.value).replace(str(tmp_path), "TMP")


SEPARATED = CorpusConfig(vocab_size=300, separator="--")


@pytest.mark.parametrize(
    ("name", "content", "config", "expected"),
    [
        ("none.txt", None, SMALL, "no input matches 'TMP/none.txt'"),
        ("*.txt", None, SMALL, "no input matches 'TMP/*.txt'"),
        ("a.txt", b" \n", SMALL, "no text in the inputs (TMP/a.txt): every document is empty"),
        ("a.txt", b"ab\xffc", SMALL, "TMP/a.txt: not UTF-8 at byte 2 (0xff)"),
        ("a.txt", b"ab\n--\nc\xc3", SEPARATED, "TMP/a.txt: not UTF-8 at byte 7 (0xc3)"),
        ("a.jsonl", b'{"text":"a"}\n\n{"text":"\xfe"}', SMALL, "TMP/a.jsonl: not UTF-8 at byte 23 (0xfe)"),
        ("a.jsonl", b'{"text":"a"}\n{', SMALL, "TMP/a.jsonl, byte 13: not a JSON object in one line"),
        ("a.jsonl", b"[1]", SMALL, "TMP/a.jsonl, byte 0: expected a JSON object, got list"),
        ("a.jsonl", b'{"body":"a"}', SMALL, "TMP/a.jsonl, byte 0: no field 'text' among body; set `field`"),
        ("a.jsonl", b'{"text":7}', SMALL, "TMP/a.jsonl, byte 0: field 'text' holds int, expected text"),
        ("a.jsonl", b'{"text":"\\ud800"}', SMALL, "field 'text' holds half a surrogate pair"),
        ("a.txt.gz", b"no gzip", SMALL, "TMP/a.txt.gz: damaged archive"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-20], SMALL, "TMP/a.txt.gz: damaged archive"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], SMALL, "TMP/a.txt.xz: damaged archive"),
        ("a.parquet", b"PAR1", SMALL, "TMP/a.parquet: no Parquet file"),
    ],
)
def test_bad_inputs_are_told_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, config: CorpusConfig, expected: str
) -> None:
    assert expected in complaint(tmp_path, name, content, config)


def test_bad_columns_and_folders(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert "no column 'text' among body" in complaint(tmp_path, "a.parquet", None)
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    assert "column 'text' holds int" in complaint(tmp_path, "b.parquet", None)
    (tmp_path / "empty").mkdir()
    assert "no input in folder TMP/empty" in complaint(tmp_path, "empty", None)
    assert "no tokenizer.json" in complaint(tmp_path, "b.parquet", None, CorpusConfig(tokenizer=tmp_path))


def test_a_worker_tells_its_error_too(tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Tokenizer.train(["text"], 300).save(tmp_path / "tokenizer")
    monkeypatch.setattr(corpus, "POOL_BYTES", 0)
    config = CorpusConfig(tokenizer=tmp_path / "tokenizer")
    lines = "".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(30)).encode() + b"{}\n"
    assert "no field 'text' among none" in complaint(tmp_path, "a.jsonl", lines, config)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    build_corpus([path], tmp_path / "out", SMALL)
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError,
        match=r"out holds a corpus of other inputs or settings; delete it, or choose another folder",
    ):
        build_corpus([path], tmp_path / "out", CorpusConfig(vocab_size=301))
    write_jsonl(path, ["one", "two", "three"])
    with pytest.raises(ValueError, match="other inputs or settings"):
        build_corpus([path], tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == before


def test_a_corrected_input_is_read_anew_and_the_others_are_not(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer.train(["text"], 300).save(tmp_path / "tokenizer")
    config = CorpusConfig(tokenizer=tmp_path / "tokenizer", validation_fraction=0.0)
    texts = [text_of(i) for i in range(30)]
    good, bad = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "b.jsonl"
    bad.write_text("{\n")
    with pytest.raises(ValueError, match="not a JSON object"):
        build_corpus([good, bad], tmp_path / "out", config, workers=1)
    write_jsonl(bad, ["corrected"])
    encode, encoded = corpus._encode, []
    monkeypatch.setattr(corpus, "_encode", lambda unit, *rest: encoded.append(unit) or encode(unit, *rest))
    build_corpus([good, bad], tmp_path / "out", config, workers=1)
    assert texts_in(tmp_path / "out") == [*texts, "corrected"] and len(encoded) == 1


def test_a_full_disk_is_told_and_the_build_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    flush = os.fsync
    left = iter(range(6))

    def fill(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(OSError, match="the disk is full; free some space and run the same build again"):
            build_corpus([path], tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").rglob("*.partial"))
    build_corpus([path], tmp_path / "out", SMALL)
    assert texts_in(tmp_path / "out") == ["one", "two"]


def test_an_out_folder_that_cannot_be_made(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(OSError, match="Not a directory"):
        build_corpus([path], path / "out", SMALL)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tokenizer": Path("x"), "vocab_size": 300}, "exclude each other"),
        ({"validation_fraction": 1.0}, "validation_fraction must be from 0 to below 1"),
        ({"shard_tokens": 0}, "shard_tokens must be positive"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object], expected: str) -> None:
    from tenfold.config import from_dict

    with pytest.raises(ValueError, match=expected):
        from_dict(CorpusConfig, values, where="recipe")
