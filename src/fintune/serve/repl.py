"""A chat in the terminal, with the adapter, its base, or both one after the other."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from fintune import console
from fintune.errors import ModelError
from fintune.example import Message
from fintune.serve.engine import Engine, Finish, Job
from fintune.serve.loaded import Loaded, load

HELP = "/adapter, /base, /both: who answers · /reset: forget · /quit"


def chat(folder: Path, *, base: Path | None = None, max_new_tokens: int = 256) -> None:
    """Talk to a release until the input ends. Answers are greedy, so they can be repeated."""
    loaded = load(folder, base)
    console.say(f"{folder.name} on {loaded.base.id}. {HELP}")
    with contextlib.closing(Engine(loaded)) as engine:
        _talk(loaded, engine, max_new_tokens)


def _talk(loaded: Loaded, engine: Engine, max_new_tokens: int) -> None:
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
            for name in who:
                console.heading(name)
                answer = ""
                for piece in reply(loaded, engine, history, name, max_new_tokens):
                    answer += piece
                    console.stream(piece)
                console.stream("\n")
            history.append(Message("assistant", answer.strip()))


def reply(
    loaded: Loaded, engine: Engine, history: list[Message], who: str, max_new_tokens: int
) -> Iterator[str]:
    """Pieces of the answer of `base` or `adapter` to a conversation that ends with the user."""
    pieces = SimpleQueue[tuple[str, Finish | None]]()
    ids = loaded.chat.prompt_ids(history)
    limit = min(max_new_tokens, loaded.context - len(ids))
    if limit < 1:
        raise ModelError(f"{len(ids)} tokens leave no room in the context of {loaded.context}")
    engine.submit(Job(ids, who == "adapter", limit, lambda *said: pieces.put(said)))
    finish = None
    while finish is None:
        text, finish = pieces.get()
        yield text
    if finish == "error":
        raise ModelError("the model failed on this question")


def _ask() -> str | None:
    console.err.print("[bold]you>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
