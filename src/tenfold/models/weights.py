"""Checkpoints: Hugging Face folders, read and written tensor by tensor, and GGUF files, read only.

A folder holds `config.json` and either `model.safetensors` or shards and `model.safetensors.index.json`.
Reading goes over the headers first, so that every complaint comes before the first tensor is read. Writing
goes to a staging folder inside the target and is moved in at the end, the index last: a folder that looks
whole is whole.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import TypeVar, cast

import torch
from torch import Tensor

from tenfold.models import ARCHITECTURES, Config, Model
from tenfold.models.gguf import GGUF, read_gguf
from tenfold.models.layout import (
    ALWAYS_FP32,
    DTYPES,
    LOADABLE,
    PACKED,
    STORED_NAMES,
    ExpertLayout,
    Filled,
    Piece,
    StoredTensor,
    TensorSource,
    match_pieces,
    parameter_dtype,
    parse_dtype,
    pieces,
)
from tenfold.models.llama_cpp import (
    Part,
    has_tokenizer,
    match_parts,
    named_tensors,
    read_configuration,
    read_parts,
    read_tokenizer,
)
from tenfold.models.qwen3_next import Qwen3NextConfig
from tenfold.models.room import require_room, smaller_formats, torch_bytes
from tenfold.tokenizer import Tokenizer

INDEX, SINGLE, STAGING = "model.safetensors.index.json", "model.safetensors", ".unfinished"
PICKLED = (".bin", ".pt", ".pth", ".pkl")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
STEP = 1 << 22  # numbers that are read at once
PlaceT = TypeVar("PlaceT", Piece, Part)
Advance = Callable[[int], None]  # of a progress bar, by bytes
Read = Callable[[Mapping[str, Tensor]], Iterator[Filled]]  # into the parameters of a mapping


def load(
    path_or_name: str | Path, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[Model, Tokenizer | None]:
    """A model in evaluation mode, and its tokenizer where there is one.

    path_or_name: a folder in Hugging Face's layout, a GGUF file, or a hub name ("Qwen/Qwen3-Next-80B-A3B-Instruct").
    dtype: "float32", "bfloat16", "float16", or "auto", the checkpoint's own; A_log and dt_bias stay float32.
    Raises ValueError or OSError, in one line, where the checkpoint cannot be read.
    """
    path = resolve_path(path_or_name)
    return load_model(path, dtype, device, progress=True), load_tokenizer(path)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer in a folder or GGUF file; None where there is none."""
    return read_tokenizer(read_gguf(path)) if path.is_file() else Tokenizer.from_folder(path)


def resolve_path(path_or_name: str | Path) -> Path:
    """The folder or file itself, or the local snapshot of a hub name; what it lacks is downloaded.

    Raises OSError where there is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(str(path_or_name)):
        raise FileNotFoundError(f"{path_or_name}: no such folder or file, and no hub name of the form owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http_error = cast("type[OSError]", HfHubHTTPError.__bases__[0])  # of whichever HTTP library the hub uses
    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=HUB_FILES))
    except (OSError, HFValidationError, http_error) as error:
        reason = shorten(str(error), 160, placeholder=" ...") or type(error).__name__
        raise OSError(f"{path_or_name}: no such folder, and not to be had from the hub: {reason}") from None


# ---- what a folder holds -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder or GGUF file whose headers have been read and checked; its tensors have not."""

    path: Path
    config: Config
    declared_dtype: str | None  # what config.json says
    tensors: dict[str, StoredTensor]
    has_tokenizer: bool

    @property
    def dtype(self) -> str:
        """The dtype that `auto` stands for: the declared one, else that of the most bytes, quantised being bfloat16."""
        if self.declared_dtype in LOADABLE:
            return self.declared_dtype
        held: Counter[str] = Counter()
        for tensor in self.tensors.values():
            held[tensor.dtype] += tensor.nbytes
        return dtype_name(DTYPES.get(held.most_common(1)[0][0], torch.bfloat16))


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the configuration and the headers of all files, and checks that the files are whole.

    path: a folder, or a GGUF file. Whether there is an MTP module is for the files to say: released configurations
    do not mention it, and some tools drop its tensors but keep the mention.
    """
    path = Path(path)
    if path.is_file():
        return _open_gguf(read_gguf(path))
    config = read_config(path)
    tensors = {name: tensor for file in _weight_files(path) for name, tensor in read_header(file).items()}
    if not tensors:
        raise ValueError(f"{path}: the weight files hold no tensors")
    if config.num_hidden_layers > len(tensors):
        raise ValueError(f"{path}: {len(tensors)} tensors, too few for num_hidden_layers {config.num_hidden_layers}")
    if isinstance(config, Qwen3NextConfig):
        modules = int(any(name.startswith("mtp.") for name in tensors))
        config = replace(config, num_nextn_predict_layers=modules)
    values = _read_object(path / "config.json")
    declared = values.get("dtype") or values.get("torch_dtype")
    return Checkpoint(
        path=path,
        config=config,
        declared_dtype=str(declared) if declared else None,
        tensors=tensors,
        has_tokenizer=(path / "tokenizer.json").is_file(),
    )


def _open_gguf(file: GGUF) -> Checkpoint:
    config = read_configuration(file)
    return Checkpoint(
        path=file.path,
        config=config,
        declared_dtype=None,
        tensors=named_tensors(file, config),
        has_tokenizer=has_tokenizer(file),
    )


def read_config(folder: str | Path) -> Config:
    """What `folder/config.json` says; OSError or ValueError where that is nothing Tenfold knows."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json, expected a Hugging Face model folder")
    values = _read_object(path)
    kind = str(values.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path}: unknown model_type {kind!r}, known are {', '.join(sorted(ARCHITECTURES))}")
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(f"{path}: quantised weights ({method}) are not supported yet; take the bfloat16 release")
    try:
        return ARCHITECTURES[kind][0].from_hf(values)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON as of UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / PACKED).is_file():
        raise ValueError(f"{folder}: packed weights, which the native kernels alone can run; take the original folder")
    if (folder / STAGING).is_dir():
        raise ValueError(f"{folder}: this checkpoint was not written to the end; write it again")
    if any(path.suffix in PICKLED for path in folder.iterdir()):
        raise ValueError(f"{folder}: only pickled weights, which can run code when read; convert to safetensors")
    raise FileNotFoundError(f"{folder}: no weights, expected {SINGLE} or {INDEX}")


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: no weight_map, expected tensor names and the file of each")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: {name!r} is no file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        count = f"{len(missing)} of {len(names)} files"
        raise FileNotFoundError(f"{folder / missing[0]}: the index names it, but it is missing ({count} are)")
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds; ValueError where it is cut short or corrupt."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            least = f"{size} bytes, expected {max(start, 8)} for the header alone"
            raise ValueError(f"{path}: truncated, or no safetensors file: {least}")
        raw = file.read(start - 8)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, start, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: corrupt header; copy or download it again") from None
    _check_extent(path, start, size, tensors)
    return tensors


def _stored(path: Path, start: int, entry: dict[str, list[int]]) -> StoredTensor:
    begin, end = (start + int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    return StoredTensor(path=path, shape=shape, dtype=str(entry["dtype"]), begin=begin, end=end)


def _check_extent(path: Path, start: int, size: int, tensors: Mapping[str, StoredTensor]) -> None:
    expected = max((tensor.end for tensor in tensors.values()), default=start)
    if size != expected:
        fault = "truncated" if size < expected else "corrupt"
        raise ValueError(f"{path}: {fault}: {size} bytes, expected {expected}; copy or download it again")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {tensor.dtype}, supported are {', '.join(DTYPES)}")
        if math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.nbytes or tensor.begin < start:
            raise ValueError(f"{path}: corrupt header: {name} does not fill its place")


# ---- reading -----------------------------------------------------------------------------------------------


def load_model(
    path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu", progress: bool = False
) -> Model:
    """The model in a folder or GGUF file, in evaluation mode. In memory: the model, and the tensor being read.

    dtype, device and errors as for `load`.
    """
    checkpoint = open_checkpoint(path)
    chosen = parse_dtype(checkpoint.dtype if dtype == "auto" else dtype)
    model = build_on_meta(checkpoint.config)
    if torch.device(device).type == "cpu":
        smaller = {f"--dtype {x}": torch_bytes(model, x) for x in LOADABLE if parse_dtype(x).itemsize < chosen.itemsize}
        smaller |= smaller_formats(model, packing_dtype(checkpoint).itemsize)
        require_room(checkpoint.path, torch_bytes(model, dtype_name(chosen)), smaller)
    model.load_state_dict(dict(read_parameters(checkpoint, chosen, device, progress)), assign=True)
    return model.eval()


def read_parameters(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: bool = False,
    names: Sequence[str] | None = None,
    title: str = "reading",
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and its name, as soon as the files have given all of it. In memory: those that are begun.

    dtype is that of all but `ALWAYS_FP32`. names: which parameters, in which order; without it all, in that of the
    files. Raises ValueError, before the first, where the files do not fit the configuration.
    """
    model = build_on_meta(checkpoint.config)
    total, read = _plan(checkpoint, model, names)
    begun = _Begun({name: parameter.shape for name, parameter in model.named_parameters()}, dtype, device)
    missing = {name: parameter.numel() for name, parameter in model.named_parameters()}
    with byte_bar(f"{title} {checkpoint.path}", total, progress) as advance:
        for name, place, numbers, nbytes in read(begun):
            place.copy_(numbers)
            advance(nbytes)
            missing[name] -= place.numel()
            if not missing[name]:
                yield name, begun.pop(name)


def packing_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What to read parameters in that are packed next: bf16 where all matrices are in that, else fp32."""
    matrices = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    return torch.bfloat16 if matrices == {"BF16"} else torch.float32


class _Begun(dict[str, Tensor]):
    """Parameters that are being filled: one is allocated when it is first asked for."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: str | torch.device) -> None:
        super().__init__()
        self._shapes, self._dtype, self._device = shapes, dtype, device

    def __missing__(self, name: str) -> Tensor:
        dtype = parameter_dtype(name, self._dtype)
        self[name] = torch.empty(self._shapes[name], dtype=dtype, device=self._device)
        return self[name]


def build_on_meta(config: Config) -> Model:
    """The model's structure, without memory for parameters; ValueError where even its sizes can't be counted."""
    try:
        with torch.device("meta"):
            return ARCHITECTURES[config.model_type][1](config)  # type: ignore[arg-type]
    except RuntimeError:
        raise ValueError("config.json: a matrix would have more than 2^63 bytes; download it again") from None


def _plan(checkpoint: Checkpoint, model: Model, names: Sequence[str] | None) -> tuple[int, Read]:
    """How many bytes to read, and how they fill the parameters; ValueError where they do not fit the configuration."""
    held, path = checkpoint.tensors, checkpoint.path
    if path.is_file():
        parts = _in_order(match_parts(held, model, path), held, names)
        return _total(parts, held), partial(read_parts, parts, held, checkpoint.config)
    pieces = _in_order(match_pieces(held, model, path).values(), held, names)
    return _total(pieces, held), partial(_read_pieces, pieces, held)


def _total(places: Iterable[Piece | Part], held: Mapping[str, StoredTensor]) -> int:
    return sum(held[place.name].nbytes for place in places)


def _in_order(places: Iterable[PlaceT], held: Mapping[str, StoredTensor], names: Sequence[str] | None) -> list[PlaceT]:
    """By parameter as these names have it, those of a parameter, or all without names, as the files have them."""
    rank = {name: i for i, name in enumerate(names)} if names is not None else None
    chosen = [place for place in places if rank is None or place.parameter in rank]

    def key(place: PlaceT) -> tuple[int, Path, int]:
        stored = held[place.name]
        return rank[place.parameter] if rank else 0, stored.path, stored.begin

    return sorted(chosen, key=key)


def _read_pieces(
    pieces: Sequence[Piece], held: Mapping[str, StoredTensor], state: Mapping[str, Tensor]
) -> Iterator[Filled]:
    for path, together in groupby(pieces, key=lambda piece: held[piece.name].path):
        with path.open("rb") as file:
            for piece in together:
                yield from _read_piece(file, piece, held[piece.name], piece.of(state[piece.parameter]))


def _read_piece(file: BufferedReader, piece: Piece, stored: StoredTensor, place: Tensor) -> Iterator[Filled]:
    """Some rows at a time, and not mapped: mapped files would count as memory that the process holds."""
    dtype = DTYPES[stored.dtype]
    file.seek(stored.begin)
    for rows in place.split(max(1, STEP // place[0].numel())):
        raw = bytearray(rows.numel() * dtype.itemsize)
        if file.readinto(raw) != len(raw):
            raise ValueError(f"{stored.path}: became shorter while it was read; copy or download it again")
        yield Filled(piece.parameter, rows, torch.frombuffer(raw, dtype=dtype).view(rows.shape), len(raw))


# ---- writing -----------------------------------------------------------------------------------------------


def save_model(
    model: Model,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_bytes: float = 5e9,
    experts: ExpertLayout = "separate",
    progress: bool = False,
) -> None:
    """Writes a folder that Tenfold and transformers read; a checkpoint that is there is replaced as a whole.

    experts: "separate" gives a file one tensor per matrix, as released; "stacked" one for all.
    shard_bytes: what a file holds at most, or a single tensor. Raises OSError where the disk is full.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sources = [
        TensorSource(name=piece.name, shape=piece.shape, dtype=tensor.dtype, read=partial(piece.of, tensor))
        for name, tensor in parameters.items()
        for piece in pieces(name, tensor.shape, experts)
    ]
    dtype = next(tensor.dtype for name, tensor in parameters.items() if not name.endswith(ALWAYS_FP32))
    folder = Path(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write_checkpoint(folder, model.config, sources, dtype, tokenizer, shard_bytes, progress)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    config: Config,
    sources: Sequence[TensorSource],
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    shard_bytes: float = 5e9,
    progress: bool = False,
    identity: str | None = None,
) -> None:
    """Streams the sources into a folder, one tensor in memory at a time.

    identity: what the values are a function of, where they are one: finished files of the same identity, left
    in the staging folder by an interrupted write, are kept. Raises OSError where the disk has no room.
    """
    staging = folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards(sources, shard_bytes)
    metadata = {"format": "pt"} | ({"identity": identity} if identity else {})
    headers = {name: _header(shard, metadata) for name, shard in shards.items()}
    done = {name for name in shards if identity and _starts_with(staging / name, headers[name])}
    for stale in (path for path in staging.iterdir() if path.name not in done):
        stale.unlink()
    left = [name for name in shards if name not in done]
    total = sum(source.nbytes for name in left for source in shards[name])
    check_disk(staging, total)
    with byte_bar(f"writing {folder}", total, progress) as advance:
        for name in left:
            _write_shard(staging / name, headers[name], shards[name], advance)
    _write_descriptions(staging, config, dtype, shards, tokenizer)
    _publish(staging, folder)


def _plan_shards(sources: Sequence[TensorSource], shard_bytes: float) -> dict[str, list[TensorSource]]:
    """File names and what goes into each; wide types come first in a file, so that tensors lie aligned."""
    groups: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        if groups[-1] and filled + source.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.nbytes
    groups = [sorted(group, key=lambda source: -source.dtype.itemsize) for group in groups]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _header(shard: list[TensorSource], metadata: dict[str, str]) -> bytes:
    """safetensors: the header's length in 8 bytes, the header as JSON padded to 8 bytes, then the tensors."""
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for source in shard:
        begin, end = end, end + source.nbytes
        kind = STORED_NAMES[source.dtype]
        entries[source.name] = {"dtype": kind, "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _starts_with(path: Path, header: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def check_disk(folder: Path, needed: int) -> None:
    """Raises OSError where the disk has no room for this many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"the model needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise OSError(errno.ENOSPC, reason, str(folder.parent))


def _write_shard(path: Path, header: bytes, shard: list[TensorSource], advance: Advance) -> None:
    """The file gets its name once all of it is on the disk."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(header)
        for source in shard:
            tensor = source.read()
            assert (tensor.dtype, tuple(tensor.shape)) == (source.dtype, source.shape), source.name
            file.write(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(source.nbytes)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _write_descriptions(
    staging: Path,
    config: Config,
    dtype: torch.dtype,
    shards: dict[str, list[TensorSource]],
    tokenizer: Tokenizer | None,
) -> None:
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), dtype_name(dtype))  # transformers 5's name and 4's
    write_object(staging / "config.json", config.to_hf() | dtypes)
    if tokenizer is not None:
        tokenizer.save(staging)
    if len(shards) > 1:
        total = sum(source.nbytes for shard in shards.values() for source in shard)
        weight_map = {source.name: file for file, shard in shards.items() for source in shard}
        write_object(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_object(path: Path, values: Mapping[str, object]) -> None:
    """Writes JSON, to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _publish(staging: Path, folder: Path) -> None:
    """Moves the files in: the old checkpoint ends before the first move, the new one begins with the last."""
    for stale in (folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in (INDEX, SINGLE)):
        path.replace(folder / path.name)
    staging.rmdir()
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def byte_bar(title: str, total: int, shown: bool) -> Iterator[Advance]:
    """A progress bar with time left, on stderr if that is a terminal; yields what advances it by bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
