"""Compiles the grammar that comes on standard input, and prints what is wrong with it.

`structure.py` runs this file as a process of its own: some grammars take llguidance for ever, all memory, or more
stack than there is, which ends a process. It imports nothing of the house, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import resource
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

SECONDS = 2  # of CPU time
MEMORY = 2 << 30  # bytes of address space
STACK = 32 << 20  # bytes; the server compiles with more


class Bytes:
    """A vocabulary of the single bytes, and an end."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def check(grammar: str) -> str:
    """What is wrong with it; empty if nothing is."""
    limits = LLParserLimits(max_items_in_row=int(sys.argv[1]), verbose_errors=False)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # finds out where nothing can ever follow
    return matcher.get_error()


def main() -> None:
    sys.stdout.write(check(sys.stdin.read()))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
