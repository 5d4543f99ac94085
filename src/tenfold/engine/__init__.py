"""Generation: from a model and a prompt to text."""

from __future__ import annotations

from tenfold.engine.llm import LLM, continue_text, generate, stream_text
from tenfold.engine.sampler import Sampler, SamplingParams

__all__ = ["LLM", "Sampler", "SamplingParams", "continue_text", "generate", "stream_text"]
