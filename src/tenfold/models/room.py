"""Whether a model fits into memory, told before any of it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from tenfold.kernels import cpu
from tenfold.memory import available_memory
from tenfold.models import Model
from tenfold.models.layout import parameter_dtype, parse_dtype
from tenfold.models.packing import owner_shapes, planned_bytes


def require_room(path: Path, needed: int, smaller: Mapping[str, int]) -> None:
    """Raises ValueError where this many bytes are not available.

    smaller: bytes of what could be done instead, by how to ask for it, the best first; the first that fits is named.
    """
    free = available_memory()
    if free is None or needed <= free:
        return
    fits = next((f"; {what} takes {_size(least)}" for what, least in smaller.items() if least <= free), "")
    least = min([needed, *smaller.values()])
    advice = fits or f"; free some, or take a machine with {_size(least)} or more"
    raise ValueError(f"{path}: needs {_size(needed)} of memory, {_size(free)} are available{advice}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def torch_bytes(model: Model, dtype: str) -> int:
    """Bytes of the parameters."""
    kind = parse_dtype(dtype)
    return sum(p.numel() * parameter_dtype(name, kind).itemsize for name, p in model.named_parameters())


def packing_bytes(model: Model, format: str, itemsize: int) -> int:
    """Bytes of the packed model and of the owner that is being packed, read as numbers of this size."""
    return planned_bytes(model, format) + owner_bytes(model, itemsize)


def owner_bytes(model: Model, itemsize: int) -> int:
    """Bytes of the largest owner, as numbers of this size."""
    owners = owner_shapes(model).values()
    return itemsize * max(sum(math.prod(shape) for shape in shapes.values()) for shapes in owners)


def smaller_formats(model: Model, itemsize: int, than: str | None = None) -> dict[str, int]:
    """What the native kernels need, with fewer bits than this format, by option."""
    formats = cpu.FORMATS[cpu.FORMATS.index(than) + 1 if than else 0 :]
    return {f"--quantization {format}": packing_bytes(model, format, itemsize) for format in formats}
