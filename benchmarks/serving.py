"""`tenfold serve` as its users see it: first tokens, throughput, company, speculation; and beside llama.cpp's server.

    python benchmarks/serving.py --model runs/mid-int4 --llama-server BIN/llama-server --gguf mid-Q4_0.gguf

Each part but mtp runs against server processes of its own, with a client that measures what arrives. All figures to
compare are ratios within one run; medians over the rounds, with the range. Texts are new in every round, so that
nothing is cached but what the part is about.

    conversation  a system prompt of about 4,000 tokens and a question; the second turn; its message edited; another
                  conversation with the same system prompt; a third turn after the server was restarted
    streams       eight short requests at once, over one alone
    company       a short request alone, and while a prompt of 8,000 tokens is read
    mtp           a model that was trained with multi-token prediction, with drafts and without; within this process
    load          multi-turn chats that begin at random times, here and on llama.cpp's server
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import tyro
from model_files import make_folder, say
from service import (
    Answer,
    Messages,
    Server,
    Texts,
    ask,
    chat_body,
    end_servers_on_sigterm,
    message,
    new_client,
    packed_folder,
    serve_llama_cpp,
    serve_tenfold,
)
from timing import duration, machine_lines, print_table, ratio

from tenfold.engine.engine import Engine, EngineSettings
from tenfold.engine.llm import start_native
from tenfold.engine.request import Request
from tenfold.engine.sampler import SamplingParams
from tenfold.kernels import cpu
from tenfold.models.info import describe
from tenfold.models.packed_file import is_packed

Part = Literal["conversation", "streams", "company", "mtp", "load"]
PARTS: tuple[Part, ...] = ("conversation", "streams", "company", "mtp", "load")
QUESTION = 40  # tokens of a short message
SHORT_ANSWER = 16
WARM_UP = 2  # requests before anything counts


@dataclass(frozen=True, kw_only=True)
class Options:
    parts: tuple[Part, ...] = PARTS
    model: Path | None = None  # a folder, packed or not; without it WORK/mid, which is made if need be
    quantization: Literal["int4", "int8", "bf16"] = "int4"  # of a folder that is not packed
    mtp_model: Path | None = None  # for the part mtp; without it the model
    llama_server: Path | None = None  # llama.cpp's server, for the part load
    gguf: Path | None = None  # the same weights for it
    work: Path = Path("runs/serving")
    threads: int = os.cpu_count() or 1
    memory: float = 2.0  # GB for the server's caches
    rounds: int = 2
    prompt: int = 4000  # tokens of the conversation
    long_prompt: int = 8000  # of the company's
    new_tokens: int = 64  # of an answer whose speed counts
    streams: int = 8
    chats: int = 8  # of the load
    turns: int = 3
    chat_s: float = 4.0  # mean time between two chats that begin, and between an answer and the next question
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the parts share."""

    options: Options
    folder: Path
    texts: Texts

    def serve(self, folder: Path | None = None, **more: object) -> Server:
        """A server of the model, with more options of the command, underscores for dashes."""
        options = self.options
        knobs = {"threads": options.threads, "memory": options.memory, "max-batch": max(8, options.streams)}
        knobs |= {name.replace("_", "-"): value for name, value in more.items()}
        return serve_tenfold(folder or self.folder, options.work / "serve.log", knobs)

    def question(self, tokens: int = QUESTION) -> dict[str, str]:
        return message("user", self.texts.take(tokens))


async def say_to(client: httpx.AsyncClient, messages: Messages, tokens: int = SHORT_ANSWER, **fields: object) -> Answer:
    answer = await ask(client, chat_body(messages, tokens, **fields))
    assert answer is not None, "nobody hung up"
    return answer


async def warm_up(bench: Bench, client: httpx.AsyncClient) -> None:
    for _ in range(WARM_UP):
        await say_to(client, [bench.question()])


# ---- conversation --------------------------------------------------------------------------------------------


async def conversation(bench: Bench) -> None:
    """First tokens where the cache has what came before."""
    asked: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory(dir=bench.options.work) as folder:
        for _ in range(bench.options.rounds):
            await _conversation_round(bench, folder, asked)
    cold = asked["turn 1"]
    rows = []
    for name, answers in asked.items():
        firsts = [answer.first_s for answer in answers]
        parts = ratio(firsts, [answer.first_s for answer in cold])
        prompts, cached = answers[-1].prompt_tokens, answers[-1].cached_tokens
        told = "" if name == "turn 1" else f"1/{1 / parts.median:.0f} (1/{1 / parts.high:.0f} at worst)"
        rows.append((name, str(prompts), str(cached), duration(statistics.median(firsts)), told))
    print_table(("conversation", "prompt", "cached", "first token", "of turn 1"), rows, labels=1)


async def _conversation_round(bench: Bench, folder: str, asked: dict[str, list[Answer]]) -> None:
    def note(name: str, answer: Answer) -> dict[str, str]:
        asked.setdefault(name, []).append(answer)
        return message("assistant", answer.text)

    system = message("system", bench.texts.take(bench.options.prompt - QUESTION))
    turns = [system, bench.question()]
    with bench.serve(prefix_cache_dir=folder) as server:
        async with new_client(server) as client:
            await warm_up(bench, client)
            turns.append(note("turn 1", await say_to(client, turns)))
            turns.append(bench.question())
            reply = note("turn 2", await say_to(client, turns))
            note("turn 2, edited", await say_to(client, [*turns[:-1], bench.question()]))
            note("same system prompt", await say_to(client, [system, bench.question()]))
    with bench.serve(prefix_cache_dir=folder) as server:
        async with new_client(server) as client:
            await warm_up(bench, client)
            note("turn 3, restarted", await say_to(client, [*turns, reply, bench.question()]))


# ---- streams -------------------------------------------------------------------------------------------------


async def streams(bench: Bench) -> None:
    """Tokens a second of many requests at once, prompts and all, over those of one."""
    count, alone, together = bench.options.streams, [], []
    with bench.serve() as server:
        async with new_client(server) as client:
            await warm_up(bench, client)
            for _ in range(bench.options.rounds):
                alone.append(await _tokens_a_second(bench, client, 1))
                together.append(await _tokens_a_second(bench, client, count))
    rows = [("1", f"{statistics.median(alone):.1f}", ""), (str(count), f"{statistics.median(together):.1f}", "")]
    rows[1] = (*rows[1][:2], str(ratio(together, alone)))
    print_table(("streams", "tokens/s", "of one"), rows, labels=1)


async def _tokens_a_second(bench: Bench, client: httpx.AsyncClient, count: int) -> float:
    started = time.perf_counter()
    asked = [say_to(client, [bench.question()], bench.options.new_tokens) for _ in range(count)]
    answers = await asyncio.gather(*asked)
    return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - started)


# ---- company -------------------------------------------------------------------------------------------------


async def company(bench: Bench) -> None:
    """First token of a short request, alone and beside a long prompt."""
    alone, beside = [], []
    with bench.serve() as server:
        async with new_client(server) as client:
            await warm_up(bench, client)
            for _ in range(bench.options.rounds):
                alone.append((await say_to(client, [bench.question()])).first_s)
                long = asyncio.create_task(say_to(client, [bench.question(bench.options.long_prompt)]))
                await asyncio.sleep(alone[-1])  # it is being read by now
                beside.append((await say_to(client, [bench.question()])).first_s)
                if long.done():
                    say("company: the long prompt was through before the short one, which says nothing")
                await long
    rows = [("alone", duration(statistics.median(alone)), "")]
    rows.append((f"beside {bench.options.long_prompt}", duration(statistics.median(beside)), str(ratio(beside, alone))))
    print_table(("short request", "first token", "of alone"), rows, labels=1)


# ---- mtp -----------------------------------------------------------------------------------------------------


async def mtp(bench: Bench) -> None:
    """Speed of writing with drafts and without: two engines take turns in this process, without HTTP's own time."""
    options = bench.options
    folder = packed_folder(options.mtp_model or bench.folder, options.quantization, options.work)
    if not describe(folder).mtp_parameters:
        return say(f"mtp: {folder} has no module for multi-token prediction; --mtp-model names one that has")
    cpu.set_threads(options.threads)
    texts, rows = Texts.of(folder), []
    drafting, plain = (Writer(folder, options, drafts) for drafts in (EngineSettings().max_drafts, 0))
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        speeds, before = [], drafting.engine.stats()
        for number in range(8 * options.rounds + 1):  # the first warms up
            prompt = texts.take_ids(4 * QUESTION)
            order = (drafting, plain) if number % 2 else (plain, drafting)
            written = {writer: writer.write(prompt, temperature) for writer in order}
            if written[drafting][0] != written[plain][0]:
                raise ValueError("mtp: drafts have changed an answer")
            speeds.append((written[drafting][1], written[plain][1]))
        fast, slow = zip(*speeds[1:], strict=True)
        after = drafting.engine.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        accepted = (after.accepted_tokens - before.accepted_tokens) / max(1, drafted)
        medians = [f"{statistics.median(values):.0f}" for values in (fast, slow)]
        rows.append((name, *medians, str(ratio(fast, slow)), f"{accepted:.0%} of {drafted}"))
    return print_table(("mtp", "tokens/s with", "without", "with over without", "accepted"), rows, labels=1)


class Writer:
    """An engine of its own, for one request at a time."""

    def __init__(self, folder: Path, options: Options, drafts: int) -> None:
        model, _ = start_native(folder, None if is_packed(folder) else options.quantization)
        settings = EngineSettings(memory_bytes=int(options.memory * 5e8), max_batch=1, max_drafts=drafts)
        self.engine, self._count = Engine(model, settings), 3 * options.new_tokens

    def write(self, prompt: Sequence[int], temperature: float) -> tuple[list[int], float]:
        """The tokens, and how many came a second after the first."""
        params = SamplingParams(max_tokens=self._count, temperature=temperature, ignore_eos=True)
        self.engine.add(Request(prompt_ids=prompt, params=params))
        tokens: list[int] = []
        first, count = 0.0, 0
        while self.engine.has_work:
            tokens += [token for update in self.engine.step() for token in update.tokens]
            if tokens and not first:
                first, count = time.perf_counter(), len(tokens)
        return tokens, (len(tokens) - count) / (time.perf_counter() - first)


# ---- load ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Begins at a time, in seconds; a pause before each question."""

    begins: float
    pauses: Sequence[float]
    system: dict[str, str]
    questions: Sequence[dict[str, str]]


def plan_chats(bench: Bench) -> list[Chat]:
    """The same for all servers: exponential times between arrivals, as those of users that know nothing of another."""
    options, chance = bench.options, random.Random(bench.options.seed)
    systems = [message("system", bench.texts.take(10 * QUESTION)) for _ in range(2)]
    begins, chats = 0.0, []
    for number in range(options.chats):
        pauses = [chance.expovariate(1 / options.chat_s) for _ in range(options.turns - 1)]
        questions = [bench.question(chance.randint(QUESTION, 6 * QUESTION)) for _ in range(options.turns)]
        chats.append(
            Chat(begins=begins, pauses=[0.0, *pauses], system=systems[number % len(systems)], questions=questions)
        )
        begins += chance.expovariate(1 / options.chat_s)
    return chats


async def load(bench: Bench) -> None:
    """The same chats on both servers, one after the other, in turns."""
    options, chats = bench.options, plan_chats(bench)
    starts: dict[str, Callable[[], Server]] = {"tenfold": lambda: bench.serve()}
    if options.llama_server and options.gguf:
        program, gguf = options.llama_server, options.gguf
        log, context = options.work / "llama-server.log", 4096
        starts["llama.cpp"] = lambda: serve_llama_cpp(program, gguf, log, options.threads, options.streams, context)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in starts}
    for number in range(options.rounds):
        for name in list(starts) if number % 2 == 0 else reversed(list(starts)):
            with starts[name]() as server:
                found[name].append(await _run_chats(server, chats, options.new_tokens))
            say(f"load round {number + 1}: {name} is through")
    _report_load(found)


async def _run_chats(server: Server, chats: Sequence[Chat], tokens: int) -> tuple[float, float, float]:
    """Tokens a second, and medians of the first token's time: of first turns, of later ones."""
    async with new_client(server) as client:
        await say_to(client, [message("user", "Hello!")])
        started = time.perf_counter()
        answers = await asyncio.gather(*[_run_chat(client, chat, tokens) for chat in chats])
        seconds = time.perf_counter() - started
    first, later = [turns[0].first_s for turns in answers], [a.first_s for turns in answers for a in turns[1:]]
    written = sum(answer.completion_tokens for turns in answers for answer in turns)
    return written / seconds, statistics.median(first), statistics.median(later or first)


async def _run_chat(client: httpx.AsyncClient, chat: Chat, tokens: int) -> list[Answer]:
    await asyncio.sleep(chat.begins)
    messages, answers = [chat.system], []
    for pause, question in zip(chat.pauses, chat.questions, strict=True):
        await asyncio.sleep(pause)
        messages.append(question)
        answers.append(await say_to(client, messages, tokens))
        messages.append(message("assistant", answers[-1].text))
    return answers


def _report_load(found: dict[str, list[tuple[float, float, float]]]) -> None:
    ours = list(zip(*found["tenfold"], strict=True))
    rows = []
    for name, turns in found.items():
        speed, first, later = zip(*turns, strict=True)
        medians = [statistics.median(values) for values in (speed, first, later)]
        row = [name, f"{medians[0]:.1f}", duration(medians[1]), duration(medians[2])]
        rows.append(
            (
                *row,
                *(
                    [""] * 3
                    if name == "tenfold"
                    else [str(ratio(*pair)) for pair in zip(ours, (speed, first, later), strict=True)]
                ),
            )
        )
    header = ("load", "tokens/s", "first token", "in later turns", "tenfold over it", "first token", "in later turns")
    print_table(header, rows, labels=1)


# ---- all of them ---------------------------------------------------------------------------------------------


RUNS: dict[Part, Callable[[Bench], Coroutine[None, None, None]]] = {
    "conversation": conversation,
    "streams": streams,
    "company": company,
    "mtp": mtp,
    "load": load,
}


def run(options: Options) -> None:
    """The parts, one after the other."""
    cpu.require()
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.model or options.work / "mid"
    make_folder(source, "mid")
    folder = packed_folder(source, options.quantization, options.work)
    print(f"{machine_lines(options.threads)}; {folder}", flush=True)
    bench = Bench(options=options, folder=folder, texts=Texts.of(folder))
    for part in options.parts:
        started = time.perf_counter()
        asyncio.run(RUNS[part](bench))
        say(f"{part} took {time.perf_counter() - started:.0f} s")


def main() -> None:
    end_servers_on_sigterm()
    try:
        run(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"serving: error: {error}")


if __name__ == "__main__":
    main()
