"""What the comparison of formats counts: every byte once."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantization import our_bytes

from tenfold.kernels import cpu
from tenfold.models.packed_file import open_packed
from tenfold.models.quantize import quantize
from tenfold.models.shapes import init_checkpoint


@pytest.mark.skipif(not cpu.available(), reason="packs with the native kernels")
def test_parts_make_up_the_file_and_weights_take_the_bits_of_their_format(tmp_path: Path) -> None:
    init_checkpoint("tiny", tmp_path / "model")
    quantize(tmp_path / "model", "int8", tmp_path / "packed")
    parts, file = our_bytes(tmp_path / "packed"), open_packed(tmp_path / "packed")
    assert parts.total() == sum(entry.nbytes for entries in file.owners.values() for entry in entries)
    vocabulary = 2 * file.config.vocab_size * file.config.hidden_size
    assert parts["vocabulary"] == vocabulary * 17 / 16  # int8, and an fp16 scale for 32
    assert parts["filling"] < 0.05 * parts["layers"]
