"""A corpus on disk: shards of tokens, and an index that comes last, so that it promises only what is there.

train-00000.bin   tokens of one document after another, little-endian uint16 or uint32, each ending in eos
train-00000.idx   where each document begins, and the end of the last: int64, counted in tokens
tokenizer.json    what the tokens mean
index.json        all of it with sizes and checksums
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tenfold import config

VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of tokens, with the offsets of its documents beside it."""

    file: str
    tokens: int
    documents: int
    sha256: str
    offsets_file: str
    offsets_sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents for one purpose."""

    tokens: int = 0
    documents: int = 0
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a corpus holds and where it comes from."""

    version: int = VERSION
    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str  # of tokenizer.json
    splits: dict[str, Split]
    duplicates: int  # documents left out because an equal one came before
    empty: int  # documents left out because they hold nothing but white space
    source: str  # sha256 over the inputs' names, sizes and times, and the settings
    inputs: tuple[str, ...] = ()  # as they were given
    settings: dict[str, object] = field(default_factory=dict)


def read_index(folder: Path) -> Index:
    """The index of a corpus. Raises ValueError where there is none, or one that this version cannot read."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder}: no corpus, for it has no {INDEX}; build one, or finish its build")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete {folder} and build the corpus again") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: format version {version}, expected {VERSION}; build the corpus again")
    return config.from_dict(Index, values, where=str(path))


def write_index(folder: Path, index: Index) -> None:
    """Publishes a corpus whose shards are all in place."""
    write_atomic(folder / INDEX, json.dumps(asdict(index), indent=1, ensure_ascii=False).encode() + b"\n")


def damage(folder: Path, index: Index, checksums: bool) -> str | None:
    """What is wrong with the files of a corpus: sizes, and checksums where asked for. None if nothing is."""
    checks: list[tuple[str, int | None, str]] = [("tokenizer.json", None, index.tokenizer_sha256)]
    for split in index.splits.values():
        for shard in split.shards:
            size = shard.tokens * np.dtype(index.dtype).itemsize
            checks.append((shard.file, size, shard.sha256))
            checks.append((shard.offsets_file, (shard.documents + 1) * 8, shard.offsets_sha256))
    for name, size, _ in checks:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if size is not None and path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
    if not checksums:
        return None
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter's lock
        digests = pool.map(lambda check: file_sha256(folder / check[0]), checks)
        for (name, _, expected), digest in zip(checks, digests, strict=True):
            if digest != expected:
                return f"{folder / name} has sha256 {digest[:12]}.., expected {expected[:12]}.."
    return None


def file_sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes the documents of one split, a new shard whenever the next document would exceed the limit."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, limit: int) -> None:
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, limit
        self._shards: list[Shard] = []
        self._tokens: list[np.ndarray] = []  # of the shard to come
        self._lengths: list[np.ndarray] = []
        self._pending = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents that stand end to end. One that is longer than a shard gets one of its own."""
        while len(lengths):
            ends = np.cumsum(lengths)
            count = int(np.searchsorted(ends, self._limit - self._pending, side="right"))
            if count == 0 and self._pending:
                self._flush()
                continue
            count = max(count, 1)
            size = int(ends[count - 1])
            self._tokens.append(tokens[:size])
            self._lengths.append(lengths[:count])
            self._pending += size
            tokens, lengths = tokens[size:], lengths[count:]

    def finish(self) -> Split:
        """Writes the last shard and tells what all of them hold."""
        if self._pending:
            self._flush()
        shards = tuple(self._shards)
        tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
        return Split(tokens=tokens, documents=documents, shards=shards)

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        lengths = np.concatenate(self._lengths)
        tokens = np.concatenate(self._tokens).astype(self._dtype.newbyteorder("<"), copy=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        self._shards.append(
            Shard(
                file=f"{name}.bin",
                tokens=len(tokens),
                documents=len(lengths),
                sha256=write_atomic(self._folder / f"{name}.bin", tokens.data),
                offsets_file=f"{name}.idx",
                offsets_sha256=write_atomic(self._folder / f"{name}.idx", offsets.data),
            )
        )
        self._tokens, self._lengths, self._pending = [], [], 0


def write_atomic(path: Path, data: bytes | memoryview) -> str:
    """Writes a file under another name, flushes it and renames it. Returns its sha256. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; free some space and run the same build again: it goes on from here"
            raise OSError(error.errno, what, str(path)) from error
        raise
    return hashlib.sha256(data).hexdigest()
