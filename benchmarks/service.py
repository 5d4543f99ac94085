"""Servers as processes of their own, and a client that measures what a user of one sees."""

from __future__ import annotations

import atexit
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import httpx
from model_files import say

from tenfold.models.quantize import quantize
from tenfold.models.weights import load_tokenizer
from tenfold.tokenizer import Tokenizer
from tenfold.train.sources import wikitext_documents

Messages = list[dict[str, str]]
NAME = "model"  # that requests ask for
START_S = 600.0  # in which a server must be ready


class Refused(Exception):
    """The server's own words, and the status that they came with; 200 where the answer had begun."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Lost(Exception):
    """An answer that ended without an end."""


class Server:
    """A process that serves OpenAI's chat API; ends with the block."""

    def __init__(self, command: Sequence[str], port: int, log: Path, folder: Path | None = None) -> None:
        """Started in `folder`, or here; waits until it is ready. Raises ValueError where it ends before."""
        self.url = f"http://127.0.0.1:{port}"
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
        atexit.register(self.process.kill)  # it does not outlive this process
        until = time.monotonic() + START_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise ValueError(f"{Path(command[0]).name} did not start; {log} says why")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Lets it end by itself; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def rss_mb(self) -> float:
        """10^6 bytes that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()


def end_servers_on_sigterm() -> None:
    """A benchmark that is told to end does so as by an exception, with the servers that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def serve_tenfold(
    folder: Path, log: Path, options: Mapping[str, object], port: int | None = None, names: Sequence[str] = (NAME,)
) -> Server:
    """`tenfold serve`; options: those of the command, without dashes. names: of the model, that requests ask for."""
    port = port or free_port()
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tenfold", "serve", str(folder), "--port", str(port), "--model-names", *names]
    return Server([*command, *given], port, log)


def serve_llama_cpp(program: Path, gguf: Path, log: Path, threads: int, streams: int, context: int) -> Server:
    """`llama-server` with as many slots as streams, of `context` tokens each, started where its own log may lie."""
    port, count = free_port(), {"-t": threads, "-tb": threads, "-np": streams, "-c": streams * context}
    command = [str(program.resolve()), "-m", str(gguf.resolve()), "--port", str(port), "--jinja"]
    return Server([*command, *(str(word) for pair in count.items() for word in pair)], port, log, log.parent)


def packed_folder(folder: Path, format: str, work: Path) -> Path:
    """The model packed for the kernels, made once, so that servers start at once; bf16 stays as it is."""
    if format == "bf16" or (folder / "model.tenfold").exists():
        return folder
    source = folder.resolve()
    out = work / f"{source.name}-{format}-{crc32(bytes(source)):08x}"  # many a folder is named final
    if not (out / "model.tenfold").exists():
        say(f"writing {out}")
        quantize(str(folder), "int4" if format == "int4" else "int8", out, None, None)
    return out


# ---- a client ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came, and when: seconds of the client's clock."""

    sent: float
    first: float  # text
    end: float
    text: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def first_s(self) -> float:
        return self.first - self.sent

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first."""
        return (self.completion_tokens - 1) / max(self.end - self.first, 1e-9)


def chat_body(messages: Messages, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A request to write exactly so many tokens, likeliest first unless the fields say otherwise."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    choice = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    return {"model": NAME, "messages": messages, **stream, **choice, **fields}


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], hang_up_after: int | None = None) -> Answer | None:
    """The answer to a request for a stream; None where we hung up, after so many events.

    Raises Refused, and Lost where it ended without a word.
    """
    sent = time.perf_counter()
    first, text, finish, usage, events = 0.0, "", "", dict[str, Any](), 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise Refused(response.status_code, _message(response))
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if events == hang_up_after:
                return None
            events += 1
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise Refused(200, str(chunk["error"]["message"]))
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta", {})
                text += delta.get("reasoning_content") or delta.get("content") or ""
                finish = choice.get("finish_reason") or finish
            first = first or (time.perf_counter() if text else 0.0)
    if not finish:
        raise Lost(f"the stream ended after {events} events without a finish")
    end = time.perf_counter()
    return Answer(
        sent=sent,
        first=first or end,
        end=end,
        text=text,
        finish=finish,
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _message(response: httpx.Response) -> str:
    """Raises Lost where a refusal says nothing."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        raise Lost(f"status {response.status_code} without a message: {response.text[:80]!r}") from None


def new_client(server: Server) -> httpx.AsyncClient:
    """Waits as long as it takes."""
    return httpx.AsyncClient(base_url=server.url, timeout=None, limits=httpx.Limits(max_connections=None))


class Texts:
    """Pieces of the embedded text, of about so many tokens, none twice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._documents = iter(wikitext_documents("train"))

    @classmethod
    def of(cls, folder: Path) -> Texts:
        """Raises ValueError where the folder has no tokenizer."""
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise ValueError(f"{folder}: no tokenizer.json, which is needed to write prompts")
        return cls(tokenizer)

    def take(self, tokens: int) -> str:
        return self._tokenizer.decode(self.take_ids(tokens))

    def take_ids(self, tokens: int) -> list[int]:
        while len(self._ids) < tokens:
            self._ids += self._tokenizer.encode(next(self._documents))
        taken, self._ids = self._ids[:tokens], self._ids[tokens:]
        return taken


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
