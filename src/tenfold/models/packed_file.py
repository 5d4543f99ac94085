"""The packed file, `model.tenfold`: a model's weights as the kernels read them.

    first page   magic, version, and of the index its checksum, offset and length (`HEAD`)
    weights      as in csrc/formats.h; experts are whole pages and begin at one, all else begins at a multiple of 64
    index        JSON: `format`, `source`, and `owners`, with an entry for each matrix, tensor and layer's experts

All numbers are little endian, a page is 4 KiB. The index ends the file, and the first page is written last: what
begins with the magic is whole. The index is checked against the file and the configuration before anything is
made of it; checksums (CRC-32, one for each expert) are compared by `verify`.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.layout import DTYPES, PACKED, STORED_NAMES
from tenfold.models.packing import EXPERTS, Kind, Packed, Planned, owner_shapes, plan_owner
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.weights import Advance, build_on_meta, byte_bar, read_config, write_object
from tenfold.tokenizer import Tokenizer

MAGIC, VERSION = b"TENFOLD\x00", 1
HEAD = struct.Struct("<8sIIQQ")  # magic, version, checksum of the index, its offset and length
PAGE, LINE = 4096, 64
REPORT = "report.json"
READ = 1 << 26  # bytes at a time
LARGEST_INDEX = 1 << 26  # bytes; the released model's is 1 MB
LARGEST_SIDE = 1 << 31
DIMENSIONS = {"matrix": (2,), "experts": (3,), "tensor": (1, 2, 3)}
FIELDS = {"name": str, "kind": str, "format": str, "shape": list, "offset": int, "nbytes": int, "checksums": list}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A matrix, a tensor, or the experts of a layer; format as in `cpu.FORMATS`, a tensor's as in safetensors."""

    name: str
    kind: Kind
    format: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksums: tuple[int, ...]  # of each expert, or one

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Offset, length and checksum of each piece that has a checksum."""
        size = self.nbytes // len(self.checksums)
        for i, checksum in enumerate(self.checksums):
            yield self.offset + i * size, size, checksum


Entries = Mapping[str, Sequence[Entry]]  # by owner


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A folder whose index has been read and checked; its weights have not."""

    path: Path
    config: Config
    format: str  # of the large matrices
    source: str  # what it was made from
    owners: Entries
    size: int  # of the file, in bytes


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed file."""
    return (folder / PACKED).is_file()


def open_packed(folder: Path) -> PackedFile:
    """Reads configuration and index. Raises ValueError, in one line, where they are not sound, and OSError."""
    path = folder / PACKED
    size = path.stat().st_size
    index, end = _read_index(path, size)
    try:
        owners = {owner: [read_entry(values) for values in entries] for owner, entries in index["owners"].items()}
        _check_places(owners, end)
        format, source = index["format"], index["source"]
        if type(format) is not str or type(source) is not str:
            raise ValueError("its format or source is no text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: corrupt index: {_reason(error)}; copy or download it again") from None
    config = read_config(folder)
    if isinstance(config, Qwen3NextConfig):
        config = replace(config, num_nextn_predict_layers=int("mtp" in owners))
    _check_owners(path, config, owners)
    return PackedFile(path=path, config=config, format=format, source=source, owners=owners, size=size)


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else "something is missing, or of the wrong type"


def _read_index(path: Path, size: int) -> tuple[Any, int]:
    """The index as JSON has it, and its offset."""
    with path.open("rb") as file:
        head = file.read(HEAD.size)
        if len(head) < HEAD.size or head[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path}: begins with {head[:8]!r}, expected {MAGIC!r}; quantize or copy it again")
        _, version, checksum, offset, length = HEAD.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path}: version {version}, expected {VERSION}; update Tenfold, or quantize again")
        if offset < PAGE or offset + length != size or length > LARGEST_INDEX:
            found = f"{size} bytes, expected {offset + length}"
            raise ValueError(f"{path}: truncated or corrupt: {found}; copy or download it again")
        file.seek(offset)
        raw = file.read(length)
    if zlib.crc32(raw) != checksum:
        raise ValueError(f"{path}: corrupt: its index has another checksum; copy or download it again")
    try:
        return json.loads(raw), offset
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: corrupt index, no JSON; copy or download it again") from None


def read_entry(values: Any) -> Entry:
    """An entry as JSON has it. Raises ValueError where it cannot be, TypeError and the like where it is none at all."""
    for field, kind in FIELDS.items():
        if type(values[field]) is not kind:
            raise ValueError(f"{field} is of type {type(values[field]).__name__}, expected {kind.__name__}")
    entry = Entry(**values | {key: tuple(values[key]) for key in ("shape", "checksums")})
    if any(type(number) is not int for number in (*entry.shape, *entry.checksums)):
        raise ValueError(f"{entry.name!r} has a shape or checksums that are no whole numbers")
    if entry.kind not in DIMENSIONS or entry.format not in (DTYPES if entry.kind == "tensor" else cpu.FORMATS):
        raise ValueError(f"{entry.name!r} is of the unknown kind {entry.kind!r} {entry.format!r}; update Tenfold")
    _check_shape(entry)
    return entry


def _check_shape(entry: Entry) -> None:
    if len(entry.shape) not in DIMENSIONS[entry.kind] or not all(1 <= n <= LARGEST_SIDE for n in entry.shape):
        raise ValueError(f"{entry.name!r} is {list(entry.shape)}")
    packed = entry.kind != "tensor"
    if packed and any(n % cpu.GROUP for n in entry.shape[1:]):
        raise ValueError(f"{entry.name!r} is {list(entry.shape)}, expected multiples of {cpu.GROUP}")
    expected = _nbytes(entry.kind, entry.format, entry.shape)
    if entry.nbytes != expected:
        raise ValueError(f"{entry.name!r} has {entry.nbytes} bytes, expected {expected} by its shape")
    if len(entry.checksums) != (entry.shape[0] if entry.kind == "experts" else 1):
        raise ValueError(f"{entry.name!r} has {len(entry.checksums)} checksums")
    if entry.offset % (PAGE if entry.kind == "experts" else LINE):
        raise ValueError(f"{entry.name!r} is not aligned")


def _nbytes(kind: Kind, format: str, shape: tuple[int, ...]) -> int:
    if kind == "tensor":
        return math.prod(shape) * DTYPES[format].itemsize
    return Planned(kind, format, shape, "").nbytes


def _check_places(owners: Entries, end: int) -> None:
    in_order = sorted((entry for entries in owners.values() for entry in entries), key=lambda entry: entry.offset)
    if not in_order or in_order[0].offset < PAGE or in_order[-1].offset + in_order[-1].nbytes > end:
        raise ValueError("weights lie outside of the file")
    for before, after in pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise ValueError(f"{before.name!r} and {after.name!r} overlap")


def _check_owners(path: Path, config: Config, owners: Entries) -> None:
    """Raises ValueError unless the file holds what the configuration makes the model want, in these shapes."""
    layers = sum(owner.startswith("model.layers.") for owner in owners)
    if layers != config.num_hidden_layers:
        raise ValueError(f"{path}: holds {layers} layers, expected {config.num_hidden_layers} by config.json")
    wanted = owner_shapes(build_on_meta(config))
    if wanted.keys() != owners.keys():
        owner = sorted(wanted.keys() ^ owners.keys())[0]
        raise ValueError(f"{path}: {'has no' if owner in wanted else 'has'} {owner}, unlike config.json")
    for owner, shapes in wanted.items():
        plan = plan_owner(config, owner, shapes, "bf16")
        expected = _whole([(name, planned.kind, planned.shape) for name, planned in plan.items()])
        found = _whole([(entry.name, entry.kind, entry.shape) for entry in owners[owner]])
        if found != expected:
            name = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
            got, want = found.get(name, "not there"), expected.get(name, "nothing")
            raise ValueError(f"{path}: {owner}.{name} is {got}, expected {want} by config.json")


def _whole(parts: Sequence[tuple[str, Kind, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kinds and shapes by name; a matrix that is in parts, `NAME.0`, `NAME.1` and so on, as the one that it is."""
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    count = 0
    for name, kind, shape in parts:
        stem, _, number = name.rpartition(".")
        if kind == "matrix" and number == "0":
            whole[stem], count = (kind, shape), 1
        elif kind == "matrix" and number == str(count) and stem in whole and whole[stem][1][1:] == shape[1:]:
            whole[stem], count = (kind, (whole[stem][1][0] + shape[0], *shape[1:])), count + 1
        else:
            whole[name if name not in whole else f"{name} (twice)"] = kind, shape
    return whole


# ---- reading -----------------------------------------------------------------------------------------------


def read_owners(file: PackedFile, progress: bool = False) -> Iterator[tuple[str, Packed]]:
    """Each owner and its weights, parts of one array with the content of the file.

    Mapping the file would save a second of loading, and cost 10 % of decoding: a file's pages are small. Raises
    MemoryError.
    """
    data = cpu.empty([file.size], torch.uint8).numpy()
    with file.path.open("rb") as opened, byte_bar(f"reading {file.path}", file.size, progress) as advance:
        for first in range(0, file.size, READ):
            part = data[first : first + READ]
            if opened.readinto(part.data) != len(part):
                raise ValueError(f"{file.path}: changed while it was read; load it again")
            advance(len(part))
    for owner, entries in file.owners.items():
        yield owner, _packed(entries, data)


def _packed(entries: Sequence[Entry], data: NDArray[np.uint8]) -> Packed:
    packed = Packed()
    for entry in entries:
        raw = data[entry.offset : entry.offset + entry.nbytes]
        if entry.kind == "matrix":
            rows, cols = entry.shape
            packed.matrices[entry.name] = cpu.packed_linear(raw, entry.format, rows, cols)
        elif entry.kind == "experts":
            count, hidden, width = entry.shape
            packed.experts = cpu.packed_experts(raw, entry.format, count, hidden, width)
        else:
            numbers = torch.from_numpy(raw.copy()).view(DTYPES[entry.format])
            packed.tensors[entry.name] = numbers.view(entry.shape)
    return packed


def verify(folder: Path, progress: bool = False) -> None:
    """Reads all weights; raises ValueError for the first that is not what was written."""
    if not is_packed(folder):
        raise ValueError(f"{folder}: no {PACKED}, which alone has checksums; tenfold quantize writes one")
    file = open_packed(folder)
    total = sum(entry.nbytes for entries in file.owners.values() for entry in entries)
    with file.path.open("rb") as opened, byte_bar(f"verifying {file.path}", total, progress) as advance:
        for owner, entries in file.owners.items():
            for entry in entries:
                _verify_entry(opened, file.path, owner, entry, advance)


def _verify_entry(opened: BinaryIO, path: Path, owner: str, entry: Entry, advance: Advance) -> None:
    for i, (offset, length, checksum) in enumerate(entry.pieces()):
        opened.seek(offset)
        if zlib.crc32(opened.read(length)) != checksum:
            name = f"{owner}.{entry.name}" + (f" {i}" if entry.kind == "experts" else "")
            raise ValueError(f"{path}: {name} is damaged; copy or download the file again")
        advance(length)


# ---- writing -----------------------------------------------------------------------------------------------


class PackedWriter:
    """Appends owners to a file that becomes a packed file when it is finished, and is none before."""

    def __init__(
        self, path: Path, kept: dict[str, list[Entry]] | None = None, advance: Advance = lambda _: None
    ) -> None:
        """kept: owners in the unfinished file that is there; raises ValueError where one of them is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.owners = path, dict(kept or {})
        self._file = path.open("r+b" if self.owners else "w+b")
        for owner, entries in self.owners.items():
            for entry in entries:
                _verify_entry(self._file, path, owner, entry, advance)
        ends = [entry.offset + entry.nbytes for entries in self.owners.values() for entry in entries]
        self._file.truncate(max(ends, default=PAGE))
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, owner: str, packed: Packed) -> None:
        """Writes the weights of an owner to the disk. Raises OSError."""
        entries = []
        if experts := packed.experts:
            entries.append(self._write(EXPERTS, "experts", experts.format, experts.shape, experts.bytes))
        for name, matrix in packed.matrices.items():
            entries.append(self._write(name, "matrix", matrix.format, matrix.shape, matrix.bytes))
        for name, tensor in packed.tensors.items():
            entries.append(self._write(name, "tensor", STORED_NAMES[tensor.dtype], tuple(tensor.shape), _raw(tensor)))
        self._sync()
        self.owners[owner] = entries

    def _write(self, name: str, kind: Kind, format: str, shape: tuple[int, ...], raw: NDArray[np.uint8]) -> Entry:
        offset = self._align(PAGE if kind == "experts" else LINE)
        self._file.write(raw.data)
        pieces = np.split(raw, shape[0]) if kind == "experts" else [raw]
        checksums = tuple(zlib.crc32(piece.data) for piece in pieces)
        return Entry(
            name=name, kind=kind, format=format, shape=shape, offset=offset, nbytes=len(raw), checksums=checksums
        )

    def finish(self, format: str, source: str) -> None:
        """Writes the index and, once all is on the disk, the first page."""
        owners = {owner: [asdict(entry) for entry in entries] for owner, entries in self.owners.items()}
        index = json.dumps({"format": format, "source": source, "owners": owners}, separators=(",", ":")).encode()
        offset = self._align(PAGE)
        self._file.write(index)
        self._sync()
        self._file.seek(0)
        self._file.write(HEAD.pack(MAGIC, VERSION, zlib.crc32(index), offset, len(index)))
        self._sync()

    def _align(self, to: int) -> int:
        """Fills up with zeros; returns where that ends."""
        self._file.write(bytes(-self._file.tell() % to))
        return self._file.tell()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file, which is never half written. Raises OSError."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def publish(staging: Path, config: Config, tokenizer: Tokenizer | None, report: Mapping[str, object]) -> None:
    """Adds what belongs to a finished packed file, and moves all into the folder that `staging` is in, it last."""
    write_object(staging / "config.json", config.to_hf())
    write_object(staging / REPORT, report)
    if tokenizer is not None:
        tokenizer.save(staging)
    packed = [path for path in staging.iterdir() if path.name == PACKED]
    others = [path for path in staging.iterdir() if path.suffix == ".json"]
    for path in (*others, *packed):
        path.replace(staging.parent / path.name)
    for path in staging.iterdir():
        path.unlink()
    staging.rmdir()


def _raw(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
