"""`tenfold quantize`: a checkpoint becomes a folder with a packed file, owner by owner, and a report of what it cost.

The files grow in a folder inside the target, with the state of the work, which is written after each owner: the same
command goes on from there. At the end they are moved in, the packed file last.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.divergence import Comparison, Divergence, LayerError
from tenfold.models.layout import PACKED
from tenfold.models.packed_file import (
    VERSION,
    Entries,
    Entry,
    PackedWriter,
    is_packed,
    open_packed,
    publish,
    read_entry,
    write_whole,
)
from tenfold.models.packing import (
    Weights,
    complete_owners,
    owner_by_owner,
    pack_owner,
    planned_bytes,
)
from tenfold.models.quantize_report import QuantizeReport
from tenfold.models.room import owner_bytes, require_room
from tenfold.models.weights import (
    INDEX,
    SINGLE,
    STAGING,
    Checkpoint,
    build_on_meta,
    byte_bar,
    check_disk,
    load_tokenizer,
    open_checkpoint,
    packing_dtype,
    read_parameters,
    resolve_path,
)
from tenfold.tokenizer import Tokenizer

STATE = "state.safetensors"
ROW = 1024  # tokens of a sequence of the texts, where the context allows


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents, and how many tokens of them to take; `name` for the report."""

    name: str
    documents: Iterable[str]
    tokens: int


def quantize(
    path_or_name: str | Path,
    format: str,
    out: Path | None = None,
    test: Text | None = None,
    calibration: Text | None = None,
) -> QuantizeReport:
    """Packs a model into a folder; goes on where an earlier call with the same arguments was stopped.

    path_or_name: as for `weights.load`. out: without it NAME-FORMAT, beside a local model, or here. test: what to
    compare the packed model with the original on. calibration: weigh the errors of int4 by what this text sends
    through. Raises ValueError or OSError, in one line, where the model cannot be read or packed, or the target holds
    anything else.
    """
    cpu.require()
    path = resolve_path(path_or_name)
    out = out or default_out(str(path_or_name), path, format)
    _check_target(path, out)
    checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
    if tokenizer is None and (test or calibration):
        raise ValueError(
            f"{path}: no tokenizer, so no text can be read; --test-tokens 0 without --calibration packs alone"
        )
    rows = [
        read_rows(tokenizer, text, checkpoint.config) if tokenizer and text else None for text in (test, calibration)
    ]
    job = _Job(path_or_name, checkpoint, format, out, *rows)
    started = time.perf_counter()
    job.run()
    report = _report(job, test, calibration, time.perf_counter() - started)
    publish(job.staging, checkpoint.config, tokenizer, asdict(report))
    return report


def default_out(name: str, path: Path, format: str) -> Path:
    """NAME-FORMAT beside a local folder or file; in the current folder for a name on the hub."""
    if not Path(name).expanduser().exists():
        return Path(f"{name.rpartition('/')[2]}-{format}")
    path = path.resolve()
    return path.with_name(f"{path.stem if path.is_file() else path.name}-{format}")


def _check_target(path: Path, out: Path) -> None:
    if path.is_dir() and is_packed(path):
        raise ValueError(f"{path}: is packed already; quantize the original")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; choose another folder with --out")
    if is_packed(out):
        file = open_packed(out)
        raise ValueError(f"{out}: holds {file.source} as {file.format} already; delete it, or choose another --out")
    taken = [name for name in (INDEX, SINGLE, "config.json") if (out / name).exists()]
    if taken and not (out / STAGING / STATE).exists():
        raise ValueError(f"{out}: holds another model ({taken[0]}); choose another folder with --out")


def read_rows(tokenizer: Tokenizer, text: Text, config: Config) -> Tensor:
    """Tokens of a text as int64 `[N, T]`. Raises ValueError where they are not of the model, or too few."""
    ids: list[int] = []
    for document in text.documents:
        ids += tokenizer.encode(document)
        if len(ids) >= text.tokens:
            break
    if len(ids) < 2 or max(ids) >= config.vocab_size:
        found = f"token {max(ids)}" if ids else "no tokens"
        raise ValueError(f"{text.name}: {found}, the model knows {config.vocab_size}: is it its tokenizer?")
    length = min(ROW, config.max_position_embeddings, text.tokens, len(ids))
    count = min(text.tokens, len(ids)) // length
    return torch.tensor(ids[: count * length]).view(count, length)


# ---- the work ----------------------------------------------------------------------------------------------


class _Job:
    """One quantization, from where the last attempt at it ended."""

    def __init__(
        self, name: str | Path, checkpoint: Checkpoint, format: str, out: Path, test: Tensor | None, text: Tensor | None
    ) -> None:
        """Raises ValueError where another one was begun in the same folder."""
        self.source, self.checkpoint, self.format = str(name), checkpoint, format
        self.out, self.staging = out, out / STAGING
        self.skeleton = build_on_meta(checkpoint.config)
        self.comparison = Comparison(checkpoint.config, test, text)
        self._identity = _identity(checkpoint, format, test, text)
        self._kept = self._restore() if self.staging.exists() else {}

    def run(self) -> None:
        compares = self.comparison.tokens is not None or self.comparison.calibration is not None
        dtype = torch.float32 if compares else packing_dtype(self.checkpoint)
        require_room(self.checkpoint.path, owner_bytes(self.skeleton, dtype.itemsize), {})
        done = self._kept.keys() - ({"model"} if compares else set())  # whose norm and embedding are asked for again
        names = owner_by_owner(self.skeleton, without=done)
        with self._writer() as writer:
            check_disk(self.staging, planned_bytes(self.skeleton, self.format) - _total(self._kept))
            parameters = read_parameters(self.checkpoint, dtype, progress=True, names=names, title="quantizing")
            for owner, weights in complete_owners(self.skeleton, parameters):
                self._pack(writer, owner, weights)
            writer.finish(self.format, self.source)
            self.packed = writer.owners

    def _writer(self) -> PackedWriter:
        with byte_bar("verifying what is there", _total(self._kept), bool(self._kept)) as advance:
            try:
                return PackedWriter(self.staging / PACKED, self._kept, advance)
            except (ValueError, FileNotFoundError):
                raise ValueError(
                    f"{self.staging}: an earlier attempt left damaged files; delete it, and repeat"
                ) from None

    def _pack(self, writer: PackedWriter, owner: str, weights: Weights) -> None:
        importance = self.comparison.importance(owner, weights)
        packed = pack_owner(self.checkpoint.config, owner, weights, self.format, importance)
        if owner not in writer.owners:
            writer.add(owner, packed)
        self.comparison.step(owner, weights, packed)
        self._save(writer.owners)

    def _save(self, owners: Entries) -> None:
        state = {
            "identity": self._identity,
            "owners": {owner: [asdict(entry) for entry in entries] for owner, entries in owners.items()},
            "layers": [asdict(layer) for layer in self.comparison.layers],
            "divergence": self.comparison.divergence and asdict(self.comparison.divergence),
        }
        streams = {name: stream.contiguous() for name, stream in self.comparison.streams.items()}
        write_whole(self.staging / STATE, to_bytes(streams, {"state": json.dumps(state)}))

    def _restore(self) -> dict[str, list[Entry]]:
        """The owners that are packed already; their place in the comparison is taken again."""
        try:
            with safe_open(self.staging / STATE, "pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return {}  # stopped before anything was done, or what was done is lost
        if state["identity"] != self._identity:
            raise ValueError(
                f"{self.staging}: begun from another model or with other options; delete it, or choose --out"
            )
        self.comparison.streams = streams
        self.comparison.layers = [LayerError(**layer) for layer in state["layers"]]
        self.comparison.divergence = Divergence(**state["divergence"]) if state["divergence"] else None
        return {owner: [read_entry(values) for values in entries] for owner, entries in state["owners"].items()}


def _total(owners: Entries) -> int:
    return sum(entry.nbytes for entries in owners.values() for entry in entries)


def _identity(
    checkpoint: Checkpoint, format: str, test: Tensor | None, calibration: Tensor | None
) -> dict[str, object]:
    """What the result is a function of; the files by size and time."""
    files = sorted({tensor.path.resolve() for tensor in checkpoint.tensors.values()})
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    texts = [None if text is None else [*text.shape, zlib.crc32(text.numpy().data)] for text in (test, calibration)]
    return {"version": VERSION, "format": format, "files": [list(stat) for stat in stats], "texts": texts}


def _report(job: _Job, test: Text | None, calibration: Text | None, seconds: float) -> QuantizeReport:
    bytes_by_format: Counter[str] = Counter()
    for entry in (entry for entries in job.packed.values() for entry in entries):
        bytes_by_format[entry.format] += entry.nbytes
    comparison = job.comparison
    return QuantizeReport(
        source=job.source,
        format=job.format,
        parameters=sum(parameter.numel() for parameter in job.skeleton.parameters()),
        source_bytes=sum(tensor.nbytes for tensor in job.checkpoint.tensors.values()),
        packed_bytes=bytes_by_format.total(),
        bytes_by_format=dict(bytes_by_format),
        calibration=calibration and calibration.name,
        calibration_tokens=0 if comparison.calibration is None else comparison.calibration.numel(),
        test=test and test.name,
        divergence=comparison.divergence,
        layers=tuple(comparison.layers),
        seconds=seconds,
    )
