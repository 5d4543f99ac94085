"""Prompts: what the chat template is given, and where conversations may part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tenfold.server.chat import ChatFormat, Conversation, encode
from tenfold.server.errors import ApiError
from tenfold.server.openai_chat import ChatRequest
from tenfold.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hi"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a":  1}'}}],
}
XML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ mood }}"
)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(tokenizer._backend, tokenizer.config | {"chat_template": template})


def conversation(messages: list[dict[str, Any]], options: dict[str, Any] | None = None) -> Conversation:
    request = ChatRequest.model_validate(
        {"model": "m", "messages": messages, "tools": [TOOL], "chat_template_kwargs": options}
    )
    return request.job().conversation


def test_borders_are_the_ends_of_turns(tokenizer: Tokenizer) -> None:
    """A prompt is, up to its borders, the prompt of every conversation that begins with the same turns."""
    chat = ChatFormat(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "ho"}, USER]
    ids = tokenizer.encode(chat.prompt(Conversation(messages=messages)))
    borders = chat.borders(ids)
    assert len(borders) == len(messages)
    for count, border in enumerate(borders, 1):
        other = [*messages[:count], {"role": "user", "content": "something else entirely"}]
        others = tokenizer.encode(chat.prompt(Conversation(messages=other)))
        assert others[:border] == ids[:border]
        assert others[border:] != ids[border:]


def test_a_template_gets_arguments_as_it_takes_them(tokenizer: Tokenizer) -> None:
    messages = [USER, CALL, {"role": "tool", "content": "noon", "tool_call_id": "c"}]
    assert '"arguments": {"a":  1}' in ChatFormat(tokenizer).prompt(conversation(messages))
    xml = ChatFormat(with_template(tokenizer, XML_TEMPLATE))
    assert xml.tools == "xml"
    assert "<parameter=a>\n1\n</parameter>" in xml.prompt(conversation(messages))
    broken = json.loads(json.dumps(messages).replace("1}", "1"))
    with pytest.raises(ApiError, match="arguments must be a JSON object"):
        xml.prompt(conversation(broken))


def test_a_template_gets_its_options_but_never_another_conversation(tokenizer: Tokenizer) -> None:
    assert ChatFormat(tokenizer).prompt(conversation([USER], {"enable_thinking": False})).endswith("</think>\n\n")
    xml = ChatFormat(with_template(tokenizer, XML_TEMPLATE))
    prompt = xml.prompt(conversation([USER], {"mood": "gladly", "messages": [{"role": "system"}]}))
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ngladly"


def test_parts_of_text_are_one_text_and_pictures_are_refused(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt = ChatFormat(tokenizer).prompt(
        conversation([{"role": "developer", "content": "c"}, USER | {"content": parts}])
    )
    assert "user\na\nb<|im_end|>" in prompt and "system\nc" in prompt
    with pytest.raises(ApiError, match="image_url"):
        conversation([USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_refuses_is_a_mistake_of_the_request(tokenizer: Tokenizer, template: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        ChatFormat(with_template(tokenizer, template)).prompt(Conversation(messages=[USER]))
    assert caught.value.status_code == 400


def test_a_prompt_is_read_no_further_than_the_context(tokenizer: Tokenizer) -> None:
    text = "line\nand " * 5000
    assert encode(tokenizer, text, 100_000) == tokenizer.encode(text)
    with pytest.raises(ApiError, match="context has room for 10"):
        encode(tokenizer, text, 10)


def test_a_text_that_cannot_be_cut_is_refused_before_it_takes_the_memory(tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError, match="a word of about 1000000 characters, at most 262144"):
        encode(tokenizer, "a" * 1_000_000, 1_000_000)
