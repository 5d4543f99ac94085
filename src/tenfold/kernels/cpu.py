"""The compiled kernels for processors: the typed face of `_native`.

Shape letters: T tokens, D hidden, E experts, F expert width, N and K the rows and columns of a weight.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from tenfold.kernels._native import (
        AttentionBlock,
        Batch,
        DeltaNetBlock,
        DeltaNetWeights,
        DenseBlock,
        DraftInput,
        KeyValuePages,
        NormWeight,
        PackedExperts,
        PackedLinear,
        RecurrentStates,
        Residual,
        Rotation,
        SparseBlock,
    )

FORMATS = ("bf16", "int8", "int4")
BLOCK, GROUP = 32, 32  # the rows and columns that are packed together (csrc/formats.h)
GROUP_BYTES = {"bf16": 2048, "int8": 1088, "int4": 576}  # of a block's rows in a group's columns, with scales
EXPERT_ALIGNMENT = 4096  # bytes


@functools.cache
def _load() -> Any:
    """The compiled module, or why it was not built or does not load.

    Raises ValueError where TENFOLD_ISA names an instruction set that this processor can't run.
    """
    try:
        from tenfold.kernels import _native
    except ImportError as error:
        return error
    if forced := os.environ.get("TENFOLD_ISA"):
        try:
            _native.use_isa(forced)
        except ValueError as error:
            raise ValueError(f"TENFOLD_ISA: {error}") from None
    return _native


@functools.cache
def available() -> bool:
    """Whether the native kernels can be used; where not, the first question warns."""
    reason = _load()
    if isinstance(reason, ImportError):
        warnings.warn(f"the native kernels are not available, torch runs instead: {reason}", stacklevel=2)
    return not isinstance(reason, ImportError)


def require() -> None:
    """Raises ValueError where the native kernels cannot be used."""
    reason = _load()
    if isinstance(reason, ImportError):
        raise ValueError(
            f"the native kernels are not available ({reason}): "
            "install Tenfold again where there is a C++20 compiler, or run without quantization"
        )


def _native() -> Any:
    module = _load()
    if isinstance(module, ImportError):
        raise RuntimeError("the native kernels are not available: ask available() first")
    return module


def isa() -> str:
    """The instruction set in use: `baseline`, `avx2`, `avxvnni` or `avx512`; the variable TENFOLD_ISA forces one."""
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


def multiply_gop_s(format: str) -> float:
    """10^9 operations a second on numbers in registers, as a format needs them: what bounds prefill.

    `fp32` and `int16`, in pairs as attention in int8 takes them, are formats here as well. A multiplication and an
    addition are two.
    """
    return _native().multiply_gop_s(format)


def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed weight `[N, K]`."""
    return -(-rows // BLOCK) * (cols // GROUP) * GROUP_BYTES[format]


def expert_bytes(format: str, hidden: int, width: int) -> int:
    """Bytes of a packed expert, whole pages."""
    used = 2 * packed_bytes(format, width, hidden) + packed_bytes(format, hidden, width)
    return -(-used // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT


def pack_linear(weight: Tensor, format: str, importance: Tensor | None = None) -> PackedLinear:
    """Packs a weight `[N, K]`, fp32 or bf16, K a multiple of 32, as `bf16`, `int8` or `int4`.

    importance: fp32 `[K]`, what a squared error in a column costs (int4 alone makes use of it).
    """
    return _native().PackedLinear.pack(weight.detach(), format, importance)


def packed_linear(packed: Tensor | NDArray[np.uint8], format: str, rows: int, cols: int) -> PackedLinear:
    """A weight in packed form already, uint8, as from a memory-mapped file: nothing is copied."""
    return _native().PackedLinear(packed, format, rows, cols)


def unpack(weight: PackedLinear) -> Tensor:
    """The values that a packed weight stands for, fp32 `[N, K]`."""
    out = torch.empty(weight.shape)
    weight.unpack(out)
    return out


def take_rows(weights: Sequence[PackedLinear], rows: Tensor) -> Tensor:
    """Rows, by their numbers int64 `[T]`, of weights that stand one below the other; fp32 `[T, K]`."""
    out = torch.empty(len(rows), weights[0].shape[1])
    _native().take_rows(list(weights), rows, out)
    return out


def linear(x: Tensor, weights: Sequence[PackedLinear], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """`x @ w.T` for several weights at once: x `[T, K]`, fp32 or bf16; `[T, N]` of this dtype for each.

    A row of a result depends on its own row of x alone, to the last bit, whatever T and the threads are.
    """
    outs = tuple(torch.empty(x.shape[0], weight.shape[0], dtype=dtype) for weight in weights)
    _native().linear(x.detach(), list(weights), list(outs))
    return outs


def linear_stacked(x: Tensor, weights: Sequence[PackedLinear]) -> Tensor:
    """As `linear`, for weights that stand one below the other, and fp32 `[T, N of all]`."""
    out = torch.empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    _native().linear_stacked(x.detach(), weights, out)
    return out


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


def packed_experts(
    packed: Tensor | NDArray[np.uint8], format: str, count: int, hidden: int, width: int
) -> PackedExperts:
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


def rotation(cos: Tensor, sin: Tensor) -> Rotation:
    """The rotation of tokens by their position: fp32 `[positions, R / 2]`, not copied."""
    return _native().Rotation(cos, sin)


def batch(
    bounds: Sequence[int],
    slots: Sequence[int] | None = None,
    past: Sequence[int] | None = None,
    pages: Sequence[Sequence[int]] | None = None,
    rotation: Rotation | None = None,
    saves: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """The sequences of a step, for all its layers: sequence n has the tokens `bounds[n] .. bounds[n + 1] - 1`.

    slots: where each one's recurrent state lies. past and pages: how many earlier tokens each one has in the
    cache, and the numbers of the pages that hold those and will hold the new ones, in order, best as arrays of
    int32. Sequences may share pages that they only read. rotation: of all positions up to these. saves: where
    the states after each one's last tokens are written as well, one slot a token; the last may be its own slot.
    """
    tables = None if pages is None else [np.asarray(table, np.int32) for table in pages]
    return _native().Batch(bounds, slots, past, tables, rotation, saves)


def delta_net_weights(
    conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, key_heads: int, eps: float
) -> DeltaNetWeights:
    """A Gated DeltaNet's weights besides its projections: conv_weight `[C, W]`, A_log and dt_bias `[HV]`,
    norm_weight `[V]`; fp32 or bf16, copied. Head dims are multiples of 16.
    """
    tensors = (x.detach().contiguous() for x in (conv_weight, A_log, dt_bias, norm_weight))
    return _native().DeltaNetWeights(*tensors, key_heads, eps)


def recurrent_states(conv: Tensor, recurrent: Tensor) -> RecurrentStates:
    """One layer's states, fp32 conv `[slots, C, W-1]` and recurrent `[slots, HV, V, K]`: not copied."""
    return _native().RecurrentStates(conv, recurrent)


def gated_delta_net(
    qkvz: Tensor, ba: Tensor, weights: DeltaNetWeights, states: RecurrentStates, batch: Batch
) -> Tensor:
    """Gated DeltaNet between its two projections; advances the states and returns `[T, HV * V]`.

    qkvz and ba are fp32 rows as the projections give them, interleaved by key head. A token's result and the
    states depend on its own sequence alone, to the last bit, however that is cut into calls.
    """
    _require_no_grad(qkvz, ba)
    out = torch.empty(qkvz.shape[0], weights.values)
    _native().gated_delta_net(qkvz, ba, weights, states, batch, out)
    return out


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, but on large pages where the system has them. Raises MemoryError."""
    count = math.prod(shape)
    if not count:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_numpy(_native().empty_bytes(count * dtype.itemsize)).view(dtype).view(*shape)


def page_parts(head_dim: int, page_size: int, dtype: torch.dtype) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of a page of one head, as `key_value_pages` takes them: keys, values, for int8 their scales."""
    if dtype not in (torch.int8, torch.bfloat16):
        return ((head_dim, page_size), dtype), ((page_size, head_dim), dtype)
    pairs = ((head_dim // 2, page_size, 2), dtype), ((page_size // 2, head_dim, 2), dtype)
    scales = (page_size,), torch.float32
    return (*pairs, scales, scales) if dtype == torch.int8 else pairs


def empty_pages(pages: int, heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arrays for `key_value_pages`, as zeros."""
    parts = page_parts(head_dim, page_size, dtype)
    return tuple(torch.zeros(heads, pages, *shape, dtype=dtype) for shape, dtype in parts)


def key_value_pages(
    keys: Tensor, values: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None
) -> KeyValuePages:
    """One layer's cache, not copied: keys `[G, pages, K, page]` and values `[G, pages, page, K]`.

    A page has 16, 32 or 64 tokens; fp32 or fp16. In bf16 and int8, keys are `[G, pages, K / 2, page, 2]` and values
    `[G, pages, page / 2, K, 2]`; int8 ones have fp32 scales `[G, pages, page]`. What a head reads lies together, in
    as long runs as the numbers of its pages follow each other.
    """
    scales = (x for x in (key_scales, value_scales) if x is not None)
    return _native().KeyValuePages(keys, values, *scales)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: NormWeight,
    k_norm: NormWeight,
    cache: KeyValuePages,
    batch: Batch,
    gated: bool,
) -> Tensor:
    """Attention between its projections: norms, rotation, new keys to the cache, softmax; `[T, H * K]`.

    q `[T, H * K]`, or, gated, `[T, H * 2 * K]` with each head's query and then its output gate; k, v
    `[T, G * K]`; all fp32. A token's result depends on its own sequence alone, to the last bit, however that is
    cut into calls.
    """
    _require_no_grad(q, k, v)
    out = torch.empty(q.shape[0], q.shape[1] // 2 if gated else q.shape[1])
    _native().attention(q, k, v, q_norm, k_norm, gated, cache, batch, out)
    return out


def norm_weight(weight: Tensor, eps: float, zero_centered: bool) -> NormWeight:
    """The weight `[D]` of an RMSNorm, fp32 or bf16, copied; zero-centred ones multiply by `1 + weight`."""
    return _native().NormWeight(weight.detach().contiguous(), eps, zero_centered)


def rms_norm(x: Tensor, weight: NormWeight, delta: Tensor | None = None) -> Tensor:
    """RMSNorm of fp32 x `[T, D]`, after adding delta to x itself where there is one."""
    _require_no_grad(x, *(() if delta is None else (delta,)))
    out = torch.empty(x.shape)
    _native().rms_norm(x, weight, delta, out)
    return out


def route(
    logits: Tensor, k: int, normalize: bool, shared_gate: Tensor | None = None, shared: int = 1
) -> tuple[Tensor, Tensor]:
    """Experts of each token from fp32 logits `[T, E]`: weights fp32 and numbers int32 `[T, k]`, the largest first.

    Softmax over all experts, renormalised over the k if asked; of equal logits the lower number wins. With
    shared_gate `[T, 1]` there are `shared` places more: experts E and up, weighted by the sigmoid of the gate.
    """
    _require_no_grad(logits)
    places = (logits.shape[0], k + (shared if shared_gate is not None else 0))
    weights, chosen = torch.empty(places), torch.empty(places, dtype=torch.int32)
    _native().route(logits, k, normalize, shared_gate, chosen, weights)
    return weights, chosen


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, fp32 `[T, F]`."""
    _require_no_grad(gate, up)
    out = torch.empty(gate.shape)
    _native().swiglu(gate, up, out)
    return out


def attention_block(
    norm: NormWeight,
    q: PackedLinear,
    k: PackedLinear,
    v: PackedLinear,
    q_norm: NormWeight,
    k_norm: NormWeight,
    output: PackedLinear,
    gated: bool,
) -> AttentionBlock:
    """`rms_norm`, `linear`, `attention` and `linear` in one call, for `mix`."""
    return _native().AttentionBlock(norm, q, k, v, q_norm, k_norm, output, gated)


def delta_net_block(
    norm: NormWeight, qkvz: PackedLinear, ba: PackedLinear, weights: DeltaNetWeights, output: PackedLinear
) -> DeltaNetBlock:
    """`rms_norm`, `linear`, `gated_delta_net` and `linear` in one call, for `mix`."""
    return _native().DeltaNetBlock(norm, qkvz, ba, weights, output)


def sparse_block(
    norm: NormWeight, router: PackedLinear, shared_gate: PackedLinear, experts: PackedExperts, k: int, normalize: bool
) -> SparseBlock:
    """`rms_norm`, `linear`, `route` and `expert_layer` in one call, for `feed_forward`.

    Experts behind those of the router are the shared one, in parts.
    """
    return _native().SparseBlock(norm, router, shared_gate, experts, k, normalize)


def dense_block(norm: NormWeight, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> DenseBlock:
    """`rms_norm`, `linear`, `swiglu` and `linear` in one call, for `feed_forward`."""
    return _native().DenseBlock(norm, gate, up, down)


def residual(x: Tensor) -> Residual:
    """The residual stream, fp32 `[T, D]`, for `mix` and `feed_forward`, which add to x in place, though not at once:
    what the last block adds stands beside it until the next one, or until `settle()`.
    """
    _require_no_grad(x)
    return _native().Residual(x)


def embed(weights: Sequence[PackedLinear], tokens: Sequence[int]) -> Residual:
    """A residual stream that begins with rows of weights that stand one below the other."""
    return _native().Residual(weights, tokens)


def draft_input(embedding_norm: NormWeight, hidden_norm: NormWeight, weight: PackedLinear) -> DraftInput:
    """Where multi-token prediction begins: both norms have `[D]`, the weight is `[D, 2 D]`."""
    return _native().DraftInput(embedding_norm, hidden_norm, weight)


def embed_drafts(block: DraftInput, weights: Sequence[PackedLinear], tokens: Sequence[int], hidden: Tensor) -> Residual:
    """A residual stream of multi-token prediction: from embeddings, as `embed`, and hidden states fp32 `[T, D]`."""
    return block(weights, tokens, hidden.detach())


def normalized(residual: Residual, norm: NormWeight) -> Tensor:
    """RMSNorm `[T, D]` of the residual stream, which is settled by it."""
    out = torch.empty(residual.shape)
    residual.normalize(norm, out)
    return out


def mix(
    block: AttentionBlock | DeltaNetBlock, residual: Residual, memory: KeyValuePages | RecurrentStates, batch: Batch
) -> None:
    """Adds a mixer's part to the residual stream. memory: pages for attention, states for Gated DeltaNet."""
    block(residual, memory, batch)  # type: ignore[arg-type]


def remember(block: AttentionBlock, residual: Residual, memory: KeyValuePages, batch: Batch) -> None:
    """As `mix`, where nobody reads the result: the pages get their keys and values, the same bits, and that is all."""
    block.remember(residual, memory, batch)


def feed_forward(block: SparseBlock | DenseBlock, residual: Residual) -> None:
    """Adds a feed-forward's part to the residual stream."""
    block(residual)


class Use(NamedTuple):
    """What the calls of one kernel came to, on all threads that called.

    bytes: of weights, states, keys and values, that cannot be in a cache. operations: multiplications and additions.
    """

    kernel: str
    calls: int
    seconds: float
    bytes: float
    operations: float


@contextmanager
def profile() -> Iterator[list[Use]]:
    """Fills the list, at its end, with what each kernel took in between."""
    uses: list[Use] = []
    _native().start_profile()
    try:
        yield uses
    finally:
        uses.extend(Use(*use) for use in _native().stop_profile())


def _require_no_grad(*tensors: Tensor) -> None:
    """These kernels have no gradient, and DLPack would lose it without a word."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("the native kernels have no gradients: call them under torch.no_grad()")
