"""Builds a corpus: text in, shards of tokens out, once, before any training.

Inputs are cut into units of a few megabytes, which any number of processes turns into parts under `.build`.
Then the parts are merged in order: equal documents dropped, held-out ones set apart, the rest written into
shards. A part is whole or not there, so a build that was stopped goes on with the units that lack one, and
the result is the same byte for byte. While it is built, a corpus takes twice its room on the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tenfold.tokenizer import Tokenizer, slices
from tenfold.train.shards import (
    INDEX,
    Index,
    ShardWriter,
    damage,
    file_sha256,
    read_index,
    write_atomic,
    write_index,
)
from tenfold.train.sources import (
    SPLITS,
    WIKITEXT,
    Document,
    Form,
    Span,
    find_inputs,
    plan_spans,
    read_documents,
)

UNIT_BYTES = 4 << 20  # of input that is worked off, and kept, as one
POOL_BYTES = 64 << 20  # of input from which on starting processes pays
SAMPLE_BYTES = 100 << 20  # of input that a tokenizer is trained on, at most
BATCH_CHARACTERS = 1 << 20  # tokenized in one call
FREE = 255  # split of a document that its hash decides
Unit = tuple[Span, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """How text becomes a corpus."""

    tokenizer: Path | None = None  # folder with a tokenizer.json; Qwen3's without one
    vocab_size: int | None = None  # instead, train a tokenizer of this size on the text itself
    validation_fraction: float = 0.01  # of the documents is held out, chosen by their hash
    field: str = "text"  # of JSON lines and Parquet files that holds the text
    separator: str | None = None  # the line between two documents of a text file; without it there is one
    shard_tokens: int = 50_000_000  # in one file at most; only a single longer document exceeds it

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("tokenizer and vocab_size exclude each other: take a tokenizer, or train one")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be from 0 to below 1, got {self.validation_fraction}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be positive, got {self.shard_tokens}")

    @property
    def form(self) -> Form:
        """How documents stand in the files."""
        return Form(self.field, self.separator)


class Part(NamedTuple):
    """The documents of a unit, end to end."""

    tokens: np.ndarray  # uint32 [T], eos after each document
    lengths: np.ndarray  # int64 [N], in tokens, eos included
    hashes: np.ndarray  # uint64 [N, 2], of the texts
    splits: np.ndarray  # uint8 [N], place in SPLITS or FREE
    empty: int  # documents left out


def build_corpus(
    inputs: Sequence[str | Path],
    out: Path,
    config: CorpusConfig,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> Index:
    """Builds the corpus `out` from text, JSON lines and Parquet files, folders, globs, and `wikitext-2`.

    Goes on with a build that was interrupted, and returns at once where the same one is finished and whole.
    The number of worker processes (one per core where None) changes the speed alone.

    Raises ValueError where an input cannot be read or `out` holds another corpus, OSError where `out` cannot
    be written.
    """
    names = [str(name) for name in inputs]
    spans = plan_spans(find_inputs(names), config.form)
    source = _fingerprint(spans, config)
    finished = _finished(out, source)
    if finished is not None:
        return finished
    staging = out / ".build"
    staging.mkdir(parents=True, exist_ok=True)
    units = list(_units(spans))
    with _progress(console) as progress:
        tokenizer = _prepare_tokenizer(out, source, units, config, progress)
        meaning = file_sha256(out / "tokenizer.json")
        parts = [staging / _part_name(unit, config.form, meaning) for unit in units]
        _tokenize(units, parts, tokenizer, out, config.form, workers or os.cpu_count() or 1, progress)
        index = _merge(parts, out, tokenizer, config, source, names, progress)
    write_index(out, index)
    shutil.rmtree(staging)
    return index


# ---- what is to be built, and what is there ----------------------------------------------------------------


def _units(spans: Iterable[Span]) -> Iterator[Unit]:
    return map(tuple, _grouped(spans, lambda span: span.size, UNIT_BYTES))


def _grouped(things: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """Neighbours in groups of at least `enough` together, or of 1024."""
    group: list[T] = []
    total = 0
    for thing in things:
        group.append(thing)
        total += size(thing)
        if total >= enough or len(group) == 1024:
            yield group
            group, total = [], 0
    if group:
        yield group


def _fingerprint(spans: Sequence[Span], config: CorpusConfig) -> str:
    """What a corpus is built from, in short."""
    tokenizer = config.tokenizer and file_sha256(_tokenizer_file(config.tokenizer))
    return _digest(_stamped(spans), _settings(config), tokenizer)


def _part_name(unit: Unit, form: Form, tokenizer: str) -> str:
    """Named by all that a part depends on, so that one from before a change is never taken for another."""
    return f"part-{_digest(_stamped(unit), form, tokenizer)}.npz"


def _stamped(spans: Iterable[Span]) -> list[object]:
    """Spans, and when their files were written last: a file that changed since is another one."""
    spans = list(spans)
    paths = dict.fromkeys(span.path for span in spans if not span.path.startswith(f"{WIKITEXT}:"))
    return [spans, [Path(path).stat().st_mtime_ns for path in paths]]


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _settings(config: CorpusConfig) -> dict[str, object]:
    values = {name: value for name, value in asdict(config).items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokenizer.json in this folder")
    return path


def _finished(out: Path, source: str) -> Index | None:
    """The index of a finished corpus that is the wanted one and whole."""
    if not (out / INDEX).is_file():
        return None
    index = read_index(out)
    if index.source != source:
        raise ValueError(f"{out} holds a corpus of other inputs or settings; delete it, or choose another folder")
    if damage(out, index, checksums=True) is not None:
        (out / INDEX).unlink()  # built anew from here
        return None
    shutil.rmtree(out / ".build", ignore_errors=True)
    return index


# ---- the tokenizer -----------------------------------------------------------------------------------------


def _prepare_tokenizer(
    out: Path, source: str, units: Sequence[Unit], config: CorpusConfig, progress: Progress
) -> Tokenizer:
    """The tokenizer of the corpus, saved beside it. One that was trained before an interruption is kept."""
    kept = out / ".build" / f"tokenizer-{source}"
    if not kept.is_dir():
        temporary = kept.with_suffix(".partial")
        _make_tokenizer(units, config, progress).save(temporary)
        temporary.replace(kept)
    for path in sorted(kept.iterdir()):
        write_atomic(out / path.name, path.read_bytes())
    tokenizer = Tokenizer.from_folder(out)
    assert tokenizer is not None
    return tokenizer


def _make_tokenizer(units: Sequence[Unit], config: CorpusConfig, progress: Progress) -> Tokenizer:
    if config.tokenizer is not None:
        found = Tokenizer.from_folder(config.tokenizer)
        assert found is not None, "looked for when the inputs were"
        return found
    if config.vocab_size is None:
        return Tokenizer.embedded()
    every = -(-_size(units) // SAMPLE_BYTES) or 1
    sample = units[::every]
    task = progress.add_task("training the tokenizer", total=_size(sample))
    texts = _training_texts(sample, config, lambda size: progress.advance(task, size))
    return Tokenizer.train(texts, config.vocab_size)


def _training_texts(units: Sequence[Unit], config: CorpusConfig, advance: Callable[[int], None]) -> Iterator[str]:
    """Texts to train a tokenizer on: none that is held out, as a first reading finds."""
    heads = [(_hash(d.text), _code(d)) for unit in units for d in _documents(unit, config.form) if d.text.strip()]
    if not heads:
        return
    hashes, given = np.array([head[0] for head in heads]), np.array([head[1] for head in heads], np.uint8)
    splits = iter(assign_splits(hashes, given, config.validation_fraction))
    for unit in units:
        for document in _documents(unit, config.form):
            if document.text.strip() and next(splits) == SPLITS.index("train"):
                yield document.text
        advance(_size([unit]))


# ---- tokens ------------------------------------------------------------------------------------------------


def _tokenize(
    units: Sequence[Unit],
    parts: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    form: Form,
    workers: int,
    progress: Progress,
) -> None:
    """Writes the parts that are not there yet."""
    todo = [(unit, part) for unit, part in zip(units, parts, strict=True) if not part.is_file()]
    left = _size(unit for unit, _ in todo)
    task = progress.add_task("tokenizing", total=_size(units), completed=_size(units) - left)
    if workers == 1 or left < POOL_BYTES:
        for unit, path in todo:
            _write_part(_encode(unit, tokenizer, form), path)
            progress.advance(task, _size([unit]))
        return
    spawn = multiprocessing.get_context("spawn")  # forking is unsafe once there are threads
    with ProcessPoolExecutor(min(workers, len(todo)), spawn, _start_worker, (out, form)) as pool:
        try:
            futures = {pool.submit(_work, unit, path): _size([unit]) for unit, path in todo}
            for future in as_completed(futures):
                future.result()
                progress.advance(task, futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Worker(NamedTuple):
    """What a process keeps from one unit to the next."""

    tokenizer: Tokenizer
    form: Form


_worker: Worker | None = None


def _start_worker(out: Path, form: Form) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = Tokenizer.from_folder(out)
    assert tokenizer is not None
    _worker = Worker(tokenizer, form)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed; nobody is left to work for


def _work(unit: Unit, path: Path) -> None:
    assert _worker is not None
    _write_part(_encode(unit, _worker.tokenizer, _worker.form), path)


def _encode(unit: Unit, tokenizer: Tokenizer, form: Form) -> Part:
    hashes: list[np.ndarray] = []
    splits: list[int] = []
    owners: list[int] = []  # the document of each slice
    empty = 0

    def text_slices() -> Iterator[str]:
        nonlocal empty
        for document in _documents(unit, form):
            if not document.text.strip():
                empty += 1
                continue
            for part in slices(document.text):
                owners.append(len(hashes))
                yield part
            hashes.append(_hash(document.text))
            splits.append(_code(document))

    tokens = [
        np.array(ids, np.uint32)
        for batch in _grouped(text_slices(), len, BATCH_CHARACTERS)
        for ids in tokenizer.encode_batch(batch, special_tokens=False)
    ]
    sizes = np.bincount(owners, [len(each) for each in tokens], len(hashes)).astype(np.int64)
    joined = np.concatenate([np.empty(0, np.uint32), *tokens])
    return Part(
        tokens=np.insert(joined, np.cumsum(sizes), tokenizer.eos_id),
        lengths=sizes + 1,
        hashes=np.array(hashes, np.uint64).reshape(-1, 2),
        splits=np.array(splits, np.uint8),
        empty=empty,
    )


def _documents(unit: Unit, form: Form) -> Iterator[Document]:
    for span in unit:
        yield from read_documents(span, form)


def _code(document: Document) -> int:
    return FREE if document.split is None else SPLITS.index(document.split)


def _hash(text: str) -> np.ndarray:
    """What tells documents apart, uint64 [2]."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def _write_part(part: Part, path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **part._asdict())
    write_atomic(path, buffer.getbuffer())


# ---- merging -----------------------------------------------------------------------------------------------


def _merge(
    parts: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    config: CorpusConfig,
    source: str,
    inputs: Sequence[str],
    progress: Progress,
) -> Index:
    """Writes the shards, from the parts in their order."""
    hashes, given = _gather(parts, "hashes"), _gather(parts, "splits")
    if not len(hashes):
        raise ValueError(f"no text in the inputs ({', '.join(inputs)[:200]}): every document is empty")
    splits = assign_splits(hashes, given, config.validation_fraction)
    kept = first_of_equals(hashes, splits)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {name: ShardWriter(out, name, dtype, config.shard_tokens) for name in SPLITS}
    empty = begin = 0
    for path in progress.track(parts, description="writing shards"):
        with np.load(path) as arrays:
            tokens, lengths, empty = arrays["tokens"], arrays["lengths"], empty + int(arrays["empty"])
        end = begin + len(lengths)
        for code, name in enumerate(SPLITS):
            chosen = kept[begin:end] & (splits[begin:end] == code)
            writers[name].add(tokens[np.repeat(chosen, lengths)], lengths[chosen])
        begin = end
    return Index(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=file_sha256(out / "tokenizer.json"),
        splits={name: writer.finish() for name, writer in writers.items()},
        duplicates=int(len(kept) - kept.sum()),
        empty=empty,
        source=source,
        inputs=tuple(inputs),
        settings=_settings(config),
    )


def _gather(parts: Iterable[Path], name: str) -> np.ndarray:
    """One array of all parts, joined."""
    found = []
    for path in parts:
        with np.load(path) as arrays:
            found.append(arrays[name])
    return np.concatenate(found)


def assign_splits(hashes: np.ndarray, given: np.ndarray, fraction: float) -> np.ndarray:
    """The split of each document as its place in SPLITS, uint8 [N]: the given one, or as its hash decides."""
    free = given == FREE
    limit = _threshold(hashes[free, 0], fraction, alone=bool(free.all()))
    by_hash = np.where(hashes[:, 0] < np.uint64(limit), SPLITS.index("validation"), SPLITS.index("train"))
    return np.where(free, by_hash, given).astype(np.uint8)


def first_of_equals(hashes: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Which documents to keep, bool [N]: one of each. Training gives way to what is held out."""
    order = np.lexsort((splits == SPLITS.index("train"), hashes[:, 1], hashes[:, 0]))
    kept = np.ones(len(hashes), bool)
    kept[order[1:]] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    return kept


def _threshold(keys: np.ndarray, fraction: float, alone: bool) -> int:
    """Documents with a key below this are held out.

    Where no other documents stand beside these (`alone`), at least one is, and at least one is not."""
    limit = int(fraction * 2**64)
    if alone and len(keys) and limit:
        return min(max(limit, int(keys.min()) + 1), int(keys.max()))
    return limit


def _size(units: Iterable[Unit]) -> int:
    return sum(span.size for unit in units for span in unit)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
