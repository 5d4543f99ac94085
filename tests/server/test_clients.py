"""The official clients of both APIs against a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import openai
import pytest

from tenfold.server.settings import Settings

if TYPE_CHECKING:
    from tests.server.conftest import Running

HTTP = httpx.Client(timeout=20)  # one for all: each would load the certificates anew
USER: Any = {"role": "user", "content": "weather?"}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
ANTHROPIC_TOOLS: Any = [
    {"name": "weather", "description": "d", "input_schema": PARAMETERS},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


# ---- chat completions --------------------------------------------------------------------------------------


def test_chat(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\nSunny, 20 °C."
    answer = client.chat.completions.create(model="fake", messages=[USER], temperature=0, seed=3, max_tokens=99)
    assert answer.choices[0].message.content == "Sunny, 20 °C."
    assert answer.choices[0].message.model_extra == {"reasoning_content": "hm"}
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens_details and answer.usage.completion_tokens_details
    request = server.engine.requests[0]
    assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (
        len(request.prompt_ids),
        3,
    )
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == answer.usage.completion_tokens
    assert (request.params.temperature, request.params.seed, request.params.max_tokens) == (0, 3, 99)


def test_a_streamed_chat_says_the_same(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\nSunny, 20 °C. 🌞"
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(model="fake", messages=[USER], stream=True, stream_options=options)
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Sunny, 20 °C. 🌞"
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "hm"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_answers_have_seeds_of_their_own(server: Running, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="fake", messages=[USER], n=3, seed=5)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [request.params.seed for request in server.engine.requests] == [5, 6, 7]
    assert whole.usage and whole.usage.prompt_tokens == len(server.engine.requests[0].prompt_ids)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="fake", messages=[USER], n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_an_answer_may_end_early(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "one two three four"
    cut = client.chat.completions.create(model="fake", messages=[USER], max_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one two", "length")
    stopped = client.chat.completions.create(model="fake", messages=[USER], stop=["o th", "x"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one tw", "stop")


def test_logprobs(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "né"
    answer = client.chat.completions.create(model="fake", messages=[USER], logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and server.engine.requests[0].params.logprobs == 2
    assert b"".join(bytes(entry.bytes or ()) for entry in logprobs.content).decode() == "né"
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.5]


def test_tools(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = CALLS
    answer = client.chat.completions.create(model="fake", messages=[USER], tools=TOOLS)
    message = answer.choices[0].message
    assert message.content == "Let me see." and answer.choices[0].finish_reason == "tool_calls"
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls or () if c.type == "function"] == [
        ("weather", '{"city": "Bern", "days": 2}'),
        ("now", "{}"),
    ]
    server.engine.answers["<tool_response>"] = "Sunny."
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls or ()]
    conversation: Any = [USER, message, *results]
    then = client.chat.completions.create(model="fake", messages=conversation, tools=TOOLS)
    assert then.choices[0].message.content == "Sunny."
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids)
    assert f"<|im_start|>assistant\n{CALLS}<|im_end|>" in prompt  # word for word, so that the cache knows it


def test_streamed_tools(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = CALLS
    with client.chat.completions.stream(model="fake", messages=[USER], tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 4
    calls = final.choices[0].message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"city": "Bern", "days": 2}'),
        ("now", "{}"),
    ]
    assert final.choices[0].message.content == "Let me see." and final.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "structured"),
    [("auto", False), ("none", False), ("required", True), ({"type": "function", "function": {"name": "now"}}, True)],
)
def test_tool_choice(server: Running, client: openai.OpenAI, choice: Any, structured: bool) -> None:
    client.chat.completions.create(model="fake", messages=[USER], tools=TOOLS, tool_choice=choice)
    request = server.engine.requests[0]
    structure = request.params.structure
    assert (structure is not None) == structured
    assert ("weather" in server.engine.tokenizer.decode(request.prompt_ids)) and (
        ("<tools>" in server.engine.tokenizer.decode(request.prompt_ids)) == (choice != "none")
    )
    if structure and isinstance(choice, dict):
        assert "now" in structure.source and "weather" not in structure.source


def test_structured_output(server: Running, client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str
        degrees: int

    server.engine.answers["weather?"] = '{"city": "Bern", "degrees": 20}'
    answer = client.chat.completions.parse(model="fake", messages=[USER], response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Bern", degrees=20)
    structure = server.engine.requests[0].params.structure
    assert structure and structure.kind == "json_schema"
    assert set(json.loads(structure.source)["properties"]) == {"city", "degrees"}


@pytest.mark.parametrize(
    ("field", "value", "kind", "source"),
    [
        ("guided_regex", "[a-z]+", "regex", "[a-z]+"),
        ("guided_choice", ["a", "b"], "choice", '["a", "b"]'),
        ("guided_grammar", 'start: "a"', "grammar", 'start: "a"'),
        ("guided_json", {"type": "object"}, "json_schema", '{"type": "object"}'),
        ("response_format", {"type": "json_object"}, "json_schema", '{"type": "object"}'),
    ],
)
def test_forms_of_answers(
    server: Running, client: openai.OpenAI, field: str, value: Any, kind: str, source: str
) -> None:
    client.chat.completions.create(model="fake", messages=[USER], extra_body={field: value})
    structure = server.engine.requests[0].params.structure
    assert structure and (structure.kind, structure.source) == (kind, source)


# ---- completions, models -----------------------------------------------------------------------------------


def test_completions(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers |= {"a": " first", "b": " second"}
    answer = client.completions.create(model="fake", prompt=["say a", "say b"], echo=True)
    assert [choice.text for choice in answer.choices] == ["say a first", "say b second"]
    stream = client.completions.create(model="fake", prompt="say a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " first"


def test_texts_are_scored_as_harnesses_do(server: Running, client: openai.OpenAI) -> None:
    """As lm-eval's local-completions: tokens in, echoed with the logprobs of all but the first."""
    prompts = [server.engine.tokenizer.encode(text) for text in ("The sky is blue", "né à 🌞")]
    answer = client.completions.create(model="fake", prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for ids, choice in zip(prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(ids) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.token_logprobs[1] == -0.5
        for token, top in list(zip(logprobs.tokens, logprobs.top_logprobs, strict=True))[1:]:
            assert max(top, key=lambda name: top[name]) == token
    scored = client.completions.create(model="fake", prompt=prompts[0], max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "The sky is blue" and scored.choices[0].finish_reason == "length"


def test_the_scores_of_a_text_are_whole_where_the_answer_ends_at_once(server: Running, client: openai.OpenAI) -> None:
    """A harness takes the last entry for the token that was drawn, be it the end of the text."""
    server.engine.answers["blue"] = ""
    ids = server.engine.tokenizer.encode("The sky is blue")
    answer = client.completions.create(model="fake", prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0)
    (choice,) = answer.choices
    assert choice.text == "The sky is blue" and choice.finish_reason == "stop" and choice.logprobs
    assert choice.logprobs.tokens == [*map(server.engine.tokenizer.decode, [[i] for i in ids]), "<|endoftext|>"]
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * len(ids)]


def test_models(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    assert [model.id for model in claude.models.list()] == ["fake", "alias"]


def test_errors_reach_the_client(server: Running, client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'x' is not served"):
        client.chat.completions.create(model="x", messages=[USER])
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="fake", input="x")
    with pytest.raises(anthropic.NotFoundError, match="model 'x' is not served"):
        claude.messages.create(model="x", max_tokens=9, messages=[USER])
    server.engine.places = 0
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="fake", messages=[USER])
    assert refused.value.response.headers["retry-after"] == "3"


# ---- responses ---------------------------------------------------------------------------------------------


def test_responses(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\n" + CALLS
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = client.responses.create(model="fake", input="weather?", instructions="Be brief.", tools=tools)
    assert answer.output_text == "Let me see." and answer.status == "completed"
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    server.engine.answers["<tool_response>"] = "Sunny."
    results: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
        for item in answer.output
        if item.type == "function_call"
    ]
    conversation: Any = [{"role": "user", "content": "weather?"}, *answer.output, *results]
    then = client.responses.create(model="fake", input=conversation, tools=tools)
    assert then.output_text == "Sunny."
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids)
    assert f"<|im_start|>assistant\n<think>\nhm\n</think>\n\n{CALLS}<|im_end|>" in prompt


def test_streamed_responses(server: Running, client: openai.OpenAI) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\n" + CALLS
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with client.responses.stream(model="fake", input="weather?", tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Let me see."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = [item.arguments for item in final.output if item.type == "function_call"]
    assert calls == ['{"city": "Bern", "days": 2}', "{}"]
    cut = client.responses.create(model="fake", input="weather?", max_output_tokens=1)
    assert cut.status == "incomplete"


# ---- Anthropic ---------------------------------------------------------------------------------------------


def test_messages(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\n" + CALLS
    answer = claude.messages.create(
        model="fake",
        max_tokens=99,
        system="Be brief.",
        messages=[USER],
        tools=ANTHROPIC_TOOLS,
    )
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert answer.stop_reason == "tool_use" and answer.usage.cache_read_input_tokens == 3
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("weather", {"city": "Bern", "days": 2}), ("now", {})]
    server.engine.answers["<tool_response>"] = "Sunny."
    results: Any = [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"} for call in calls]
    conversation: Any = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    then = claude.messages.create(model="fake", max_tokens=99, messages=conversation, tools=ANTHROPIC_TOOLS)
    assert [block.text for block in then.content if block.type == "text"] == ["Sunny."]
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids)
    assert f"<think>\nhm\n</think>\n\n{CALLS}<|im_end|>" in prompt


def test_streamed_messages(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.answers["weather?"] = "<think>\nhm\n</think>\n\n" + CALLS
    server.engine.prefill_seconds = 0.12  # two heartbeats
    with claude.messages.stream(model="fake", max_tokens=99, messages=[USER], tools=ANTHROPIC_TOOLS) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == "Let me see." and final.stop_reason == "tool_use"
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Bern", "days": 2}, {}]
    assert [block.thinking for block in final.content if block.type == "thinking"] == ["hm"]
    assert final.usage.output_tokens == len(server.engine.answer(server.engine.requests[0]))


def test_a_message_tells_its_stop_sequence_and_its_length(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.answers["weather?"] = "one two three"
    messages: Any = [USER]
    stopped = claude.messages.create(model="fake", max_tokens=99, messages=messages, stop_sequences=[" two"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " two")
    assert [block.text for block in stopped.content if block.type == "text"] == ["one"]
    assert claude.messages.create(model="fake", max_tokens=1, messages=messages).stop_reason == "max_tokens"
    count = claude.messages.count_tokens(model="fake", messages=messages)
    assert count.input_tokens == len(server.engine.requests[0].prompt_ids)


# ---- the wire ----------------------------------------------------------------------------------------------


def body(stream: bool) -> dict[str, Any]:
    return {"model": "fake", "messages": [USER], "stream": stream}


def test_a_long_prefill_gives_signs_of_life(server: Running) -> None:
    server.engine.prefill_seconds = 0.2
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body(True)) as response:
        lines = list(response.iter_lines())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines.count(": still working") >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_its_request(server: Running, stream: bool) -> None:
    server.engine.answers["weather?"] = "word " * 500
    server.engine.seconds_per_token = 0.01
    connection = server.connect()
    data = json.dumps(body(stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
    connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
    server.wait_for(lambda: server.engine.running == 1)
    connection.close()
    began = time.monotonic()
    server.wait_for(lambda: server.engine.cancelled == [server.engine.requests[0].id])
    assert time.monotonic() - began < 1 and server.engine.running == 0


def test_a_batch_that_finds_no_room_leaves_nothing_behind(server: Running, client: openai.OpenAI) -> None:
    server.engine.places = 2
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="fake", prompt=["a", "b", "c"])
    server.wait_for(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == 2


def test_what_takes_too_long_is_ended(servers: Callable[[Settings], Running]) -> None:
    server = servers(Settings(model_names=("fake",), context_length=500, request_seconds=0.2))
    server.engine.prefill_seconds = 5
    whole = HTTP.post(f"{server.url}/v1/chat/completions", json=body(False))
    assert whole.status_code == 504 and "longer than the 0.2 s" in whole.json()["error"]["message"]
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body(True)) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "longer than the 0.2 s" in events[-1]["error"]["message"]
    server.wait_for(lambda: len(server.engine.cancelled) == 2)


def test_an_engine_that_fails_is_told_and_the_next_request_is_answered(server: Running, client: openai.OpenAI) -> None:
    server.engine.failure = ValueError("this structure is impossible")
    with pytest.raises(openai.BadRequestError, match="impossible"):
        client.chat.completions.create(model="fake", messages=[USER])
    server.engine.failure = KeyError("a bug")
    with pytest.raises(openai.InternalServerError, match="the service failed"):
        client.chat.completions.create(model="fake", messages=[USER])
    server.engine.failure = None
    assert client.chat.completions.create(model="fake", messages=[USER]).choices


def test_metrics_count_what_happened(server: Running, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    names = ("tenfold_cached_tokens_total", "tenfold_accepted_tokens_total", "tenfold_first_token_seconds_count")
    before = [value(name) for name in names]
    answer = client.completions.create(model="fake", prompt="a")
    assert answer.usage
    after = [value(name) for name in names]
    gained = [late - early for early, late in zip(before, after, strict=True)]
    assert gained == [3, answer.usage.completion_tokens, 1]
    assert value("tenfold_cache_bytes_total") == 4000


def test_tokens_and_back(server: Running) -> None:
    tokens = HTTP.post(f"{server.url}/tokenize", json={"prompt": "né à 🌞"}).json()
    assert tokens["tokens"] == server.engine.tokenizer.encode("né à 🌞") and tokens["count"] == len(tokens["tokens"])
    assert HTTP.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "né à 🌞"}
    chat = HTTP.post(f"{server.url}/tokenize", json={"messages": [USER]}).json()
    assert server.engine.tokenizer.decode(chat["tokens"]).endswith("<|im_start|>assistant\n")
