"""A hard time for `tenfold serve`: twice as many clients as it has places, who hang up, send garbage, and kill it.

    python benchmarks/soak.py --minutes 10

Clients chat over a few shared prefixes, hang up anywhere, and send what is no request. Halfway the server is killed
(SIGKILL) and started again on the same folder of cached prefixes. It passes if every request that was sent whole is
answered, or refused with a reason (but for those that the kill met); if memory does not grow; if the server ends well
when told to; and if answers of the hard time are those of a fresh server without any cache. Exit code 1 if not.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro
from model_files import make_folder
from service import (
    Lost,
    Refused,
    Server,
    Texts,
    ask,
    chat_body,
    end_servers_on_sigterm,
    free_port,
    message,
    new_client,
    packed_folder,
    serve_tenfold,
)
from timing import print_table

BATCH, QUEUE = 4, 4  # the server's places
CLIENTS = 2 * (BATCH + QUEUE)
KEPT = 40  # answers to compare with cold ones
GROWTH = 1.10  # of memory, from the second quarter of a server's life to the last; the first warms up
GARBAGE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"model": "model", "messages": 3}',
    b'{"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": -5}',
    b'{"model": "model", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "model", "messages": [{"role": "user", "content": "' + b"word " * 200_000 + b'"}]}',
    b'{"model": "model", "messages": [{"role": "user", "content": "x"}], "guided_regex": "(((("}',
)


@dataclass(frozen=True, kw_only=True)
class Options:
    minutes: float = 10.0
    model: Path | None = None  # a folder; without it WORK/tiny, which is made if need be
    work: Path = Path("runs/soak")
    seed: int = 0


@dataclass(kw_only=True)
class Record:
    """What became of all requests."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    answers: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # requests, and the texts that came
    cached_tokens: int = 0
    rss_mb: list[list[float]] = field(default_factory=list)  # of each server, by the second
    killed: bool = False  # the server is gone or not yet back


class Soak:
    """The clients, the server, and who watches both."""

    def __init__(self, folder: Path, options: Options, cache: Path) -> None:
        self.folder, self.options, self.cache = folder, options, cache
        self.record, self.chance = Record(), random.Random(options.seed)
        texts = Texts.of(folder)
        self.prefixes = [texts.take(length) for length in (100, 400, 900, 1500)]
        self.questions = [texts.take(12) for _ in range(60)]
        self.port = free_port()
        self.until = time.monotonic() + 60 * options.minutes

    def serve(self) -> Server:
        knobs = {"max-batch": BATCH, "max-queue": QUEUE, "memory": 0.1, "prefix-cache-dir": self.cache}
        knobs |= {"prefix-cache-gb": 0.3, "send-seconds": 20}
        self.record.rss_mb.append([])
        return serve_tenfold(self.folder, self.options.work / "serve.log", knobs, self.port)

    async def run(self) -> None:
        """All of it; what went wrong is in the record."""
        server = await asyncio.to_thread(self.serve)
        clients = [asyncio.create_task(self.client(server.url, random.Random(number))) for number in range(CLIENTS)]
        halfway = (time.monotonic() + self.until) / 2
        await self.watch(server, halfway)
        self.record.killed = True
        server.process.kill()
        server.process.wait()
        server = await asyncio.to_thread(self.serve)
        self.record.killed = False
        await self.watch(server, self.until)
        await asyncio.gather(*clients)
        await self.compare(server, "warm")
        if code := await asyncio.to_thread(server.stop):
            self.record.faults.append(f"the server ended with {code}")
        with serve_tenfold(self.folder, self.options.work / "serve.log", {"memory": 0.1}) as cold:
            await self.compare(cold, "cold")

    async def watch(self, server: Server, until: float) -> None:
        """Notes the server's memory until then; ValueError where it ends by itself."""
        while time.monotonic() < until:
            if server.process.poll() is not None:
                raise ValueError(f"the server ended by itself; {self.options.work / 'serve.log'} may say why")
            self.record.rss_mb[-1].append(server.rss_mb())
            await asyncio.sleep(1)

    # ---- clients

    async def client(self, url: str, chance: random.Random) -> None:
        """One request after the other."""
        async with client_of(url) as http:
            while time.monotonic() < self.until:
                began_killed = self.record.killed
                try:
                    end = await self.act(http, chance)
                except Refused as refused:
                    end = f"refused, {refused.status}"
                    if refused.status >= 500:
                        self.record.faults.append(str(refused))
                    await asyncio.sleep(chance.random() / 4)
                except (Lost, httpx.TransportError) as error:
                    await asyncio.sleep(0.5)
                    met = began_killed or self.record.killed
                    end = "met by the kill" if met else "lost"
                    if not met:
                        self.record.faults.append(f"lost: {type(error).__name__}: {error}")
                self.record.ends[end] += 1

    async def act(self, http: httpx.AsyncClient, chance: random.Random) -> str:
        """Does something, good or bad; how that ended."""
        kind = chance.random()
        if kind < 0.15:
            return await self.send_garbage(http, chance)
        body = self.request(chance)
        if kind < 0.2:
            return await self.vanish(http.base_url, body)
        answer = await ask(http, body, chance.randrange(20) if kind < 0.4 else None)
        if answer is None:
            return "hung up"
        self.record.cached_tokens += answer.cached_tokens
        self.keep(body, answer.text)
        return "answered"

    def request(self, chance: random.Random) -> dict[str, Any]:
        """A conversation that others begin with as well."""
        turns = [message("system", chance.choice(self.prefixes))]
        for _ in range(chance.randrange(3)):
            turns += [message("user", chance.choice(self.questions[:3])), message("assistant", self.questions[3])]
        turns.append(message("user", chance.choice(self.questions)))
        temperature, seed = chance.choice((0.0, 0.8)), chance.randrange(5)
        return chat_body(turns, chance.randint(1, 60), temperature=temperature, seed=seed)

    def keep(self, body: dict[str, Any], text: str) -> None:
        """A fair sample of all answers (reservoir)."""
        number = self.record.ends["answered"]
        place = number if number < KEPT else self.chance.randrange(number + 1)
        if place < KEPT:
            self.record.answers[place : place + 1] = [(body, text)]

    async def send_garbage(self, http: httpx.AsyncClient, chance: random.Random) -> str:
        """It has to be refused, with words."""
        content = chance.choice(GARBAGE)
        response = await http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        if not 400 <= response.status_code < 500 or "message" not in response.text:
            self.record.faults.append(f"garbage {content[:40]!r} got {response.status_code} {response.text[:80]!r}")
        return f"garbage, {response.status_code}"

    async def vanish(self, url: httpx.URL, body: dict[str, Any]) -> str:
        """Sends a request and closes the connection before the answer, at once or a little later. A client that is
        cancelled may lose a connection of its pool for good, so this one is used for nothing else."""
        async with client_of(url) as http:
            with_reader = asyncio.create_task(ask(http, body))
            await asyncio.sleep(self.chance.random() / 10)
            with_reader.cancel()
            await asyncio.gather(with_reader, return_exceptions=True)
        return "vanished"

    # ---- afterwards

    async def compare(self, server: Server, name: str) -> None:
        """The kept requests once more."""
        async with new_client(server) as http:
            for body, text in self.record.answers:
                answer = await ask(http, body)
                if answer is None or answer.text != text:
                    self.record.faults.append(f"another answer from the {name} server: {answer and answer.text[:60]!r}")
        self.record.ends[f"asked again, {name}"] = len(self.record.answers)


def client_of(url: httpx.URL | str) -> httpx.AsyncClient:
    """It waits as long as it takes, but not for a connection: those are its own."""
    timeout = httpx.Timeout(None, pool=60)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=httpx.Limits(max_connections=4))


def growth(rss: Sequence[float]) -> float:
    """Memory in the last quarter of a server's life, over that in its second."""
    quarter = len(rss) // 4
    if not quarter:
        return 1.0
    return statistics.median(rss[-quarter:]) / statistics.median(rss[quarter : 2 * quarter])


def report(record: Record) -> list[str]:
    """Prints what became of everything; the faults."""
    print_table(("requests", "number"), [(end, str(count)) for end, count in sorted(record.ends.items())], labels=1)
    faults = list(record.faults)
    for number, rss in enumerate(record.rss_mb, 1):
        grown = growth(rss)
        print(
            f"server {number}: memory {min(rss):.0f} to {max(rss):.0f} MB in {len(rss)} s, "
            f"its last quarter {grown:.3f} of its second"
        )
        if grown > GROWTH:
            faults.append(f"server {number}: its memory grew by {grown - 1:.0%}")
    print(f"tokens of prompts that came from the cache: {record.cached_tokens:,}")
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return faults


def main() -> None:
    end_servers_on_sigterm()
    options = tyro.cli(Options, description=__doc__)
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.model or options.work / "tiny"
    try:
        make_folder(source, "tiny")
        folder = packed_folder(source, "int8", options.work)
        with tempfile.TemporaryDirectory(dir=options.work) as cache:
            soak = Soak(folder, options, Path(cache))
            asyncio.run(soak.run())
    except (ValueError, OSError) as error:
        sys.exit(f"soak: error: {error}")
    sys.exit(1 if report(soak.record) else 0)


if __name__ == "__main__":
    main()
