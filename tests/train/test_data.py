"""What the loader promises: each token once an epoch, no sequence across documents, one order for a seed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.train.corpus import CorpusConfig, build_corpus
from tenfold.train.data import Batch, Corpus, PackedLoader, best_fit, plan_epoch, validation_batches
from tenfold.train.shards import Index, ShardWriter, Split, file_sha256, write_index

PADDING = 9999
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def make_corpus(folder: Path, lengths: list[int], limit: int = 50) -> Corpus:
    """A corpus in several shards. All tokens are different, so each tells where it comes from."""
    writer = ShardWriter(folder, "train", np.dtype(np.uint16), limit)
    writer.add(np.arange(sum(lengths), dtype=np.uint32), np.array(lengths, np.int64))
    split = writer.finish()
    (folder / "tokenizer.json").write_text("{}")
    index = Index(
        dtype="uint16",
        vocab_size=PADDING + 1,
        eos_id=PADDING,
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
        splits={"train": split, "validation": split, "test": Split()},
        duplicates=0,
        empty=0,
        source="",
    )
    write_index(folder, index)
    return Corpus(folder)


def sequences(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each sequence, padding left out."""
    bounds, (rows, length) = batch.cu_seqlens.tolist(), batch.input_ids.shape
    ids, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert bounds == sorted(set(bounds)) and bounds[0] == 0
    assert set(range(0, rows * length + 1, length)) <= set(bounds)
    parts = [(ids[a:b], labels[a:b]) for a, b in pairwise(bounds)]
    for tokens, targets in parts:
        if PADDING in tokens:
            assert set(tokens) == {PADDING} and set(targets) == {-100}
    return [part for part in parts if PADDING not in part[0]]


def epoch_of(loader: PackedLoader) -> list[Batch]:
    """All rows of the next epoch, one by one."""
    batches = [loader.next_batch(1)]
    while loader.state_dict()["row"] < loader.rows:
        batches.append(loader.next_batch(1))
    return batches


def check_sequences(batches: list[Batch], lengths: list[int]) -> list[int]:
    """Asserts that sequences lie within documents and labels are successors; returns all tokens in order."""
    ends = {int(end) - 1 for end in np.cumsum(lengths)}
    found = [sequence for batch in batches for sequence in sequences(batch)]
    for tokens, labels in found:
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert not ends & set(tokens[:-1])
        assert labels == [-100 if token in ends else token + 1 for token in tokens]
    return sorted(token for tokens, _ in found for token in tokens)


@settings(max_examples=60)
@given(lengths=lengths_of_documents, length=st.integers(2, 24), seed=st.integers(0, 5))
def test_every_token_once_per_epoch_under_its_successor(
    folder: Path, lengths: list[int], length: int, seed: int
) -> None:
    loader = PackedLoader(make_corpus(folder, lengths), "train", length, 1, seed)
    for epoch in range(3):
        assert check_sequences(epoch_of(loader), lengths) == list(range(sum(lengths)))
        assert loader.epoch == epoch
        assert loader.efficiency == pytest.approx(sum(lengths) / (loader.rows * length))


@settings(max_examples=40)
@given(lengths=lengths_of_documents, length=st.integers(2, 24), size=st.integers(1, 7), limit=st.integers(1, 800))
def test_validation_is_the_same_tokens_whatever_the_shapes(
    folder: Path, lengths: list[int], length: int, size: int, limit: int
) -> None:
    corpus = make_corpus(folder, lengths)
    batches = list(validation_batches(corpus, length, size, limit))
    assert check_sequences(batches, lengths) == list(range(min(limit, sum(lengths))))
    assert all(len(batch.input_ids) == size for batch in batches[:-1])
    again = list(validation_batches(corpus, length, size, limit))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=30)
@given(lengths=lengths_of_documents, size=st.integers(1, 4), steps=st.integers(0, 40))
def test_a_saved_position_goes_on_exactly(folder: Path, lengths: list[int], size: int, steps: int) -> None:
    corpus = make_corpus(folder, lengths)
    loader, resumed = (PackedLoader(corpus, "train", 16, size, 3) for _ in range(2))
    for _ in range(steps):
        next(loader)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert all(same(next(loader), next(resumed)) for _ in range(20))
    assert loader.state_dict() == resumed.state_dict()


@settings(max_examples=20)
@given(lengths=lengths_of_documents, share=st.integers(1, 3), world=st.integers(1, 4))
def test_ranks_share_the_rows_of_the_whole_batch(folder: Path, lengths: list[int], share: int, world: int) -> None:
    corpus = make_corpus(folder, lengths)
    whole = PackedLoader(corpus, "train", 16, share * world, 1)
    ranks = [PackedLoader(corpus, "train", 16, share * world, 1, rank, world) for rank in range(world)]
    for _ in range(8):
        batch, parts = next(whole), [next(rank) for rank in ranks]
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert sequences(batch) == [sequence for part in parts for sequence in sequences(part)]
        assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


def test_batches_may_grow_without_changing_the_rows(folder: Path) -> None:
    corpus = make_corpus(folder, [7, 30, 12, 3] * 20)
    one, grown = (PackedLoader(corpus, "train", 16, 1, 1) for _ in range(2))
    rows = torch.cat([next(one).input_ids for _ in range(150)])
    assert torch.equal(rows, torch.cat([grown.next_batch(size).input_ids for size in (1, 4, 20, 50, 75)]))


def test_order_depends_on_seed_and_epoch(folder: Path) -> None:
    corpus = make_corpus(folder, [10] * 50)

    def order(seed: int, epochs: int) -> list[int]:
        loader = PackedLoader(corpus, "train", 10, 1, seed)
        return [int(batch.input_ids[0, 0]) for _ in range(epochs) for batch in epoch_of(loader)]

    two = order(0, 2)
    assert two[:50] == order(0, 1) and two[:50] != two[50:] and two[:50] != order(1, 1)
    assert two[:8] == STORED_ORDER, "the order of all trainings changed"


STORED_ORDER = [220, 230, 320, 210, 60, 160, 290, 390]


@given(lengths=st.lists(st.integers(1, 50), max_size=80))
def test_best_fit_fills_rows(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, np.int64), 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(fill <= 50 for fill in filled)
    assert all(a + b > 50 for a, b in pairwise(filled))  # no two rows fit into one


def test_packing_wastes_little() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 2
    plan = plan_epoch(lengths, 1024, 0, 0)
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (plan.rows * 1024) > 0.99


def test_documents_are_where_the_index_says(folder: Path) -> None:
    lengths = [60, 1, 30, 20, 49, 2]
    documents = make_corpus(folder, lengths).documents()
    assert [len(document) for document in documents] == lengths == documents.lengths.tolist()
    assert np.concatenate([documents[i] for i in range(6)]).tolist() == list(range(sum(lengths)))
    assert documents.tokens(2, 5, 99).tolist() == list(range(66, 91))
    with pytest.raises(IndexError):
        documents[6]


def test_a_real_corpus_reads_back(tmp_path: Path) -> None:
    texts = [f"{i} boats on the sea\n" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = CorpusConfig(vocab_size=300, validation_fraction=0.1)
    build_corpus([tmp_path / "a.jsonl"], tmp_path / "out", config)
    corpus = Corpus(tmp_path / "out")
    loader = PackedLoader(corpus, "train", 64, 4, 0)
    batches = epoch_of(loader)
    bounds = [(batch, a, b) for batch in batches for a, b in pairwise(batch.cu_seqlens.tolist())]
    read = [corpus.tokenizer.decode(batch.input_ids.flatten()[a:b].tolist()) for batch, a, b in bounds]
    held = [corpus.tokenizer.decode(document.tolist()) for document in corpus.documents("validation")]
    padding = [text for text in read if text.replace("<|endoftext|>", "") == ""]
    assert sorted([*read, *held]) == sorted([*padding, *(text + "<|endoftext|>" for text in texts)])


# ---- errors ------------------------------------------------------------------------------------------------


def damaged(folder: Path) -> str:
    """The one line that opening this corpus fails with."""
    with pytest.raises(ValueError) as caught:
        Corpus(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "TMP")


def test_damage_is_told_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    make_corpus(tmp_path, [10, 60, 8])
    shard, offsets = tmp_path / "train-00001.bin", tmp_path / "train-00001.idx"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert damaged(tmp_path).startswith("damaged corpus: TMP/train-00001.bin has 119 bytes, expected 120; build")
    shard.write_bytes(b"x" + whole[1:])
    assert "TMP/train-00001.bin has sha256" in damaged(tmp_path)
    Corpus(tmp_path, verify=False)
    shard.write_bytes(whole)
    offsets.write_bytes(bytes(16))
    assert "TMP/train-00001.idx has sha256" in damaged(tmp_path)
    offsets.unlink()
    assert "TMP/train-00001.idx is missing" in damaged(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "TMP: no corpus, for it has no index.json"),
        ("{", "TMP/index.json: damaged"),
        ("[]", "format version None, expected 1"),
        ('{"version": 2}', "format version 2, expected 1"),
        ('{"version": 1}', "TMP/index.json: missing 'dtype'"),
    ],
)
def test_bad_indexes_are_told(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    assert expected in damaged(tmp_path)


def test_settings_that_cannot_work(folder: Path) -> None:
    corpus = make_corpus(folder, [10, 20])
    with pytest.raises(ValueError, match="no documents in split 'test', only in train, validation"):
        PackedLoader(corpus, "test", 8, 1, 0)
    with pytest.raises(ValueError, match="sequence_length must be 2 at least, got 1"):
        PackedLoader(corpus, "train", 1, 1, 0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        PackedLoader(corpus, "train", 8, 2, 0, rank=2, world=2)
    with pytest.raises(ValueError, match="a batch of 3 rows cannot be shared by 2 ranks equally"):
        PackedLoader(corpus, "train", 8, 3, 0, world=2)


def test_a_position_in_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    state = PackedLoader(make_corpus(folder, [10, 20]), "train", 8, 1, 0).state_dict()
    other = make_corpus(tmp_path, [10, 20, 30])
    with pytest.raises(ValueError, match="with 4 rows in its epoch, here are"):
        PackedLoader(other, "train", 8, 1, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="saved under seed 0, not 1"):
        PackedLoader(other, "train", 8, 1, 1).load_state_dict(state)
