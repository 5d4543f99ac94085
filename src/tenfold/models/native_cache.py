"""What `NativeModel` remembers of sequences, laid out as the kernels read it: pages of keys and values, and states."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION, LINEAR_ATTENTION

PAGE = 32  # tokens
FIRST_PAGES = 8
KV_FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


class KeyValueMemory:
    """Pages of one attention layer; `arrays` as `cpu.key_value_pages` takes them, `handle` for the kernel."""

    def __init__(self, arrays: Sequence[Tensor]) -> None:
        self.arrays, self.handle = arrays, cpu.key_value_pages(*arrays)


class RecurrentMemory:
    """The states of one Gated DeltaNet layer: conv `[slots, C, W-1]` and recurrent `[slots, HV, V, K]`, fp32."""

    def __init__(self, arrays: Sequence[Tensor]) -> None:
        self.arrays, self.handle = arrays, cpu.recurrent_states(*arrays)


class Blocks:
    """Numbered blocks of memory with a part for each of some owners: pages for layers' heads, slots for layers.

    arrays: `[owners, blocks, ...]`, one for each shape and dtype that an owner's part consists of.
    """

    def __init__(self, owners: int, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._owners, self._parts = owners, parts
        self.block_bytes = owners * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
        self.arrays = [torch.empty(owners, 0, *shape, dtype=dtype) for shape, dtype in parts]
        self.count = 0

    def grow(self, count: int) -> None:
        """Makes room for this many blocks; new ones are zero. Raises MemoryError."""
        larger = [cpu.empty((self._owners, count, *shape), dtype) for shape, dtype in self._parts]
        for old, new in zip(self.arrays, larger, strict=True):
            new[:, : self.count] = old
            new[:, self.count :] = 0
        self.arrays, self.count = larger, count

    def clear(self, block: int) -> None:
        for part in self.arrays:
            part[:, block] = 0

    def copy(self, source: int, target: int) -> None:
        for part in self.arrays:
            part[:, target] = part[:, source]

    def read(self, block: int) -> Tensor:
        """A copy, uint8 `[block_bytes]`."""
        content = torch.empty(self.block_bytes, dtype=torch.uint8)
        for part, held in self._pairs(content, block):
            part.copy_(held)
        return content

    def write(self, block: int, content: Tensor) -> None:
        """Takes what `read` gave. Raises ValueError for another size."""
        if content.dtype != torch.uint8 or content.shape != (self.block_bytes,):
            raise ValueError(
                f"expected uint8 [{self.block_bytes}], got {content.dtype} {list(content.shape)}: "
                "it was read from a model of another shape or kv_format"
            )
        for part, held in self._pairs(content, block):
            held.copy_(part)

    def _pairs(self, content: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
        held = [part[:, block] for part in self.arrays]
        pieces = content.split([part.nbytes for part in held])
        for piece, part in zip(pieces, held, strict=True):
            yield piece.view(part.dtype).view(part.shape), part


class Pool:
    """Memory for many sequences: pages over all attention layers, slots over all recurrent ones.

    drafts: with pages for the module of multi-token prediction, which is the last of `layers`.
    """

    def __init__(self, config: Config, dtype: torch.dtype, drafts: bool) -> None:
        self._kinds = (*config.layer_kinds, *([FULL_ATTENTION] if drafts else []))
        attending, recurring = (self._kinds.count(kind) for kind in (FULL_ATTENTION, LINEAR_ATTENTION))
        self._heads = config.num_key_value_heads
        page = cpu.page_parts(config.head_dim, PAGE, dtype)
        state = [(shape, torch.float32) for shape in config.state_shapes()] if recurring else []
        self.pages, self.states = Blocks(attending * self._heads, page), Blocks(recurring, state)
        self.layers: list[KeyValueMemory | RecurrentMemory] = []

    def grow(self, pages: int, slots: int) -> None:
        """Makes room for so many. Raises MemoryError."""
        if pages > self.pages.count:
            self.pages.grow(pages)
        if slots > self.states.count:
            self.states.grow(slots)
        keys = zip(*(array.split(self._heads) for array in self.pages.arrays), strict=True)
        states = zip(*self.states.arrays, strict=True)
        self.layers = [
            KeyValueMemory(next(keys)) if kind == FULL_ATTENTION else RecurrentMemory(next(states))
            for kind in self._kinds
        ]


class NativeCache:
    """A pool for one sequence, which grows with it. Keys and values are of `dtype`: fp32, fp16, bf16 or int8."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.bfloat16, room: int = 0) -> None:
        """room: tokens that are expected; beyond them it grows by doubling, which copies it."""
        self.length = 0  # tokens seen
        self.pool = Pool(config, dtype, drafts=False)
        self._grow(max(FIRST_PAGES, -(-room // PAGE)))

    def next_batch(self, tokens: int, rotation: cpu.Rotation) -> cpu.Batch:
        """Makes room for the next tokens, and describes them to the kernels."""
        pages = -(-(self.length + tokens) // PAGE)
        if pages > self.pool.pages.count:
            self._grow(max(pages, 2 * self.pool.pages.count))
        return cpu.batch([0, tokens], slots=[0], past=[self.length], pages=[self._table], rotation=rotation)

    def _grow(self, pages: int) -> None:
        self.pool.grow(pages, 1)
        self._table = array("i", range(pages))
