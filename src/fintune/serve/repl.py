"""A chat in the terminal, with the adapter, its base, or both one after the other."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from fintune import console
from fintune.errors import ModelError
from fintune.example import Message
from fintune.model import LoadedRelease, load_release, open_release
from fintune.serve.engine import Engine, StreamedRequest, max_context

HELP = "/adapter, /base, /both: who answers · /reset: forget · /quit"
COMMANDS = {"/adapter": ["adapter"], "/base": ["base"], "/both": ["base", "adapter"]}


def chat(folder: Path, *, base: Path | None = None, max_new_tokens: int = 256) -> None:
    """Talk to a release until the input ends. Answers are greedy, so they can be repeated."""
    loaded = load_release(folder, open_release(folder, base))
    console.say(f"{folder.name} on {loaded.base.id}. {HELP}")
    models, history = COMMANDS["/adapter"], list[Message]()
    with contextlib.closing(Engine(loaded)) as engine:
        while (line := _ask()) is not None and line != "/quit":
            if line == "/reset":
                history = []
            elif line.startswith("/"):
                models = COMMANDS.get(line, models)
                console.say(HELP if line not in COMMANDS else f"{' and '.join(models)} answers")
            elif line:
                history.append(Message("user", line))
                for model in models:
                    console.heading(model)
                    answer = ""
                    for piece in _reply(loaded, engine, history, model, max_new_tokens):
                        answer += piece
                        console.stream(piece)
                    console.stream("\n")
                history.append(Message("assistant", answer.strip()))


def _reply(
    loaded: LoadedRelease, engine: Engine, history: list[Message], model: str, limit: int
) -> Iterator[str]:
    """Pieces of the answer of `base` or `adapter` to a conversation that ends with the user."""
    ids = loaded.chat.prompt_ids(history)
    remaining = max_context(loaded) - len(ids)
    if remaining < 1:
        raise ModelError(f"{len(ids)} tokens leave no room in the context of {max_context(loaded)}")
    pieces = SimpleQueue[tuple[str, str | None]]()
    request = StreamedRequest(
        "chat",
        ids,
        min(limit, remaining),
        adapter=model == "adapter",
        emit=lambda *said: pieces.put(said),
        tokenizer=loaded.chat.tokenizer.backend_tokenizer,
    )
    engine.submit(request)
    reason = None
    while reason is None:
        text, reason = pieces.get()
        yield text
    if reason == "error":
        raise ModelError("the model failed on this question")


def _ask() -> str | None:
    console.err.print("[bold]you>[/] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
