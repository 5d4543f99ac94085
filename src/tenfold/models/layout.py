"""How a model's parameters lie in files: names, shapes and dtypes, and which piece of a file goes where.

In memory the experts of a layer are one stacked tensor. In files they lie apart, as released, or stacked too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tenfold.models import Model

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKED = "model.tenfold"  # weights as the native kernels read them (packed_file.py)
LOADABLE = ("float32", "bfloat16", "float16")
ALWAYS_FP32 = (
    "A_log",
    "dt_bias",
)  # decays are exponentials of these: rounded, heads forget at the wrong rate
ExpertLayout = Literal["separate", "stacked"]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: `dtype` is safetensors' name, `begin` and `end` are bytes from the file's start."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor to be written: what the header says of it, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor as files name it, and its place in a parameter: all of it, or rows of one expert's matrix."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this piece is."""
        if self.expert is None:
            return parameter
        return parameter[self.expert].narrow(0, self.first_row, self.shape[0])


class Filled(NamedTuple):
    """A step of reading: a parameter's name, the view of it to fill, the numbers, and their bytes in the file."""

    parameter: str
    place: Tensor
    numbers: Tensor
    nbytes: int


def pieces(parameter: str, shape: Sequence[int], experts: ExpertLayout) -> Iterator[Piece]:
    """The tensors that a parameter is in files: one, or of separate experts two or one for each."""
    owner, _, matrix = parameter.rpartition(".")
    if experts == "stacked" or not owner.endswith("mlp.experts"):
        yield Piece(name=parameter, parameter=parameter, shape=tuple(shape))
        return
    count, rows, columns = shape
    parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
    shape = (rows // len(parts), columns)
    for expert in range(count):
        for i, part in enumerate(parts):
            name = f"{owner}.{expert}.{part}.weight"
            yield Piece(name=name, parameter=parameter, shape=shape, expert=expert, first_row=i * shape[0])


def match_pieces(held: Mapping[str, StoredTensor], model: Model, folder: Path) -> dict[str, Piece]:
    """The place of every stored tensor that the model wants; ValueError where the two do not fit."""
    wanted: dict[str, Piece] = {}
    for name, parameter in model.named_parameters():
        layout: ExpertLayout = "stacked" if name in held else "separate"
        wanted |= {piece.name: piece for piece in pieces(name, parameter.shape, layout)}
    check_fit(held, {name: piece.shape for name, piece in wanted.items()}, model, folder, "config.json")
    return wanted


def check_fit(
    held: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], model: Model, path: Path, source: str
) -> None:
    """Raises ValueError unless the stored tensors are those that `source` makes the model want, in these shapes."""
    for name, shape in wanted.items():
        if name in held and held[name].shape != shape:
            found, expected = list(held[name].shape), list(shape)
            raise ValueError(f"{held[name].path}: {name} is {found}, expected {expected} by {source}")
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ValueError(f"{path}: missing {_listing(missing)}; {source} expects them, files lack them")
    unexpected = held.keys() - wanted.keys() - _redundant(held, model)
    if unexpected:
        raise ValueError(f"{path}: unexpected {_listing(sorted(unexpected))}; {source} has no place for them")


def _redundant(held: Mapping[str, StoredTensor], model: Model) -> set[str]:
    """What some tools store beside the parameters: rotary tables, a second copy of tied embeddings."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return tied | {name for name in held if name.endswith("rotary_emb.inv_freq")}


def _listing(names: list[str]) -> str:
    count = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
    return f"{count} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def parse_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name that a user gives; ValueError for others."""
    if name not in LOADABLE:
        raise ValueError(f"dtype {name!r} is not supported, expected {', '.join(LOADABLE)} or auto")
    return getattr(torch, name)


def parameter_dtype(name: str, chosen: torch.dtype) -> torch.dtype:
    """The dtype of a parameter, by its name, in a model of the chosen one."""
    return torch.float32 if name.endswith(ALWAYS_FP32) else chosen
