"""What has been said, and how to take it back, keep it and go on with it."""

from __future__ import annotations

import json
from pathlib import Path

from tenfold.chat.backend import Message

ROLES = ("system", "user", "assistant")


class Conversation:
    """Questions and answers in turn; an answer may be missing where there was none."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """As a model is given them."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """An empty answer is none."""
        if text:
            self.turns.append({"role": "assistant", "content": text})

    @property
    def last_question(self) -> str:
        """Raises ValueError where there is none."""
        return self.turns[self._last()]["content"]

    def take_back(self) -> str:
        """Removes the last question with its answer, and gives the question. Raises ValueError where there is none."""
        question = self.last_question
        del self.turns[self._last() :]
        return question

    def _last(self) -> int:
        for place in reversed(range(len(self.turns))):
            if self.turns[place]["role"] == "user":
                return place
        raise ValueError("nothing has been said yet")

    def save(self, path: Path) -> None:
        """Raises OSError."""
        path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Goes on with a saved one, or with one that the chat page exported. Raises OSError or ValueError."""
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            turns: list[Message] = [{"role": str(m["role"]), "content": m["content"]} for m in messages]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}: no conversation; expected an object with messages, as /save writes it") from None
        if not all(turn["role"] in ROLES and isinstance(turn["content"], str) for turn in turns):
            raise ValueError(f"{path}: expected messages of {', '.join(ROLES)} with text only")
        self.system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        self.turns = [turn for turn in turns if turn["role"] != "system"]
