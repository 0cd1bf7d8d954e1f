"""A chat in the terminal, with the adapter, its base, or both one after the other."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fintune import console
from fintune.example import Message
from fintune.generate import stream
from fintune.serve.loaded import Loaded, load

HELP = "/adapter, /base, /both: who answers · /reset: forget · /quit"


def chat(folder: Path, *, base: Path | None = None, max_new_tokens: int = 256) -> None:
    """Talk to a release until the input ends. Answers are greedy, so they can be repeated."""
    loaded = load(folder, base)
    console.say(f"{folder.name} on {loaded.base.id}. {HELP}")
    who, history = ["adapter"], list[Message]()
    while (line := _ask()) is not None:
        if line in {"/adapter", "/base"}:
            who = [line[1:]]
        elif line == "/both":
            who = ["base", "adapter"]
        elif line == "/reset":
            history = []
        elif line == "/quit":
            return
        elif line.startswith("/"):
            console.say(HELP)
        elif line:
            history.append(Message("user", line))
            answer = ""
            for name in who:
                console.heading(name)
                answer = _say(loaded, history, name, max_new_tokens)
            history.append(Message("assistant", answer))


def reply(loaded: Loaded, history: list[Message], who: str, max_new_tokens: int) -> Iterator[str]:
    """Pieces of the answer of `base` or `adapter` to a conversation that ends with the user."""
    off = loaded.model.disable_adapter() if who == "base" else contextlib.nullcontext()
    ids = loaded.chat.prompt_ids(history)
    with off:
        yield from stream(
            loaded.model,
            loaded.chat.tokenizer,
            ids,
            ends=loaded.ends,
            max_new_tokens=min(max_new_tokens, loaded.context - len(ids)),
        )


def _ask() -> str | None:
    console.err.print("[bold]you>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _say(loaded: Loaded, history: list[Message], who: str, max_new_tokens: int) -> str:
    said = ""
    for piece in reply(loaded, history, who, max_new_tokens):
        said += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return said.strip()
