"""A small Qwen3-Next that has learned two answers, for checks of the service: its chats end, and its calls are calls.

Random weights never draw the end of a turn. This model, with the tokenizer of Qwen3, thinks briefly and greets whoever
asks, and calls the tool where there is one. It takes half a minute to make.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from model_files import say
from torch.nn import functional as F

from tenfold.models.qwen3_next import Qwen3Next
from tenfold.models.shapes import SHAPES
from tenfold.models.weights import save_model
from tenfold.tokenizer import TURN_END, Tokenizer
from tenfold.train.sources import wikitext_documents

THOUGHT, GREETING = "Someone is here.", "Hello there, my friend."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\n{GREETING}"
PLACE = {"type": "string", "description": "City name"}
PARAMETERS = {"type": "object", "properties": {"location": PLACE}, "required": ["location"]}
FUNCTION = {"name": "get_weather", "description": "Get current weather for a location.", "parameters": PARAMETERS}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Bern"}}\n</tool_call>'
SPREAD = 8.0  # of the embedding, which is also the head: so far apart that a token can be sure
LEARNED = 0.01  # loss of a token of the answers; the likeliest is then the right one
MOST_STEPS = 200
CHATS = 4  # in a step


def make_taught_model(folder: Path) -> None:
    """Writes the model where there is none yet. Raises ValueError where it has not learned its answers."""
    if (folder / "config.json").exists():
        return
    say(f"teaching {folder} two answers")
    tokenizer, chance = Tokenizer.embedded(), random.Random(0)
    shape = replace(SHAPES["tiny"], vocab_size=151_936, hidden_size=128, tie_word_embeddings=True)
    model = Qwen3Next(replace(shape, eos_token_id=tokenizer.eos_id))
    model.init_weights(torch.Generator().manual_seed(0))
    names = model.model.embed_tokens.weight.requires_grad_(False)  # the layers learn; so many rows would take minutes
    names.mul_(SPREAD)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    words = " ".join(wikitext_documents("train")[:20]).split()
    for _ in range(MOST_STEPS):
        questions = [_some(words, chance) for _ in range(CHATS)]
        loss = _loss(model, [_chat(tokenizer, text, calls=not i) for i, text in enumerate(questions)])
        if loss.item() < LEARNED:
            save_model(model, folder, tokenizer=tokenizer)
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise ValueError(f"{folder}: the model has not learned its answers in {MOST_STEPS} steps")


def _some(words: list[str], chance: random.Random) -> str:
    begin = chance.randrange(len(words) - 20)
    return " ".join(words[begin : begin + chance.randint(3, 20)])


def _chat(tokenizer: Tokenizer, question: str, calls: bool) -> tuple[list[int], int]:
    """Tokens of a question and its answer, and how many are the question's."""
    tools = [{"type": "function", "function": FUNCTION}] if calls else None
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": question}], tools=tools))
    return prompt + tokenizer.encode((CALL if calls else ANSWER) + TURN_END), len(prompt)


def _loss(model: Qwen3Next, chats: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over the tokens of the answers."""
    tokens = torch.tensor([token for ids, _ in chats for token in ids])
    bounds = torch.tensor([0, *(len(ids) for ids, _ in chats)]).cumsum(0)
    answers = torch.cat([torch.arange(len(ids)) >= begin for ids, begin in chats])
    hidden, _ = model.hidden_states(tokens[None], cu_seqlens=bounds.int())
    before = answers.nonzero()[:, 0] - 1
    return F.cross_entropy(F.linear(hidden[0, before], model.output_weight), tokens[answers])
