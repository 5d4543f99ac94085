"""The tests' own ground: memory that was never written is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unwritten_floats_are_nan(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    unwritten: list[Tensor] = [torch.empty(2, 3, dtype=dtype), torch.empty_like(like), like.new_empty(2, 3)]
    unwritten += [like.T.new_empty(3, 2).T, torch.empty_strided((2, 3), (1, 2), dtype=dtype)]
    assert all(x.isnan().all() for x in unwritten)


def test_unwritten_integers_are_the_largest() -> None:
    assert torch.empty(3, dtype=torch.int64).eq(2**63 - 1).all()


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1
