"""In which precision a device multiplies."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` run in: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


@lru_cache(maxsize=8)
def matmul_gflops(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> float:
    """Measured speed of a square matrix product, in GFLOP/s: the best of a few runs, about 0.2 seconds.

    Used as the peak that utilisation is a share of. A device that has no fast path for `dtype` (bf16 on a CPU without
    AVX512-BF16 or AMX) can be a hundred times slower than in fp32, so the size falls until one run is short.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    if size > 128 and min(_seconds(a[:128, :128]) for _ in range(4)) * (size / 128) ** 3 > 1.0:
        return matmul_gflops(dtype, device, size // 2)
    return 2e-9 * size**3 / min(_seconds(a) for _ in range(8))


def _seconds(a: Tensor) -> float:
    begin = time.perf_counter()
    product = a @ a
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - begin


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Whether bf16 products are worth it on this device: measured, at least 1.5 times the speed of fp32."""
    return matmul_gflops(torch.bfloat16, device) > 1.5 * matmul_gflops(torch.float32, device)
