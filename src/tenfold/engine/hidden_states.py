"""The hidden states at the end of a sequence: the last one, and those that the draft module has not seen."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HiddenStates:
    """They lie in one array: hundreds of tensors, kept one by one, take as long to join as the draft module to read."""

    def __init__(self) -> None:
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._begin = self._end = 0  # of those that wait; the last one stays before the end

    @property
    def waiting(self) -> int:
        """How many the draft module lacks."""
        return self._end - self._begin

    @property
    def last(self) -> Tensor | None:
        """fp32 `[1, D]`, not copied; None before the first."""
        return torch.from_numpy(self._rows[self._end - 1 : self._end]) if self._end else None

    def add(self, hidden: Tensor, wait: bool) -> None:
        """Takes a copy of the next ones, `[T, D]`. wait: for the draft module; else nothing but the last is kept."""
        rows = hidden.numpy()[0 if wait else -1 :]
        if self._begin == self._end:
            self._begin = self._end = 0
        if self._end + len(rows) > len(self._rows):
            self._make_room(rows)
        self._rows[self._end : self._end + len(rows)] = rows
        self._end += len(rows)
        if not wait:
            self._begin = self._end

    def _make_room(self, more: NDArray[np.float32]) -> None:
        kept = self._rows[self._begin : self._end].reshape(-1, more.shape[1])
        self._rows = np.empty((2 * (len(kept) + len(more)), more.shape[1]), np.float32)
        self._rows[: len(kept)] = kept
        self._begin, self._end = 0, len(kept)

    def take(self, keep: int) -> Tensor:
        """All that wait but the last `keep`, which go on waiting: `[T, D]`, not copied, good until the next `add`."""
        end = self._end - keep
        rows = torch.from_numpy(self._rows[self._begin : end])
        self._begin = end
        return rows

    def clear(self) -> None:
        """As before the first."""
        self._begin = self._end = 0
