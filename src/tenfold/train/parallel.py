"""Data parallelism: ranks hold the same model, take their own rows of a batch, and add up gradients and counts."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

BUCKET_ELEMENTS = 2**24  # gradients travel in flat pieces of at most this many numbers


class Ranks:
    """All processes of a run started by `torchrun`, or the only one."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over ranks; x itself when there is one."""
        if self.world > 1:
            x = x.clone()
            distributed.all_reduce(x)
        return x

    def totals(self, *values: float) -> list[float]:
        """The sum over ranks of each number."""
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all ranks, in place. Every rank must have the same ones."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
                _sum_flat(bucket)
                bucket = []
        if bucket:
            _sum_flat(bucket)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            distributed.barrier()

    def close(self) -> None:
        """Leaves the group."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _sum_flat(tensors: list[Tensor]) -> None:
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    for x, summed in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(summed.view_as(x))
