"""The knobs of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `create_app` may be told; `docs/serving.md` has them in a table, with what each costs."""

    model_names: tuple[str, ...] = ()  # that requests may ask for; without them the checkpoint's
    context_length: int = 0  # tokens of prompt and answer together; 0: all that model and memory allow
    temperature: float | None = None  # of requests that give none; without it the checkpoint's, or 1
    top_p: float | None = None  # the same; without it the checkpoint's, or 1
    top_k: int | None = None  # the same; without it the checkpoint's, or 0, which takes all
    max_tokens: int | None = None  # of requests that give none; without it all that the context has room for
    max_choices: int = 64  # answers that one request may ask for, over all of its prompts
    max_body_mb: float = 16.0  # larger ones are refused before they are read
    max_headers: int = 100
    max_header_kb: int = 32  # of the request line and all headers together
    max_connections: int = 1000  # requests that are open at once, those that wait included
    body_seconds: float = 30.0  # for a request to arrive
    send_seconds: float = 60.0  # a client that reads nothing for so long is cut off
    request_seconds: float = 3600.0  # for an answer, from its arrival
    heartbeat_seconds: float = 10.0  # between signs of life in a stream that has nothing to say
    drain_seconds: float = 30.0  # for answers to end once the service is told to stop
    isolate_cache: bool = False  # keys do not share cached prefixes, nor learn by time what others asked
    api_keys: Path | None = None  # file of tenfold keys; without it everyone may ask

    def __post_init__(self) -> None:
        if self.context_length < 0:
            raise ValueError(f"context_length must be 0 or more, got {self.context_length}")
        for name in ("max_choices", "max_headers", "max_header_kb", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_body_mb", "body_seconds", "send_seconds", "request_seconds", "heartbeat_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.drain_seconds < 0:
            raise ValueError(f"drain_seconds must be 0 or more, got {self.drain_seconds}")
