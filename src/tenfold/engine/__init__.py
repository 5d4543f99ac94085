"""Generation: from a model and a prompt to text."""

from __future__ import annotations

from tenfold.engine.llm import LLM, generate, stream_text
from tenfold.engine.sampler import Sampler, SamplingParams

__all__ = ["LLM", "Sampler", "SamplingParams", "generate", "stream_text"]
