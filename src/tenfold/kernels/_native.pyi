"""What csrc/bindings.cpp binds. Arrays are all that speaks DLPack; results go to `out`, `outs`."""

from collections.abc import Sequence
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = Tensor | NDArray[np.generic]

class PackedLinear:
    format: str
    shape: tuple[int, int]
    nbytes: int
    bytes: NDArray[np.uint8]
    def __init__(self, bytes: Array, format: str, rows: int, cols: int) -> None: ...
    @staticmethod
    def pack(weight: Array, format: str, importance: Array | None = None) -> PackedLinear: ...
    def unpack(self, out: Array) -> None: ...

class PackedExperts:
    format: str
    shape: tuple[int, int, int]
    nbytes: int
    bytes: NDArray[np.uint8]
    @overload
    def __init__(self, format: str, count: int, hidden: int, width: int) -> None: ...
    @overload
    def __init__(self, bytes: Array, format: str, count: int, hidden: int, width: int) -> None: ...
    def pack(
        self,
        expert: int,
        gate: Array,
        up: Array,
        down: Array,
        importance: Array | None = None,
        importance_down: Array | None = None,
    ) -> None: ...
    def unpack(self, expert: int, gate: Array, up: Array, down: Array) -> None: ...

def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def empty_bytes(bytes: int) -> NDArray[np.uint8]: ...
def memory_read_gb_s(megabytes: int = 512) -> float: ...
def multiply_gop_s(format: str) -> float: ...
def take_rows(weights: Sequence[PackedLinear], rows: Array, out: Array) -> None: ...
def linear_stacked(x: Array, weights: Sequence[PackedLinear], out: Array) -> None: ...
def linear(x: Array, weights: Sequence[PackedLinear], outs: Sequence[Array]) -> None: ...
def expert_layer(x: Array, experts: PackedExperts, chosen: Array, weights: Array, out: Array) -> None: ...

class Rotation:
    def __init__(self, cos: Array, sin: Array) -> None: ...

class Batch:
    tokens: int
    def __init__(
        self,
        bounds: Sequence[int],
        slots: Sequence[int] | None = None,
        past: Sequence[int] | None = None,
        pages: Sequence[Array] | None = None,
        rotation: Rotation | None = None,
        saves: Sequence[Sequence[int]] | None = None,
    ) -> None: ...

class NormWeight:
    dim: int
    def __init__(self, weight: Array, eps: float, zero_centered: bool) -> None: ...

class DeltaNetWeights:
    values: int
    def __init__(
        self, conv_weight: Array, A_log: Array, dt_bias: Array, norm_weight: Array, key_heads: int, eps: float
    ) -> None: ...

class RecurrentStates:
    def __init__(self, conv: Array, recurrent: Array) -> None: ...

class KeyValuePages:
    def __init__(self, keys: Array, values: Array, key_scales: Array = ..., value_scales: Array = ...) -> None: ...

def gated_delta_net(
    qkvz: Array, ba: Array, weights: DeltaNetWeights, states: RecurrentStates, batch: Batch, out: Array
) -> None: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    q_norm: NormWeight,
    k_norm: NormWeight,
    gated: bool,
    cache: KeyValuePages,
    batch: Batch,
    out: Array,
) -> None: ...
def rms_norm(x: Array, weight: NormWeight, delta: Array | None, out: Array) -> None: ...
def route(
    logits: Array, choices: int, normalize: bool, shared_gate: Array | None, chosen: Array, weights: Array
) -> None: ...
def swiglu(gate: Array, up: Array, out: Array) -> None: ...

class Residual:
    shape: tuple[int, int]
    @overload
    def __init__(self, x: Array) -> None: ...
    @overload
    def __init__(self, weights: Sequence[PackedLinear], rows: Sequence[int]) -> None: ...
    def normalize(self, norm: NormWeight, out: Array) -> None: ...
    def settle(self) -> None: ...

class DraftInput:
    def __init__(self, embedding_norm: NormWeight, hidden_norm: NormWeight, weight: PackedLinear) -> None: ...
    def __call__(self, embedding: Sequence[PackedLinear], tokens: Sequence[int], hidden: Array) -> Residual: ...

class AttentionBlock:
    def __init__(
        self,
        norm: NormWeight,
        q: PackedLinear,
        k: PackedLinear,
        v: PackedLinear,
        q_norm: NormWeight,
        k_norm: NormWeight,
        output: PackedLinear,
        gated: bool,
    ) -> None: ...
    def __call__(self, residual: Residual, cache: KeyValuePages, batch: Batch) -> None: ...
    def remember(self, residual: Residual, cache: KeyValuePages, batch: Batch) -> None: ...

class DeltaNetBlock:
    def __init__(
        self, norm: NormWeight, qkvz: PackedLinear, ba: PackedLinear, weights: DeltaNetWeights, output: PackedLinear
    ) -> None: ...
    def __call__(self, residual: Residual, states: RecurrentStates, batch: Batch) -> None: ...

class SparseBlock:
    def __init__(
        self,
        norm: NormWeight,
        router: PackedLinear,
        shared_gate: PackedLinear,
        experts: PackedExperts,
        choices: int,
        normalize: bool,
    ) -> None: ...
    def __call__(self, residual: Residual) -> None: ...

class DenseBlock:
    def __init__(self, norm: NormWeight, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None: ...
    def __call__(self, residual: Residual) -> None: ...

def start_profile() -> None: ...
def stop_profile() -> list[tuple[str, int, float, float, float]]: ...
