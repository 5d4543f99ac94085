"""What a model remembers of the tokens it has seen: keys and values where it attends, states where it recurs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tenfold.models.qwen3 import Qwen3Config
    from tenfold.models.qwen3_next import Qwen3NextConfig

FULL_ATTENTION, LINEAR_ATTENTION = "full_attention", "linear_attention"


@dataclass
class AttentionMemory:
    """Keys and values `[B, capacity, G, K]`, of which the first `length` are filled; the capacity doubles when full."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds `[B, T, G, K]` of new tokens and returns all keys and values so far."""
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            self.keys, self.values = (_grown(x, max(end, 2 * x.shape[1])) for x in (self.keys, self.values))
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end
        return self.keys[:, :end].to(keys.dtype), self.values[:, :end].to(values.dtype)


@dataclass
class RecurrentMemory:
    """Gated DeltaNet's state: the conv's last inputs `[B, C, W-1]` and the recurrent state `[B, HV, V, K]`, fp32."""

    conv: Tensor
    recurrent: Tensor


class Cache:
    """One memory per layer of either kind, for `batch_size` sequences that advance together."""

    def __init__(
        self,
        config: Qwen3NextConfig | Qwen3Config,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length = 0  # tokens seen
        self.layers: list[AttentionMemory | RecurrentMemory] = []
        for kind in config.layer_kinds:
            if kind == FULL_ATTENTION:
                empty = torch.zeros(
                    batch_size, 0, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device
                )
                self.layers.append(AttentionMemory(empty, empty))
            else:
                conv, recurrent = config.state_shapes()
                self.layers.append(
                    RecurrentMemory(
                        torch.zeros(batch_size, *conv, device=device),
                        torch.zeros(batch_size, *recurrent, device=device),
                    )
                )

    def nbytes(self) -> int:
        """Bytes held now."""
        tensors = [x for layer in self.layers for x in vars(layer).values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors)


def _grown(x: Tensor, capacity: int) -> Tensor:
    larger = x.new_zeros(x.shape[0], capacity, *x.shape[2:])
    larger[:, : x.shape[1]] = x
    return larger
