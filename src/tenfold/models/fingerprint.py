"""Tells packed weights apart at little cost: what is cached for one model must not be taken up by another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from tenfold.models import Config

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tenfold.models.packing import Packed

SAMPLES, SAMPLE_BYTES = 16, 64  # of each array: few, since weights may lie in a file that nobody has read yet


def weights_digest(config: Config, owners: Mapping[str, Packed]) -> str:
    """Of the configuration, and of every array's name, format, shape and samples of its bytes."""
    digest = hashlib.sha256(repr(config).encode())
    for owner in sorted(owners):
        for description, content in sorted(_arrays(owners[owner]), key=lambda array: array[0]):
            digest.update(f"{owner} {description} {content.size}".encode())
            for start in np.linspace(0, max(0, content.size - SAMPLE_BYTES), SAMPLES, dtype=np.int64).tolist():
                digest.update(content[start : start + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


def _arrays(packed: Packed) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for name, matrix in packed.matrices.items():
        yield f"{name} {matrix.format} {matrix.shape}", matrix.bytes
    for name, tensor in packed.tensors.items():
        yield f"{name} {tensor.dtype} {list(tensor.shape)}", tensor.contiguous().view(-1).view(torch.uint8).numpy()
    if packed.experts:
        yield f"experts {packed.experts.format} {packed.experts.shape}", packed.experts.bytes
