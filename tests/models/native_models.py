"""What tests of the native model share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tenfold.kernels import cpu
from tenfold.models import Config, Model
from tenfold.models.qwen3 import Qwen3
from tenfold.models.qwen3_next import Qwen3Next, Qwen3NextConfig


@pytest.fixture(autouse=True)
def one_native_thread() -> Iterator[None]:
    before = cpu.threads()
    cpu.set_threads(1)
    yield
    cpu.set_threads(before)


def new_model(config: Config) -> Model:
    """Weights as a bf16 checkpoint holds them, in fp32; norms and gates away from where they start."""
    model = Qwen3Next(config) if isinstance(config, Qwen3NextConfig) else Qwen3(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()
