"""What `NativeModel` remembers of a sequence, laid out as the kernels read it: pages of keys and values, and states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tenfold.kernels import cpu
from tenfold.models import Config
from tenfold.models.cache import FULL_ATTENTION

PAGE = 32  # tokens
FIRST_PAGES = 8


class KeyValueMemory:
    """Pages of one attention layer; `arrays` as `cpu.empty_pages` makes them, `handle` for the kernel."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._shape = heads, head_dim, PAGE, dtype
        self._place(cpu.empty_pages(FIRST_PAGES, *self._shape))

    def _place(self, arrays: tuple[Tensor, ...]) -> None:
        self.arrays, self.handle = arrays, cpu.key_value_pages(*arrays)

    def reserve(self, pages: int) -> None:
        """Makes room for this many pages; the room at least doubles, so that few tokens are copied often."""
        held = len(self.arrays[0])
        if pages > held:
            more = cpu.empty_pages(max(pages - held, held), *self._shape)
            self._place(tuple(torch.cat(pair) for pair in zip(self.arrays, more, strict=True)))


class RecurrentMemory:
    """The states of one Gated DeltaNet layer: conv `[1, C, W-1]` and recurrent `[1, HV, V, K]`, fp32."""

    def __init__(self, conv: tuple[int, ...], recurrent: tuple[int, ...]) -> None:
        self.arrays = torch.zeros(1, *conv), torch.zeros(1, *recurrent)
        self.handle = cpu.recurrent_states(*self.arrays)


class NativeCache:
    """One memory per layer, for one sequence. Keys and values are of `dtype`: fp32, fp16, bf16 or int8."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float16) -> None:
        self.length = 0  # tokens seen
        self.layers: list[KeyValueMemory | RecurrentMemory] = [
            KeyValueMemory(config.num_key_value_heads, config.head_dim, dtype)
            if kind == FULL_ATTENTION
            else RecurrentMemory(*config.state_shapes())
            for kind in config.layer_kinds
        ]

    def next_batch(self, tokens: int, rotation: tuple[Tensor, Tensor]) -> cpu.Batch:
        """Makes room for the next tokens, whose cos and sin these are `[T, R/2]`, and describes them to the kernels."""
        pages = -(-(self.length + tokens) // PAGE)
        for layer in self.layers:
            if isinstance(layer, KeyValueMemory):
                layer.reserve(pages)
        return cpu.batch([0, tokens], slots=[0], past=[self.length], pages=[range(pages)], rotation=rotation)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, layer by layer."""
        for layer in self.layers:
            yield from layer.arrays
