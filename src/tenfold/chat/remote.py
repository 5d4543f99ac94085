"""A model on a server that speaks OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tenfold.chat.backend import Cost, Message, Options
from tenfold.engine.reasoning import Piece

SILENCE = 600.0  # seconds without a byte, after which a server is given up; ours sends heartbeats while it reads
LONGEST_COMPLAINT = 1 << 16  # bytes


class ServerBackend:
    """Asks a server, and hears the answer as it is written."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """Raises ValueError or OSError where there is no such server; without `model` it is the server's first."""
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = api_key
        self.name = model or self._first_model()

    def answer(self, messages: Sequence[Message], options: Options) -> Generator[Piece | Cost, None, None]:
        asked = {name: value for name, value in asdict(options).items() if value is not None}
        body = {"model": self.name, "messages": list(messages), "stream": True, **asked}
        cost, finished = Cost(), False
        with self._open("chat/completions", body | {"stream_options": {"include_usage": True}}) as response:
            for chunk in events(response):
                choice = next(iter(chunk.get("choices") or []), {})
                yield from pieces(choice.get("delta") or {})
                finished = finished or choice.get("finish_reason") is not None
                cost = cost_of(chunk["usage"]) if chunk.get("usage") else cost
        if not finished:
            raise ValueError("the connection ended before the answer did")
        yield cost

    def _first_model(self) -> str:
        with self._open("models") as response:
            try:
                return json.load(response)["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{self._base}: no list of models there; is it a server for chats?") from None

    def _open(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(f"{self._base}/{path}", data, headers), timeout=SILENCE)
        except HTTPError as error:
            raise ValueError(complaint(error)) from None
        except (URLError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"{self._base} cannot be reached ({reason}); is the server running?") from None


def events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events, up to `[DONE]`. Raises ValueError for an error among them."""
    try:
        for line in response:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if chunk.get("error"):
                raise ValueError(chunk["error"].get("message") or "the server failed")
            yield chunk
    except HTTPException as error:
        raise ValueError(f"the connection was lost ({error!r})") from None


def pieces(delta: dict[str, Any]) -> Iterator[Piece]:
    if delta.get("reasoning_content"):
        yield Piece(delta["reasoning_content"], reasoning=True)
    if delta.get("content"):
        yield Piece(delta["content"])


def cost_of(usage: dict[str, Any]) -> Cost:
    read, written = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    accepted, rejected = written.get("accepted_prediction_tokens"), written.get("rejected_prediction_tokens")
    return Cost(
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=read.get("cached_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        drafted_tokens=None if accepted is None or rejected is None else accepted + rejected,
        accepted_tokens=accepted,
    )


def complaint(error: HTTPError) -> str:
    """One line of what the server said."""
    text = error.read(LONGEST_COMPLAINT).decode(errors="replace")
    try:
        told = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        told = error.reason
    wait = error.headers.get("Retry-After")
    hint = "; set TENFOLD_API_KEY" if error.code == 401 else f"; try again in {wait} s" if wait else ""
    return f"{' '.join(str(told).split())} ({error.code}){hint}"
