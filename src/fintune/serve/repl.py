"""A chat in the terminal with the adapter, its base, or the two in turn."""

import asyncio
import contextlib
from pathlib import Path

from fintune import console
from fintune.errors import ModelError
from fintune.example import Message
from fintune.model import LoadedRelease, find_release, load_release, open_release
from fintune.serve.engine import Engine, StreamedRequest

HELP = "/adapter, /base, /both: the model that answers · /reset: forget · /quit"
COMMANDS = {"/adapter": ["adapter"], "/base": ["base"], "/both": ["base", "adapter"]}


def chat(folder: Path, *, base: Path | None = None, max_new_tokens: int = 256) -> None:
    """Talk to a release until the input ends. Answers are greedy, so they can be repeated."""
    folder = find_release(folder)
    loaded = load_release(folder, open_release(folder, base))
    console.say(f"{folder.name} on {loaded.base.id}. {HELP}")
    models, history = COMMANDS["/adapter"], list[Message]()
    with contextlib.closing(Engine(loaded)) as engine, contextlib.suppress(EOFError):
        while (line := console.err.input("[bold]you>[/] ").strip()) != "/quit":
            if line == "/reset":
                history = []
            elif line.startswith("/"):
                models = COMMANDS.get(line, models)
                console.say(f"{' and '.join(models)} answers. {HELP}")
            elif line:
                history.append(Message("user", line))
                for model in models:
                    console.heading(model)
                    reply = _reply(loaded, engine, history, model == "adapter", max_new_tokens)
                    answer = asyncio.run(reply)
                history.append(Message("assistant", answer))


async def _reply(
    loaded: LoadedRelease, engine: Engine, history: list[Message], adapter: bool, limit: int
) -> str:
    """Print the answer to a conversation that ends with the user, and return it."""
    ids, context = loaded.chat.prompt_ids(history), engine.max_context
    if len(ids) >= context:
        raise ModelError(f"{len(ids)} prompt tokens leave no space in the context of {context}")
    limit, chat = min(limit, context - len(ids)), loaded.chat
    decode = {"tokenizer": chat.tokenizer.backend_tokenizer, "reader": chat.reader()}
    request = StreamedRequest("chat", ids, limit, adapter=adapter, **decode)
    engine.submit(request)
    answer = ""
    async for piece, _ in request.pieces():
        answer += piece
        console.stream(piece)
    console.stream("\n")
    return answer.strip()
