"""The fields with which requests of all APIs choose how tokens are drawn."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tenfold.engine.sampler import SamplingParams
from tenfold.engine.structure import Structure
from tenfold.server.errors import invalid
from tenfold.server.settings import Settings

N = TypeVar("N", int, float)
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Fields(BaseModel):
    """Values have the type that they should have; fields that nobody here knows are passed over, as the APIs do."""

    model_config = ConfigDict(strict=True, extra="ignore")


class SamplingFields(Fields):
    """What OpenAI's APIs share, and what vLLM's clients add to them."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling(
        self,
        settings: Settings,
        *,
        max_tokens: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        structure: Structure | None = None,
        choice: int = 0,
    ) -> SamplingParams:
        """For the engine; each choice has a seed of its own. Raises ApiError."""
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens or 0,
                temperature=_first(self.temperature, settings.temperature, 1.0),
                top_p=_first(self.top_p, settings.top_p, 1.0),
                top_k=max(0, _first(self.top_k, settings.top_k, 0)),
                min_p=self.min_p or 0.0,
                seed=choice + (secrets.randbits(62) if self.seed is None else self.seed),
                repetition_penalty=self.repetition_penalty or 1.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=_biases(self.logit_bias or {}),
                stop=stops(self.stop),
                ignore_eos=bool(self.ignore_eos),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                structure=structure,
            )
        except ValueError as error:
            raise invalid(str(error)) from None


def _first(asked: N | None, usual: N | None, else_: N) -> N:
    return asked if asked is not None else usual if usual is not None else else_


def stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _biases(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise invalid("logit_bias: the keys are token ids, such as '42'", param="logit_bias") from None
