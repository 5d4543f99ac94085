"""The compiled kernels for processors: the typed face of `_native`.

Shape letters: T tokens, D hidden, E experts, F expert width, N and K the rows and columns of a weight.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from tenfold.kernels._native import PackedExperts, PackedLinear

FORMATS = ("bf16", "int8", "int4")


@functools.cache
def _load() -> Any:
    """The compiled module; None, with one warning, where it was not built or does not load.

    Raises ValueError where TENFOLD_ISA names an instruction set that this processor can't run.
    """
    try:
        from tenfold.kernels import _native
    except ImportError as error:
        warnings.warn(f"the native kernels are not available, torch runs instead: {error}", stacklevel=3)
        return None
    if forced := os.environ.get("TENFOLD_ISA"):
        try:
            _native.use_isa(forced)
        except ValueError as error:
            raise ValueError(f"TENFOLD_ISA: {error}") from None
    return _native


def available() -> bool:
    """Whether the native kernels can be used; where not, the first question warns."""
    return _load() is not None


def _native() -> Any:
    module = _load()
    if module is None:
        raise RuntimeError("the native kernels are not available: ask available() first")
    return module


def isa() -> str:
    """The instruction set in use: `baseline`, `avx2` or `avx512`; the variable TENFOLD_ISA forces one."""
    return _native().isa()


def isas() -> list[str]:
    """Those that this processor can run, the narrowest first."""
    return _native().isas()


def use_isa(name: str) -> None:
    """Changes the instruction set, for tests and comparisons. Packed weights serve all of them."""
    _native().use_isa(name)


def threads() -> int:
    return _native().threads()


def set_threads(count: int) -> None:
    """How many threads a kernel uses; the calling one is among them."""
    _native().set_threads(count)


def memory_read_gb_s(megabytes: int = 512) -> float:
    """How fast the threads read memory: what bounds decoding."""
    return _native().memory_read_gb_s(megabytes)


def pack_linear(weight: Tensor, format: str, importance: Tensor | None = None) -> PackedLinear:
    """Packs a weight `[N, K]`, fp32 or bf16, K a multiple of 32, as `bf16`, `int8` or `int4`.

    importance: fp32 `[K]`, what a squared error in a column costs (int4 alone makes use of it).
    """
    return _native().PackedLinear.pack(weight.detach(), format, importance)


def packed_linear(packed: Tensor, format: str, rows: int, cols: int) -> PackedLinear:
    """A weight in packed form already, uint8, as from a memory-mapped file: nothing is copied."""
    return _native().PackedLinear(packed, format, rows, cols)


def unpack(weight: PackedLinear) -> Tensor:
    """The values that a packed weight stands for, fp32 `[N, K]`."""
    out = torch.empty(weight.shape)
    weight.unpack(out)
    return out


def linear(
    x: Tensor, weights: Sequence[PackedLinear], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """`x @ w.T` for several weights at once: x `[T, K]`, fp32 or bf16; `[T, N]` of this dtype for each.

    A row of a result depends on its own row of x alone, to the last bit, whatever T and the threads are.
    """
    outs = tuple(torch.empty(x.shape[0], weight.shape[0], dtype=dtype) for weight in weights)
    _native().linear(x.detach(), list(weights), list(outs))
    return outs


def pack_experts(gate_up: Tensor, down: Tensor, format: str) -> PackedExperts:
    """Packs a layer's experts: gate_up `[E, 2F, D]`, gate rows first, down `[E, D, F]`; multiples of 32.

    To pack one expert at a time, make `empty_experts` and call its `pack(expert, gate, up, down)`.
    """
    experts = empty_experts(format, gate_up.shape[0], gate_up.shape[2], down.shape[2])
    for e in range(len(gate_up)):
        gate, up = gate_up[e].detach().chunk(2)
        experts.pack(e, gate, up, down[e].detach())
    return experts


def empty_experts(format: str, count: int, hidden: int, width: int) -> PackedExperts:
    """Room for experts, all weights zero."""
    return _native().PackedExperts(format, count, hidden, width)


def packed_experts(packed: Tensor, format: str, count: int, hidden: int, width: int) -> PackedExperts:
    """Experts in packed form already, uint8, as from a memory-mapped file: nothing is copied."""
    return _native().PackedExperts(packed, format, count, hidden, width)


def unpack_expert(experts: PackedExperts, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """The values of one expert, fp32: gate and up `[F, D]`, down `[D, F]`."""
    _, hidden, width = experts.shape
    gate, up, down = torch.empty(width, hidden), torch.empty(width, hidden), torch.empty(hidden, width)
    experts.unpack(expert, gate, up, down)
    return gate, up, down


def expert_layer(
    x: Tensor,
    experts: PackedExperts,
    chosen: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`sum_j weights[t, j] * down swiglu(gate x[t], up x[t])` over the experts `chosen[t, j]`; `[T, D]`.

    x `[T, D]`, fp32 or bf16; chosen `[T, k]`, integers; weights fp32 `[T, k]`. A shared expert is one more of
    the experts, which every token chooses. The sum runs in the order of rising expert, so that a row of the
    result depends on its own row of x and of the choice alone, to the last bit.
    """
    out = torch.empty(x.shape, dtype=dtype)
    _native().expert_layer(x.detach(), experts, chosen.to(torch.int32), weights.detach(), out)
    return out
