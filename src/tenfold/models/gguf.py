"""GGUF, the file format of llama.cpp: key-values, descriptions of tensors, then the tensors, aligned.

The layout is that of `docs/gguf.md` of ggml. Every length and count is checked against the file, or against a bound,
before anything is allocated for it. What is in the files of a model is for `llama_cpp.py` to say.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tenfold.models.ggml import BLOCK_TYPES, dequantize
from tenfold.models.layout import StoredTensor

T = TypeVar("T")
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ITEMS = 1 << 20  # of an array in the header; the largest vocabularies have a quarter of that
MOST_DIMENSIONS = 4
STEP = 1 << 18  # weights that are unpacked at once, so that all intermediate results stay in the cache
TYPE_NAMES = {kind.number: name for name, kind in BLOCK_TYPES.items()}
SHARD = re.compile(r"(.*)-\d{5}-of-(?!00000)(\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """What the header of a file says, or the headers of all files that a model was split into."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, StoredTensor]  # by the file's names, their shapes in torch's order

    def get(self, key: str, kind: type[T]) -> T:
        """The value of a key; ValueError where it is missing or of another kind."""
        value = self.metadata.get(key)
        if type(value) is not kind:
            found = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise ValueError(f"{self.path}: {key} {found}, expected {kind.__name__}; convert the model again")
        return value

    def count(self, key: str, most: int) -> int:
        """A whole number from 1 to `most`; ValueError where it is none."""
        value = self.get(key, int)
        if not 1 <= value <= most:
            raise ValueError(f"{self.path}: {key} is {value}, expected 1 to {most}; convert the model again")
        return value

    def positive(self, key: str) -> float:
        """A number above 0, of a size that can be computed with; ValueError where it is none."""
        value = self.metadata.get(key)
        if not isinstance(value, int | float) or not 1e-30 < value < 1e30:
            raise ValueError(f"{self.path}: {key} is {value!r}, expected a number above 0; convert the model again")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; ValueError where it is none."""
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.path}: {key} holds something other than text; convert the model again")
        return values


def read_gguf(path: Path) -> GGUF:
    """Reads the header, and where the file is one of several, `NAME-00001-of-00003.gguf`, those of all.

    Raises ValueError, in one line, for a file that is not whole or not sound, and OSError.
    """
    shard = SHARD.fullmatch(path.name)
    names = [path.name]
    if shard:
        names = [f"{shard[1]}-{i:05}-of-{shard[2]}.gguf" for i in range(1, int(shard[2]) + 1)]
    files = [_read_file(path.with_name(name)) for name in names]
    parts = files[0].metadata.get("split.count", 1)
    if parts != len(files):
        raise ValueError(f"{path}: one of {parts} parts; call it NAME-00001-of-0000N.gguf again, beside the others")
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(tensors) != sum(len(file.tensors) for file in files):
        raise ValueError(f"{path}: its parts hold a tensor twice; download them again")
    return GGUF(path=path, metadata=files[0].metadata, tensors=tensors)


def _read_file(path: Path) -> GGUF:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(path, file, size)
        tensor_count, value_count = _begin(header)
        metadata: dict[str, object] = {}
        for _ in range(value_count):
            key = header.text()
            metadata[key] = header.value(header.unsigned(4))
        described = [_describe(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a power of two; convert again")
    start = -(-header.position // alignment) * alignment
    tensors = {tensor.name: _place(path, start, tensor) for tensor in described}
    if len(tensors) != len(described):
        raise ValueError(f"{path}: corrupt: holds a tensor twice; download it again")
    _check_extents(path, size, tensors)
    return GGUF(path=path, metadata=metadata, tensors=tensors)


# ---- the header --------------------------------------------------------------------------------------------


class _Description(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from where the tensors begin


class _Header:
    """Reads on through the header, never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.position = path, 0
        self._file, self._size = file, size

    def take(self, count: int) -> bytes:
        if count > self._size - self.position:
            needed = f"{self._size} bytes, but the header wants {count} from {self.position} on"
            raise ValueError(f"{self.path}: truncated or corrupt: {needed}; download it again")
        self.position += count
        return self._file.read(count)

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> str:
        begin = self.position
        try:
            return self.take(self.unsigned(8)).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: corrupt: no UTF-8 at {begin}; download it again") from None

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        return self._array() if kind == ARRAY else self._scalars(kind, 1)[0]

    def _array(self) -> list[object]:
        kind, count = self.unsigned(4), self.unsigned(8)
        if count > MOST_ITEMS:
            found = f"{count} values at {self.position}, expected {MOST_ITEMS} at most"
            raise ValueError(f"{self.path}: corrupt: {found}; download it again")
        return [self.text() for _ in range(count)] if kind == STRING else self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[object]:
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: corrupt: a value of type {kind} at {self.position}; download it again")
        form = struct.Struct(f"<{count}{SCALARS[kind]}")
        values = form.unpack(self.take(form.size))
        # an fp32 is read as the decimal that it was: 1e-6, not 9.999999974752427e-07
        return [float(str(np.float32(value))) for value in values] if SCALARS[kind] == "f" else list(values)


def _begin(header: _Header) -> tuple[int, int]:
    """The counts of tensors and of key-values."""
    magic = header.take(4)
    if magic != MAGIC:
        raise ValueError(f"{header.path}: begins with {magic!r}, expected {MAGIC!r}: neither GGUF nor a folder")
    version = header.unsigned(4)
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        found = "big-endian" if big_endian else f"version {version}"
        raise ValueError(f"{header.path}: {found} GGUF, expected little-endian of version 2 or 3; convert it again")
    return header.unsigned(8), header.unsigned(8)


def _describe(header: _Header) -> _Description:
    name, dimensions = header.text(), header.unsigned(4)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{header.path}: corrupt: {name!r} has {dimensions} dimensions; download it again")
    fastest_first = [header.unsigned(8) for _ in range(dimensions)]
    return _Description(name, shortest(fastest_first[::-1]), header.unsigned(4), header.unsigned(8))


def shortest(shape: Sequence[int]) -> tuple[int, ...]:
    """Without leading dimensions of one, which llama.cpp's converter writes and its quantiser does not."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape) - 1)
    return tuple(shape[first:])


def _place(path: Path, start: int, tensor: _Description) -> StoredTensor:
    name, shape = tensor.name, tensor.shape
    if tensor.type not in TYPE_NAMES:
        known = ", ".join(TYPE_NAMES.values())
        raise ValueError(f"{path}: {name!r} is of GGML type {tensor.type}, known are {known}; quantise to one of these")
    dtype = TYPE_NAMES[tensor.type]
    kind = BLOCK_TYPES[dtype]
    if min(shape) < 1 or shape[-1] % kind.weights:
        expected = f"rows of a multiple of {kind.weights}"
        raise ValueError(f"{path}: corrupt: {name!r} is {list(shape)}, expected {expected}; download it again")
    begin, nbytes = start + tensor.offset, math.prod(shape) // kind.weights * kind.bytes
    return StoredTensor(path=path, shape=shape, dtype=dtype, begin=begin, end=begin + nbytes)


def _check_extents(path: Path, size: int, tensors: Mapping[str, StoredTensor]) -> None:
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.begin)
    needed = max((tensor.end for tensor in in_order), default=0)
    if needed > size:
        raise ValueError(f"{path}: truncated: {size} bytes, expected {needed}; download it again")
    if any(after.begin < before.end for before, after in pairwise(in_order)):
        raise ValueError(f"{path}: corrupt: tensors overlap; download it again")


# ---- the tensors -------------------------------------------------------------------------------------------


def read_into(views: Sequence[Tensor], stored: StoredTensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The numbers of a stored tensor, which fill the views one after the other, row by row or many at a time.

    Yields a piece of a view, what goes there, and how many bytes that was. Raises OSError, and ValueError where the
    file has become shorter.
    """
    kind = BLOCK_TYPES[stored.dtype]
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        for view in views:
            for piece in view.split(max(1, STEP // view[0].numel())):
                raw = bytearray(piece.numel() // kind.weights * kind.bytes)
                if file.readinto(raw) != len(raw):
                    raise ValueError(f"{stored.path}: became shorter while it was read; download it again")
                numbers = dequantize(torch.frombuffer(raw, dtype=torch.uint8), stored.dtype)
                yield piece, numbers.view(piece.shape), len(raw)
