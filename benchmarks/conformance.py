"""The official clients and the checkers that others wrote, against a running `tenfold serve`.

    python benchmarks/conformance.py --checkers .venv-conformance/bin

`make conformance` installs the checkers beside the development tools, and runs this. The served model is small, and is
taught on the spot to end its answers. lm-eval's numbers have to be those that come from the model without a server.
Exit code 1 where something does not pass.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import tyro
from pydantic import BaseModel
from service import NAME, Server, end_servers_on_sigterm, serve_tenfold
from taught_model import ANSWER, FUNCTION, GREETING, PARAMETERS, THOUGHT, make_taught_model
from timing import print_table

from tenfold.engine.llm import start_native
from tenfold.models.native import NativeModel
from tenfold.tokenizer import Tokenizer
from tenfold.train.sources import wikitext_documents

THINKER = f"{NAME}-gpt-5-claude-4"  # llm-comply asks models with such names alone for their reasoning
USER: Any = {"role": "user", "content": "Who is there?"}
OPENAIS_OWN = "response.reasoning_text"  # events of OpenAI's clients that Open Responses calls response.reasoning
PLACE = "Bern"  # where the model asks for the weather
WINDOW = 100  # tokens that lm-eval sends at once, the one before them included
ERROR = 1e-6  # of a token's logprob: that of exponentials in fp32, many times over
LM_EVAL = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Options:
    checkers: Path = Path(".venv-conformance/bin")  # of an environment with lm-eval and llm-comply
    work: Path = Path("runs/conformance")


class Failure(Exception):
    """What was found, in one line."""


def require(condition: object, complaint: str) -> None:
    if not condition:
        raise Failure(complaint)


# ---- clients -------------------------------------------------------------------------------------------------


class Weather(BaseModel):
    city: Literal["Bern", "Basel"]
    warm: bool


def openai_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=[USER], temperature=0)
    message = whole.choices[0].message
    require(message.content == GREETING, f"the chat says {message.content!r}")
    require((message.model_extra or {}).get("reasoning_content") == THOUGHT, f"the reasoning is {message.model_extra}")
    stream = client.chat.completions.create(
        model=NAME, messages=[USER], temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    require(text == GREETING, f"the streamed chat says {text!r}")
    require(chunks[-1].usage == whole.usage or chunks[-1].usage, "the stream ends without usage")


def openai_tools(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": FUNCTION}]
    asked: Any = {"model": NAME, "messages": [USER], "tools": tools, "tool_choice": "required", "temperature": 0}
    called = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    for calls in (called, streamed):
        told = [(call.function.name, json.loads(call.function.arguments)) for call in calls if call.type == "function"]
        require(told == [(FUNCTION["name"], {"location": PLACE})], f"the calls are {told}")


def openai_structured(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=NAME, messages=[USER], response_format=Weather)
    require(isinstance(answer.choices[0].message.parsed, Weather), "the chat's form is another")
    response = client.responses.parse(model=NAME, input="Weather?", text_format=Weather)
    require(isinstance(response.output_parsed, Weather), "the response's form is another")


def openai_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=NAME, input="Who is there?", temperature=0)
    with client.responses.stream(model=NAME, input="Who is there?", temperature=0) as stream:
        numbers = [event.sequence_number for event in stream]
        final = stream.get_final_response()
    require(whole.output_text == final.output_text == GREETING, f"the response says {whole.output_text!r}")
    require(numbers == list(range(len(numbers))), f"the events have the numbers {numbers}")


def openai_completions(client: openai.OpenAI) -> None:
    prompts = ["The sky is", "né à 🌞"]
    scored = client.completions.create(model=NAME, prompt=prompts, max_tokens=0, echo=True, logprobs=2)
    require([choice.text for choice in scored.choices] == prompts, "the echo is not the prompt")


def anthropic_messages(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": NAME, "max_tokens": 99, "messages": [USER]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    for message in (whole, final):
        texts = [block.text for block in message.content if block.type == "text"]
        thoughts = [block.thinking for block in message.content if block.type == "thinking"]
        require((thoughts, texts) == ([THOUGHT], [GREETING]), f"the message says {thoughts} {texts}")


def anthropic_tools(client: anthropic.Anthropic) -> None:
    tool: Any = {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": PARAMETERS}
    asked: Any = {"model": NAME, "max_tokens": 99, "messages": [USER], "tools": [tool]}
    asked["tool_choice"] = {"type": "any"}
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    for message in (client.messages.create(**asked), final):
        calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
        require(calls == [(FUNCTION["name"], {"location": PLACE})], f"the calls are {calls}")


# ---- checkers ------------------------------------------------------------------------------------------------


def run_checker(command: Sequence[object], log: Path, environment: dict[str, str] | None = None) -> str:
    """What a program says. Raises Failure where it does not end well."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | (environment or {}),
    )
    log.write_text(done.stdout, encoding="utf-8")
    require(done.returncode == 0, f"it ended with {done.returncode}; {log} says why")
    return done.stdout


def schemathesis(url: str, work: Path) -> None:
    """Requests that the description allows, and such as it forbids; none may be a fault of the server."""
    program = Path(sys.executable).with_name("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",unsupported_method"
    run_checker(
        [program, "run", f"{url}/openapi.json", "--checks", checks, "--max-examples", 10, "--no-color"],
        work / "schemathesis.log",
    )


def llm_comply(form: str, model: str, url: str, options: Options) -> str:
    """All of its tests but that of pictures, which this model does not see."""
    program = options.checkers / "llm-comply"
    known = run_checker([program, "--format", form, "--list"], options.work / f"llm-comply-{form}.log")
    words = [line.split()[0] for line in known.splitlines() if line.startswith("  ") and line[2:3].strip()]
    chosen = [word for word in words if not word.endswith("image-input")]
    require(len(chosen) == len(words) - 1, f"llm-comply has other tests than expected: {words}")
    command = [program, "--format", form, "-u", f"{url}/v1", "-k", "none", "-m", model, "-f", ",".join(chosen)]
    said = run_checker([*command, "--ignore", OPENAIS_OWN, "--json"], options.work / f"llm-comply-{form}.log")
    results = json.loads(said)["results"]
    ends = [result["status"] for result in results]
    return f"{ends.count('passed')} of {len(ends)}, {ends.count('skipped')} skipped"


# ---- lm-eval -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of lm-eval with the documents that it is about."""

    name: str
    documents: list[dict[str, Any]]
    recipe: dict[str, Any]

    def write(self, folder: Path) -> None:
        data = folder / f"{self.name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in self.documents), encoding="utf-8")
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}
        recipe = {"task": self.name, **files, "test_split": "test", **self.recipe}
        (folder / f"{self.name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def make_tasks(tokenizer: Tokenizer) -> tuple[Task, Task]:
    """Which text goes on so, and how well the model knows a text: lines of the embedded test text."""
    lines = [line.strip() for text in wikitext_documents("test")[:3] for line in text.split("\n") if len(line) > 400]
    chat = tokenizer.apply_chat_template([USER])
    documents = [{"text": chat, "choices": [ANSWER, "Go away."], "label": 0}]  # whose answer the model would end
    for number, line in enumerate(lines[:8]):
        words = line.split(" ")
        right, other = " " + " ".join(words[20:35]), " " + " ".join(words[50:60])
        choices = [right, other, " né à 🌞"]
        documents.append({"text": " ".join(words[:20]), "choices": choices, "label": number % 3})
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "choices"}
    choice |= {"doc_to_target": "label", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rolling |= {"metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]}
    texts = [{"text": line} for line in (*lines[:4], "né à 🌞")]
    return Task("tenfold_choice", documents, choice), Task("tenfold_rolling", texts, rolling)


def lm_eval(tasks: Sequence[Task], tokens: bool, folder: Path, url: str, options: Options) -> dict[str, Any]:
    """Runs tasks, and gives the aggregated results, and by name of a task the loglikelihoods of its samples."""
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = Path(temporary)
        for task in tasks:
            task.write(work)
        model = {"model": NAME, "base_url": f"{url}/v1/completions", "tokenizer": folder, "max_length": WINDOW + 1}
        model |= {"custom_prefix_token_id": Tokenizer.embedded().eos_id}
        model |= {"tokenizer_backend": "huggingface", "tokenized_requests": tokens, "num_concurrent": 2}
        arguments = ",".join(f"{name}={value}" for name, value in model.items())
        names = ",".join(task.name for task in tasks)
        command = [options.checkers / "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", names, "--include_path", work, "--batch_size", 4 if tokens else 1]
        command += ["--log_samples", "--output_path", work / "out"]
        log = options.work / f"lm-eval-{'tokens' if tokens else 'texts'}.log"
        run_checker(command, log, LM_EVAL | {"HF_HOME": str(work.resolve() / "cache")})
        (results,) = (work / "out").rglob("results_*.json")
        found: dict[str, Any] = {"results": json.loads(results.read_text(encoding="utf-8"))["results"]}
        for task in tasks:
            (samples,) = (work / "out").rglob(f"samples_{task.name}_*.jsonl")
            lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
            found[task.name] = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


class Scorer:
    """The same numbers without a server: from the logits of the model, all of a text at once."""

    def __init__(self, folder: Path) -> None:
        self._model: NativeModel
        self._model, tokenizer = start_native(folder, "bf16")
        assert tokenizer is not None
        self.tokenizer = tokenizer

    def score(self, context: Sequence[int], rest: Sequence[int]) -> tuple[float, bool]:
        """The log of the probability of the rest, and whether it is the likeliest, token by token."""
        ids = [*context, *rest]
        hidden = self._model.hidden_states(ids[:-1], self._model.new_cache())
        table = self._model.logits(hidden)[len(context) - 1 :].double().log_softmax(-1)
        own = table[range(len(rest)), list(rest)]
        return float(own.sum()), bool((own == table.amax(-1)).all())

    def continuation(self, text: str, rest: str) -> tuple[float, bool, int]:
        """The score of a rest, with the number of its tokens; white space before it is a part of it."""
        whole, context = self.tokenizer.encode(text + rest), self.tokenizer.encode(text.rstrip())
        return *self.score(context, whole[len(context) :]), len(whole) - len(context)

    def rolling(self, text: str) -> tuple[float, int]:
        """The log of the probability of a text, window by window, and the number of its tokens."""
        ids, size = self.tokenizer.encode(text), WINDOW - 1
        total = 0.0
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            context = ids[max(0, end - size - 1) : begin] if begin else [self.tokenizer.eos_id]
            total += self.score(context, ids[begin:end])[0]
        return total, len(ids)


def compare(theirs: float, ours: float, tokens: int, what: str) -> None:
    require(abs(theirs - ours) <= ERROR * tokens, f"{what}: lm-eval has {theirs!r}, the model {ours!r}")


def check_choice(task: Task, found: dict[str, Any], scorer: Scorer) -> str:
    right = 0
    for document, responses in zip(task.documents, found[task.name], strict=True):
        scores = [scorer.continuation(document["text"], choice) for choice in document["choices"]]
        for (theirs, greedy), (ours, likeliest, tokens) in zip(responses, scores, strict=True):
            compare(float(theirs), ours, tokens, document["text"][:20])
            require(str(greedy) == str(likeliest), f"{document['text'][:20]}: greedy is {greedy}, {likeliest}")
        right += max(range(len(scores)), key=lambda i: scores[i][0]) == document["label"]
    accuracy = found["results"][task.name]["acc,none"]
    require(math.isclose(accuracy, right / len(task.documents)), f"accuracy: lm-eval has {accuracy}")
    return f"accuracy {accuracy:.3f}"


def check_rolling(task: Task, found: dict[str, Any], scorer: Scorer) -> str:
    total, words, size = 0.0, 0, 0
    for document, (response,) in zip(task.documents, found[task.name], strict=True):
        score, tokens = scorer.rolling(document["text"])
        compare(float(response if isinstance(response, int | float | str) else response[0]), score, tokens, "rolling")
        total, words, size = total + score, words + len(document["text"].split()), size + len(document["text"].encode())
    for name, count in (("word_perplexity,none", words), ("byte_perplexity,none", size)):
        theirs = found["results"][task.name][name]
        require(math.isclose(theirs, math.exp(-total / count), rel_tol=1e-4), f"{name}: lm-eval has {theirs}")
    return f"perplexity of a byte {found['results'][task.name]['byte_perplexity,none']:.3f}"


# ---- all of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    what: str
    by: str
    run: Callable[[], str | None]  # a word on how it went; raises where it did not


def client_checks(url: str) -> Iterator[Check]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    for check in (openai_chat, openai_tools, openai_structured, openai_responses, openai_completions):
        yield Check(check.__name__.partition("_")[2], f"openai {version('openai')}", lambda check=check: check(client))
    for check in (anthropic_messages, anthropic_tools):
        by = f"anthropic {version('anthropic')}"
        yield Check(check.__name__.partition("_")[2], by, lambda check=check: check(claude))


def checker_checks(url: str, folder: Path, options: Options) -> Iterator[Check]:
    by = f"schemathesis {version('schemathesis')}"
    yield Check("the description", by, lambda: schemathesis(url, options.work))
    by = f"llm-comply {version_of('llm-comply', options)}"
    for form, model in (("openai-chat", THINKER), ("open-responses", NAME), ("anthropic", THINKER)):
        yield Check(form, by, lambda form=form, model=model: llm_comply(form, model, url, options))
    scorer = Scorer(folder)
    choice, rolling = make_tasks(scorer.tokenizer)

    def tokens() -> str:
        found = lm_eval([choice, rolling], True, folder, url, options)
        return f"{check_choice(choice, found, scorer)}, {check_rolling(rolling, found, scorer)}"

    def texts() -> str:
        return check_choice(choice, lm_eval([choice], False, folder, url, options), scorer)

    by = f"lm-eval {version_of('lm_eval', options)}"
    yield Check("local-completions, tokens", by, tokens)
    yield Check("local-completions, texts", by, texts)


def version_of(package: str, options: Options) -> str:
    """Raises Failure where it is not installed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return run_checker([options.checkers / "python", "-c", code], options.work / "versions.log").strip()


def run_all(checks: Iterator[Check]) -> bool:
    rows, passed = [], True
    for check in checks:
        began = time.monotonic()
        try:
            end, word = "passed", check.run() or ""
        except Exception as error:  # whatever a client raises is a finding
            passed, end, word = False, "FAILED", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        rows.append((check.by, check.what, end, word, f"{time.monotonic() - began:.1f}"))
        print(f"{check.by}, {check.what}: {end} {word}", file=sys.stderr, flush=True)
    print_table(("by", "what", "", "", "s"), rows, labels=4)
    return passed


def serve(folder: Path, options: Options) -> Server:
    knobs = {"quantization": "bf16", "memory": 0.2, "context-length": 1024, "temperature": 0}
    return serve_tenfold(folder, options.work / "serve.log", knobs, names=(NAME, THINKER))


def main() -> None:
    end_servers_on_sigterm()
    options = tyro.cli(Options, description=__doc__)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        folder = options.work / "model"
        make_taught_model(folder)
        with serve(folder, options) as server:
            passed = run_all(chain(client_checks(server.url), checker_checks(server.url, folder, options)))
            code = server.stop()
    except (ValueError, OSError, Failure) as error:
        sys.exit(f"conformance: error: {error}")
    sys.exit(0 if passed and code == 0 else 1)


if __name__ == "__main__":
    main()
