"""The comparison with the predecessor: how the whole models follow from a few layers and chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predecessor import Options, cases_of, depths_of, make_arm, prefill_seconds
from timing import take_turns

from tenfold.kernels import cpu
from tenfold.models.shapes import SHAPES

if not cpu.available():
    pytest.skip("the native kernels are not built", allow_module_level=True)


@given(st.integers(1, 64), st.integers(2, 6), st.floats(0.1, 10), st.floats(0, 1e-2))
def test_a_cost_that_grows_linearly_is_interpolated_exactly(
    chunks: int, depths: int, fixed: float, slope: float
) -> None:
    options = Options(chunk=128, depths=depths)
    context = chunks * options.chunk
    measured = {depth: fixed + slope * depth for depth in depths_of(context, options)}
    every = sum(fixed + slope * depth for depth in range(0, context, options.chunk))
    assert prefill_seconds(measured, context, options.chunk) == pytest.approx(every)


def test_whole_models_are_layers_times_their_number_and_a_head() -> None:
    options = Options(contexts=(64, 96), chunk=32, depths=2)
    with torch.no_grad():
        measured = cases_of(make_arm("tiny", replace(SHAPES["tiny"], num_hidden_layers=8), 4, options), options)
        cases = [measured.head, *measured.decodes.values(), *measured.prefills.values()]
        take_turns(cases, 1, calls=1)
    head, step = measured.head.seconds[0], measured.decodes[96].seconds[0]
    chunks = [measured.prefills[depth].seconds[0] for depth in (0, 64)]
    assert measured.whole("decode", 96, options) == pytest.approx([2 * step + head])
    assert measured.whole("prefill", 96, options) == pytest.approx([2 * 3 * sum(chunks) / 2 + head])
    assert 0 < measured.decodes[64].nbytes < measured.decodes[96].nbytes
