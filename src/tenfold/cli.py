"""The command `tenfold`: parses, calls one component, and tells mistakes in one line.

A command parses its arguments into something to run. Its imports wait until it is chosen, so that
`tenfold --help` and a mistyped command answer at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol, TypeVar

import tyro
from tyro.conf import Positional, arg

from tenfold import __version__, config

if TYPE_CHECKING:
    from tenfold.chat.backend import ChatBackend
    from tenfold.models.quantize import Text
    from tenfold.tokenizer import Tokenizer

Run = Callable[[], None]
T = TypeVar("T")
Shape = Literal["tiny", "mid", "80b-a3b"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["bf16", "int8", "int4"]
KvFormat = Literal["fp32", "fp16", "bf16", "int8"]
Inputs = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="INPUT...", help="files, folders, globs, wikitext-2", help_behavior_hint="(required)"),
]
GROUPS = ("data", "keys")  # commands of two words
INTERRUPTED, BROKEN_PIPE, MISTAKE = 130, 141, 2  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code. TENFOLD_TRACEBACK=1 shows where an error came from."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to stop
    try:
        parse(sys.argv[1:] if argv is None else argv)()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ntenfold: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return BROKEN_PIPE
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        complaint = explain(error)
        if complaint is None or os.environ.get("TENFOLD_TRACEBACK") == "1":
            raise
        print(f"tenfold: error: {complaint}", file=sys.stderr)
        return MISTAKE
    return 0


def parse(args: Sequence[str]) -> Run:
    """What a command line asks for, ready to run. Raises ValueError, or SystemExit after tyro told why."""
    for words in (1, 2):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return COMMANDS[name].parse(args[words:])
    if not set(args[:2]) - {*GROUPS, "-h", "--help"}:
        return partial(print, overview())
    if args[0] == "--version":
        return partial(print, f"tenfold {__version__}")
    name = " ".join(args[: 1 + (args[0] in GROUPS)])
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "tenfold --help lists them all"
    raise ValueError(f"unknown command {name!r}; {hint}")


def overview() -> str:
    """The top-level help."""
    commands = "\n".join(f"  {name:<16} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: tenfold COMMAND [OPTIONS]\n\n"
        "Pretrain, compare and run Qwen3-Next language models, on the machine at hand.\n\n"
        f"{commands}\n\ntenfold COMMAND --help tells its options."
    )


def explain(error: Exception) -> str | None:
    """One line for an error that a user can cause; None for one that is ours."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or any(words in text for words in ("out of memory", "allocate memory")):
        return f"out of memory; use a smaller model, batch or dtype ({text[:120] or 'no memory left'})"
    return None if isinstance(error, RuntimeError) else text


class Runnable(Protocol):
    """A command's options, as a dataclass."""

    def run(self) -> None: ...


# ---- commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, with a trained or a released model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # checkpoint folder, GGUF file, or a name on the hub
    prompt: str  # text to continue, or to answer with --chat
    max_tokens: int = 200  # stop after this many
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_p: float = 0.95  # sample from the likeliest tokens that make up this probability
    seed: int = 0  # the same seed gives the same text
    chat: bool = False  # put the prompt through the chat template, for models trained to converse
    dtype: Dtype = "float32"  # of the weights in memory; auto is what the checkpoint holds
    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    quantization: Quantization | None = None  # run on the native kernels, with weights packed so

    def run(self) -> None:
        from tenfold.engine.llm import LLM, SamplingParams, generate, stream_text

        self.check()
        params = SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
        llm = LLM.load(self.model, self.dtype, self.device, self.quantization)
        params = replace(params, stop_ids=llm.tokenizer.stop_ids)
        prompt_ids = self.prompt_ids(llm.tokenizer)
        if not self.chat:
            print(self.prompt, end="", flush=True)
        tokens = Counted(generate(llm.model, prompt_ids, params))
        started = time.perf_counter()
        for text in stream_text(llm.tokenizer, tokens):
            print(text, end="", flush=True)
        seconds = time.perf_counter() - started
        print(flush=True)
        told = f"{len(prompt_ids)} tokens read, {tokens.count} written in {seconds:.1f} s"
        print(f"({told}, {tokens.count / seconds:.1f} tokens/s)", file=sys.stderr)

    def check(self) -> None:
        """Raises ValueError for what would only be found out after the model has been read."""
        check_place(self.device, self.dtype, self.quantization)
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--prompt: not UTF-8 at character {error.start}") from None

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt as tokens; an empty one begins a new document."""
        if not self.chat:
            return tokenizer.encode(self.prompt) or [tokenizer.eos_id]
        return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": self.prompt}]))


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model, here or on a server."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # as for generate, or a server: http://localhost:8000
    system: str = ""  # prompt that every conversation begins with
    max_tokens: int | None = None  # of an answer; without it as many as there is room for
    temperature: float | None = None  # 0 always takes the likeliest token
    top_p: float | None = None  # sample from the likeliest tokens that make up this probability
    seed: int | None = None  # the same seed gives the same answers
    dtype: Dtype | None = None  # run on torch, with weights of this type; without it on the native kernels
    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    quantization: Quantization | None = None  # run on the native kernels, with weights packed so

    def run(self) -> None:
        from tenfold.chat.backend import Options
        from tenfold.chat.conversation import Conversation
        from tenfold.chat.terminal import Session

        options = Options(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        Session(self.backend(), options, Conversation(self.system)).run()

    def backend(self) -> ChatBackend:
        """A server by its address, or a model in this process."""
        if self.model.startswith(("http://", "https://")):
            from tenfold.chat.remote import ServerBackend

            return ServerBackend(self.model, os.environ.get("TENFOLD_API_KEY"))
        from tenfold.chat.local import open_local

        check_place(self.device, self.dtype or "float32", self.quantization)
        return open_local(self.model, self.dtype, self.device, self.quantization)


def check_place(device: str, dtype: str, quantization: str | None) -> None:
    """Raises ValueError for what would only be found out after the model has been read."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU, or is a build for CPUs only")
    if quantization and (device != "cpu" or dtype != "float32"):
        raise ValueError("--quantization is for the native kernels of the CPU, and takes the place of --dtype")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast a model runs here on the native kernels."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # checkpoint folder, GGUF file, or a name on the hub
    quantization: Quantization | None = None  # how the weights are packed: bf16, or as a packed folder has them
    prompt_tokens: int = 512  # that are read at once
    new_tokens: int = 64  # that follow one by one
    threads: int | None = None  # of the kernels; without it one per core
    rounds: int = 5  # after one to warm up
    profile: bool = False  # tell where the time goes, kernel by kernel
    kv_format: KvFormat = "bf16"  # of keys and values
    json: bool = False  # for programs

    def run(self) -> None:
        from rich.console import Console

        from tenfold.engine.bench import bench

        counts = (self.prompt_tokens, self.new_tokens, self.threads, self.rounds)
        result = bench(self.model, self.quantization, *counts, self.kv_format, self.profile)
        if self.json:
            print(json.dumps(asdict(result), indent=2))
        else:
            Console().print(result.table(), *(profile.table() for profile in result.profiles))


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Pack a model's weights for the native kernels, once and for all."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # checkpoint folder, GGUF file, or a name on the hub
    to: Literal["int8", "int4"]  # format of the large matrices; the sensitive ones stay at 8 bits or more
    out: Path | None = None  # folder to write; without it NAME-FORMAT, beside a model on this machine
    calibration: str | None = None  # weigh int4's errors by what this text sends through: wikitext-2, or a file
    calibration_tokens: int = 16_384  # of it
    test_tokens: int = 4096  # of the embedded test text, to compare with the original on; 0 leaves that out
    json: bool = False  # for programs

    def run(self) -> None:
        from rich.console import Console

        from tenfold.models.quantize import quantize

        test, calibration = self.texts()
        try:
            report = quantize(self.model, self.to, self.out, test, calibration)
        except KeyboardInterrupt:
            print("\ntenfold: the same command goes on from here", file=sys.stderr)
            raise
        if self.json:
            print(json.dumps(asdict(report), indent=2))
        else:
            Console().print(report.tables())

    def texts(self) -> tuple[Text | None, Text | None]:
        """What to measure on, and what to calibrate with. Raises ValueError for counts that make no sense."""
        from tenfold.models.quantize import Text
        from tenfold.train.sources import Form, find_inputs, plan_spans, read_documents, wikitext_documents

        if self.test_tokens < 0 or self.calibration_tokens < 2:
            raise ValueError("--test-tokens must be 0 or more, --calibration-tokens 2 or more")
        test = Text(name="WikiText-2", documents=wikitext_documents("test"), tokens=self.test_tokens)
        if self.calibration is None:
            return (test if self.test_tokens else None), None
        form = Form("text", None)
        spans = plan_spans(find_inputs([self.calibration]), form)
        texts = (d.text for span in spans for d in read_documents(span, form) if d.split in (None, "train"))
        calibration = Text(name=self.calibration, documents=texts, tokens=self.calibration_tokens)
        return (test if self.test_tokens else None), calibration


class Counted:
    """Passes tokens on and counts them."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self.tokens, self.count = tokens, 0

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.count += 1
            yield token


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a checkpoint, its shape, parameters and files, and what this machine can run it with."""

    model: Annotated[Positional[Path | None], arg(metavar="[MODEL]")] = None  # checkpoint folder, or GGUF file
    verify: bool = False  # read the weights of a packed folder, and compare their checksums
    json: bool = False  # for programs

    def run(self) -> None:
        from rich.console import Console

        from tenfold.kernels import cpu
        from tenfold.models.info import describe
        from tenfold.models.packed_file import verify

        if self.verify:
            if self.model is None:
                raise ValueError("--verify needs a MODEL, the packed folder to read")
            verify(self.model, progress=True)
        info, kernels = self.model and describe(self.model), cpu.isa() if cpu.available() else None
        if self.json:
            print(json.dumps((asdict(info) if info else {}) | {"kernels": kernels}, indent=2))
            return
        if info:
            Console().print(info.table())
        print(f"native kernels: {kernels or 'none, torch runs instead'}")
        if self.verify:
            print("checksums: all weights are as they were written")


@dataclass(frozen=True, kw_only=True)
class Init:
    """Write a model of a known shape with random weights."""

    out: Path  # folder to write
    shape: Shape = "tiny"  # 10 million parameters, 2.5 billion, or the released 80 billion
    seed: int = 0  # the same seed gives the same weights
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights in the files

    def run(self) -> None:
        from tenfold.models.shapes import init_checkpoint

        init_checkpoint(self.shape, self.out, self.seed, self.dtype)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Learn a byte-level BPE tokenizer from text."""

    inputs: Inputs
    out: Path  # folder to write
    vocab_size: int = 4096  # tokens, the 259 that every tokenizer has included
    field: str = "text"  # of JSON lines and Parquet files that holds the text
    separator: str | None = None  # the line between two documents of a text file

    def run(self) -> None:
        from rich.console import Console
        from rich.progress import track

        from tenfold.tokenizer import Tokenizer
        from tenfold.train.sources import Form, find_inputs, plan_spans, read_documents

        if (self.out / "tokenizer.json").exists():
            raise ValueError(f"{self.out}: there is a tokenizer already; delete it, or choose another folder")
        form = Form(self.field, self.separator)
        spans = plan_spans(find_inputs(self.inputs), form)
        spans = track(spans, "reading", console=Console(stderr=True), transient=True)
        texts = (d.text for span in spans for d in read_documents(span, form) if d.split in (None, "train"))
        tokenizer = Tokenizer.train(texts, self.vocab_size)
        tokenizer.save(self.out)
        print(f"{self.out}: {tokenizer.vocab_size:,} tokens")


@dataclass(frozen=True, kw_only=True)
class KeysAdd:
    """Make an API key for the service, which is shown this once."""

    name: Annotated[Positional[str], arg(metavar="NAME")]  # whose it is
    api_keys: Path | None = None  # file of keys; without it the one of this user
    requests_per_minute: int | None = None  # without it as many as they like
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrency: int | None = None  # requests at once

    def run(self) -> None:
        from tenfold.server import keys

        created = datetime.now(UTC).isoformat(timespec="seconds")
        key = keys.Key(
            name=self.name,
            created=created,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrency=self.concurrency,
        )
        print(keys.add(self.api_keys or keys.default_path(), key))


@dataclass(frozen=True, kw_only=True)
class KeysList:
    """List the API keys of the service, of which only names and limits are known."""

    api_keys: Path | None = None  # file of keys; without it the one of this user

    def run(self) -> None:
        from tenfold.server import keys

        for key in keys.KeyFile.read(self.api_keys or keys.default_path()).keys:
            limits = [f"{value} {name}" for name, value in asdict(key).items() if isinstance(value, int)]
            print(f"{key.name:<24} {key.created}  {', '.join(limits).replace('_', ' ')}".rstrip())


@dataclass(frozen=True, kw_only=True)
class KeysRevoke:
    """Take an API key away; services that run notice at once."""

    name: Annotated[Positional[str], arg(metavar="NAME")]  # as it was given to keys add
    api_keys: Path | None = None  # file of keys; without it the one of this user

    def run(self) -> None:
        from tenfold.server import keys

        keys.revoke(self.api_keys or keys.default_path(), self.name)


def parse_build(args: Sequence[str]) -> Run:
    """`tenfold data build INPUT... --out DIR`, with the fields of CorpusConfig as options."""
    from rich.console import Console

    from tenfold.train.corpus import CorpusConfig, build_corpus

    kind = make_dataclass(
        "Build",
        [
            ("inputs", Inputs),
            ("out", Annotated[Path, arg(help="folder to write")]),
            ("config", Annotated[CorpusConfig, arg(name="")]),
            ("workers", Annotated[int | None, arg(help="processes; one per core without it")], None),
        ],
    )
    chosen = parse_options(kind, args, "data build", COMMANDS["data build"].summary)

    def run() -> None:
        screen = Console(stderr=True)
        index = build_corpus(chosen.inputs, chosen.out, chosen.config, workers=chosen.workers, console=screen)
        for name, split in index.splits.items():
            print(f"{chosen.out}: {name:<10} {split.tokens:>14,} tokens in {split.documents:,} documents")

    return run


def parse_train(args: Sequence[str]) -> Run:
    """`tenfold train RECIPE [--resume] [--section.key value ...]`: options override what the recipe says."""
    recipe = Path(args[0]) if args and not args[0].startswith("-") else None
    if recipe is None and not {"-h", "--help"} & set(args):
        raise ValueError("the recipe comes first: tenfold train RECIPE.toml [OPTIONS]")
    from tenfold.train.recipe import TrainConfig

    defaults = config.load_toml(TrainConfig, recipe) if recipe else TrainConfig()
    kind = make_dataclass(
        "Train",
        [
            ("resume", Annotated[bool, arg(help="go on from the last checkpoint")], False),
            ("resume_step", Annotated[int | None, arg(help="go on from the checkpoint of this step")], None),
            ("config", Annotated[TrainConfig, arg(name="")], field(default=defaults)),
        ],
    )
    chosen = parse_options(kind, args[recipe is not None :], "train RECIPE", COMMANDS["train"].summary)

    def run() -> None:
        from tenfold.engine.llm import continue_text
        from tenfold.train.trainer import train

        final = train(chosen.config, chosen.resume, chosen.resume_step, continue_text)
        print(f"{final}: the trained model; tenfold generate {final} --prompt TEXT lets it write")

    return run


def parse_serve(args: Sequence[str]) -> Run:
    """`tenfold serve MODEL`, with the fields of EngineOptions and Settings as options."""
    from tenfold.server.launch import EngineOptions, launch
    from tenfold.server.settings import Settings

    kind = make_dataclass(
        "Serve",
        [
            (
                "model",
                Annotated[Positional[str], arg(metavar="MODEL", help="checkpoint folder, GGUF file, or hub name")],
            ),
            ("host", Annotated[str, arg(help="address to listen on; 0.0.0.0 is all of them")], "127.0.0.1"),
            ("port", Annotated[int, arg(help="0 takes any that is free")], 8000),
            ("engine", Annotated[EngineOptions, arg(name="")], EngineOptions()),
            ("settings", Annotated[Settings, arg(name="")], Settings()),
        ],
    )
    chosen = parse_options(kind, args, "serve", COMMANDS["serve"].summary)
    return partial(launch, chosen.model, chosen.host, chosen.port, chosen.engine, chosen.settings)


def parse_demo(args: Sequence[str]) -> Run:
    """`tenfold demo`, with the fields of DemoConfig as options."""
    from tenfold.engine.llm import continue_text
    from tenfold.study.twins import DemoConfig, run_demo

    return partial(run_demo, parse_options(DemoConfig, args, "demo", COMMANDS["demo"].summary), continue_text)


# ---- the list of them --------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A line of the overview, and how to parse the arguments."""

    summary: str
    parse: Callable[[Sequence[str]], Run]


def parse_options(kind: type[T], args: Sequence[str], name: str, summary: str) -> T:
    """The options of a command as an instance of their dataclass."""
    return tyro.cli(kind, args=args, prog=f"tenfold {name}", description=f"{summary}.")


def command(kind: type[Runnable], name: str) -> Command:
    """A command whose options are the fields of a dataclass, and whose summary is its docstring."""
    summary = (kind.__doc__ or "").rstrip(".")
    return Command(summary, lambda args: parse_options(kind, args, name, summary).run)


COMMANDS = {
    "demo": Command("Train Qwen3-Next and its dense predecessor here, and compare their cost", parse_demo),
    "train": Command("Train a model by a recipe, a TOML file", parse_train),
    "generate": command(Generate, "generate"),
    "serve": Command("Serve a model by OpenAI's and Anthropic's APIs", parse_serve),
    "keys add": command(KeysAdd, "keys add"),
    "keys list": command(KeysList, "keys list"),
    "keys revoke": command(KeysRevoke, "keys revoke"),
    "chat": command(Chat, "chat"),
    "bench": command(Bench, "bench"),
    "quantize": command(Quantize, "quantize"),
    "info": command(Info, "info"),
    "init": command(Init, "init"),
    "data build": Command("Turn text into a corpus of tokens to train on", parse_build),
    "data tokenizer": command(TrainTokenizer, "data tokenizer"),
}
