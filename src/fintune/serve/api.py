"""An OpenAI-compatible server with two models, `base` and `adapter`, over one copy of the weights.

Unknown fields are refused rather than ignored: a client that asks for what is not there should
hear so. For load beyond one process use vLLM (`fintune export vllm` prints its command).
"""

import asyncio
import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from fintune.errors import FintuneError
from fintune.files import read_json, read_jsonl
from fintune.serve.engine import Busy, Engine
from fintune.serve.guard import error_body
from fintune.serve.loaded import Loaded
from fintune.serve.reply import Answer
from fintune.serve.wire import ApiError, Chat, Completion, Messages, Sampling, Tokenize, parse

MODELS = ("base", "adapter")
DEFAULT_TOKENS = 256
CHARACTERS_PER_TOKEN = 64
"""A prompt with more characters than this times the context cannot fit, and is not tokenised."""
EXAMPLES = 4
"""Held-out questions that the page offers to click."""
PAGE = Path(__file__).parent / "page" / "index.html"


class _Server:
    """The endpoints; `build` puts them on an app."""

    def __init__(self, loaded: Loaded, engine: Engine, folder: Path, run: Path) -> None:
        self._loaded, self._engine = loaded, engine
        self._folder, self._run = folder, run
        self._started = int(time.time())

    async def models(self) -> dict[str, Any]:
        rows = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "fintune"}
            for name in MODELS
        ]
        return {"object": "list", "data": rows}

    async def model(self, name: str) -> Any:
        if name not in MODELS:
            raise ApiError(404, "no such model; there are base and adapter", "model_not_found")
        return (await self.models())["data"][MODELS.index(name)]

    async def health(self) -> Any:
        running, waiting = self._engine.load
        state = {"status": "failed" if self._engine.failed else "ok"}
        return JSONResponse(
            state | {"running": running, "waiting": waiting}, 503 if self._engine.failed else 200
        )

    async def page(self) -> Any:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def run(self) -> dict[str, Any]:
        """What the page shows beside answers: held-out questions, the verdict, logged steps."""
        results = self._folder / "test_results.json"
        metrics = self._run / "metrics.jsonl"
        return {
            "name": self._folder.resolve().parent.name + "/" + self._folder.resolve().name,
            "base": {"id": self._loaded.base.id, "revision": self._loaded.base.revision},
            "results": read_json(results) if results.is_file() else None,
            "examples": _examples(self._folder / "eval_50_gpt_judged_raw.jsonl"),
            "metrics": list(read_jsonl(metrics)) if metrics.is_file() else [],
        }

    async def tokenize(self, request: Request) -> dict[str, Any]:
        body = await parse(request, Tokenize)
        ids = await self._chat_ids(body)
        tokenizer = self._loaded.chat.tokenizer
        return {
            "count": len(ids),
            "max_model_len": self._loaded.context,
            "tokens": ids,
            "token_strs": [tokenizer.decode([number]) for number in ids],
            "prompt": tokenizer.decode(ids),
        }

    async def chat(self, request: Request) -> Any:
        body = await parse(request, Chat)
        wanted = body.max_completion_tokens or body.max_tokens
        return await self._answer(request, body, await self._chat_ids(body), wanted, chat=True)

    async def completion(self, request: Request) -> Any:
        body = await parse(request, Completion)
        tokenizer = self._loaded.chat.tokenizer
        if isinstance(body.prompt, str):
            self._check_length(len(body.prompt))
            # A prompt that begins with BOS, as a rendered chat does, gets no second one.
            bare = bool(tokenizer.bos_token) and body.prompt.startswith(tokenizer.bos_token)
            ids = await asyncio.to_thread(
                tokenizer.encode, body.prompt, add_special_tokens=not bare
            )
        else:
            ids = body.prompt
            if not all(0 <= number < len(tokenizer) for number in ids):
                raise ApiError(400, "a token id outside the vocabulary", param="prompt")
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return await self._answer(request, body, ids, body.max_tokens, chat=False)

    async def _chat_ids(self, body: Messages) -> list[int]:
        messages = [message.plain() for message in body.messages]
        turns = [m.role for m in messages[messages[0].role == "system" :]]
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ApiError(
                400,
                "after an optional system message, user and assistant alternate; user comes last",
                param="messages",
            )
        self._check_length(sum(len(message.content) for message in messages))
        try:
            return await asyncio.to_thread(self._loaded.chat.prompt_ids, messages)
        except (FintuneError, jinja2.TemplateError):
            raise ApiError(400, "the chat template refuses these messages") from None

    def _check_length(self, characters: int) -> None:
        if characters > CHARACTERS_PER_TOKEN * self._loaded.context:
            raise ApiError(400, "the prompt is too long", "context_length_exceeded")

    async def _answer(
        self, request: Request, body: Sampling, ids: list[int], wanted: int | None, *, chat: bool
    ) -> Any:
        room = self._loaded.context - len(ids)
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"{len(ids)} prompt tokens and {wanted or 1} to answer exceed the context of"
                f" {self._loaded.context}",
                "context_length_exceeded",
            )
        answer = Answer(ids, body, min(wanted or DEFAULT_TOKENS, room), chat=chat)
        if self._engine.failed:
            raise ApiError(503, "the model failed; restart the server", "server_error")
        try:
            self._engine.submit(answer.job)
        except Busy:
            raise ApiError(429, "too many requests are waiting; try again", "queue_full") from None
        if body.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await _unless_gone(request, answer.whole())


def build(loaded: Loaded, engine: Engine, *, folder: Path, run: Path) -> FastAPI:
    """The app.

    Args:
        folder: the release, whose verdict and held-out questions the page shows.
        run: folder of the training run, whose metrics the page draws, where it is at hand.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(loaded, engine, folder, run)
    for path, endpoint, method in (
        ("/", server.page, "GET"),
        ("/health", server.health, "GET"),
        ("/run.json", server.run, "GET"),
        ("/v1/models", server.models, "GET"),
        ("/v1/models/{name}", server.model, "GET"),
        ("/v1/chat/completions", server.chat, "POST"),
        ("/v1/completions", server.completion, "POST"),
        ("/tokenize", server.tokenize, "POST"),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, ApiError):
            headers = {"Retry-After": "1"} if error.status == 429 else None
            return JSONResponse(error.body, error.status, headers)
        if isinstance(error, HTTPException):
            return JSONResponse(error_body(str(error.detail), "not_found"), error.status_code)
        if isinstance(error, TimeoutError):
            return JSONResponse(error_body("the answer took too long", "timeout"), 408)
        return JSONResponse(error_body("a defect of the server", "server_error"), 500)

    for kind in (ApiError, HTTPException, TimeoutError, Exception):
        app.add_exception_handler(kind, refused)
    return app


def _examples(path: Path) -> list[dict[str, str]]:
    """Short held-out questions with their answers, of each task in turn, no answer twice."""
    rows = list(read_jsonl(path)) if path.is_file() else []
    tasks: dict[str, dict[str, str]] = {}
    rows = [row for row in rows if {"task", "question", "reference"} <= row.keys()]
    for row in sorted(rows, key=lambda row: len(row["question"])):
        tasks.setdefault(row["task"], {}).setdefault(row["reference"], row["question"])
    turns = itertools.zip_longest(*(found.items() for found in tasks.values()))
    pairs = [pair for turn in turns for pair in turn if pair]
    return [{"question": text, "reference": said} for said, text in pairs[:EXAMPLES]]


async def _unless_gone(request: Request, answer: Any) -> Any:
    """Await an answer, but stop making it when the client hangs up."""
    making = asyncio.ensure_future(answer)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watching = asyncio.ensure_future(gone())
    await asyncio.wait({making, watching}, return_when=asyncio.FIRST_COMPLETED)
    if making.done():
        watching.cancel()
        return making.result()
    making.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await making
    return JSONResponse(error_body("the client hung up"), 499)
