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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from tyro.conf import Positional, arg

from tenfold import __version__, config

Run = Callable[[], None]
Shape = Literal["tiny", "mid", "80b-a3b"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
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
    if not set(args[:2]) - {"data", "-h", "--help"}:
        return partial(print, overview())
    if args[0] == "--version":
        return partial(print, f"tenfold {__version__}")
    name = " ".join(args[: 1 + (args[0] == "data")])
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


# ---- commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, with a trained or a released model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]  # checkpoint folder, or a name on the hub
    prompt: str  # text to continue, or to answer with --chat
    max_tokens: int = 200  # stop after this many
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_p: float = 0.95  # sample from the likeliest tokens that make up this probability
    seed: int = 0  # the same seed gives the same text
    chat: bool = False  # put the prompt through the chat template, for models trained to converse
    dtype: Dtype = "float32"  # of the weights in memory; auto is what the checkpoint holds
    device: Literal["cpu", "cuda"] = "cpu"  # where to run

    def run(self) -> None:
        from tenfold.engine.llm import SamplingParams, generate
        from tenfold.models.weights import load

        model, tokenizer = load(self.model, self.dtype, self.device)
        if tokenizer is None:
            raise ValueError(f"{self.model}: no tokenizer.json, which is needed to read the prompt")
        params = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop_ids=tokenizer.stop_ids,
        )
        text = self.prompt
        if self.chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": self.prompt}])
        prompt_ids = tokenizer.encode(text)
        if not self.chat:
            print(self.prompt, end="", flush=True)
        started, count = time.perf_counter(), 0
        decoder = tokenizer.stream(skip_special_tokens=True)
        for token in generate(model, prompt_ids, params):
            print(decoder.push(token), end="", flush=True)
            count += 1
        print(decoder.finish())
        seconds = time.perf_counter() - started
        print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a checkpoint: its shape, parameters and files."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]  # checkpoint folder
    json: bool = False  # for programs

    def run(self) -> None:
        from rich.console import Console

        from tenfold.models.info import describe

        info = describe(self.model)
        if self.json:
            print(json.dumps(asdict(info), indent=2))
        else:
            Console().print(info.table())


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


def parse_train(args: Sequence[str]) -> Run:
    """`tenfold train RECIPE [--resume] [--section.key value ...]`: options override what the recipe says."""
    from tenfold.train.trainer import TrainConfig, train

    recipe = Path(args[0]) if args and not args[0].startswith("-") else None
    defaults = config.load_toml(TrainConfig, recipe) if recipe else TrainConfig()
    options = make_dataclass(
        "TrainOptions",
        [
            ("resume", Annotated[bool, arg(help="go on from the last checkpoint")], field(default=False)),
            ("config", Annotated[TrainConfig, arg(name="")], field(default=defaults)),
        ],
    )
    summary = f"Train a model by a recipe. {COMMANDS['train'].summary}."
    chosen = tyro.cli(
        options, args=args[bool(recipe) :], prog="tenfold train RECIPE.toml", description=summary
    )
    return partial(train, chosen.config, chosen.resume)


def parse_demo(args: Sequence[str]) -> Run:
    """`tenfold demo`: the options are the fields of DemoConfig."""
    from tenfold.study.twins import DemoConfig, run_demo

    return partial(run_demo, tyro.cli(DemoConfig, args=args, prog="tenfold demo"))


class Command(NamedTuple):
    """A line of the overview, and how to parse the arguments."""

    summary: str
    parse: Callable[[Sequence[str]], Run]


def options(kind: type[Generate] | type[Info] | type[Init], name: str) -> Command:
    """A command whose options are the fields of a dataclass, and whose summary is its docstring."""
    return Command(
        (kind.__doc__ or "").rstrip("."), lambda args: tyro.cli(kind, args=args, prog=f"tenfold {name}").run
    )


COMMANDS = {
    "demo": Command(
        "Train Qwen3-Next and its dense predecessor here, and compare what they cost", parse_demo
    ),
    "train": Command("Train a model by a recipe, a TOML file", parse_train),
    "generate": options(Generate, "generate"),
    "info": options(Info, "info"),
    "init": options(Init, "init"),
}
