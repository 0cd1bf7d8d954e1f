"""An OpenAI-compatible server with two models, `base` and `adapter`, over one copy of the weights.

Unknown fields are refused rather than ignored: a client that asks for what is not there should
hear so. For load beyond one process use vLLM (`fintune export vllm` prints its command).
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fintune.errors import FintuneError
from fintune.model import LoadedRelease
from fintune.serve.engine import Engine, QueueFull, max_context
from fintune.serve.errors import ApiError, error_body, error_response
from fintune.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    SamplingRequest,
    TokenizeRequest,
)
from fintune.serve.streaming import Answer
from fintune.untrusted.checks import JUDGED, RESULTS

MODELS = ("base", "adapter")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/", "/health")
"""Readable without a key: the page (which asks for the key) and whether the server lives."""
MAX_BODY = 1 << 20
DEFAULT_TOKENS = 256
CHARACTERS_PER_TOKEN = 64
"""A prompt with more characters than this times the context cannot fit, and is not tokenised."""
MAX_SIBLING = 16 << 20
"""Bytes of a run's file that the page may show."""
EXAMPLES = 4
"""Held-out questions that the page offers to click."""
PAGE = Path(__file__).parent / "page" / "index.html"


class _Server:
    """The endpoints; `build_app` puts them on an app."""

    def __init__(self, loaded: LoadedRelease, engine: Engine, folder: Path, run: Path) -> None:
        self._loaded, self._engine = loaded, engine
        self._folder, self._run = folder, run
        self._context = max_context(loaded)
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

    async def health(self) -> Response:
        running, waiting = self._engine.load
        state = {"status": "failed" if self._engine.failed else "ok"}
        return JSONResponse(
            state | {"running": running, "waiting": waiting}, 503 if self._engine.failed else 200
        )

    async def page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def run(self) -> dict[str, Any]:
        """What the page shows beside answers: held-out questions, the verdict, logged steps."""
        judged, metrics = _rows(self._folder / JUDGED), _rows(self._run / "metrics.jsonl")
        results = _rows(self._folder / RESULTS, whole=True)
        return {
            "name": self._folder.resolve().parent.name + "/" + self._folder.resolve().name,
            "base": {"id": self._loaded.base.id, "revision": self._loaded.base.revision},
            "results": results[0] if results else None,
            "examples": _examples(judged),
            "metrics": metrics,
        }

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        ids = await self._prompt_ids(body)
        tokenizer = self._loaded.chat.tokenizer
        return {
            "count": len(ids),
            "max_model_len": self._context,
            "tokens": ids,
            "token_strs": [tokenizer.decode([number]) for number in ids],
            "prompt": tokenizer.decode(ids),
        }

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        limit = body.max_completion_tokens or body.max_tokens
        return await self._answer(request, body, await self._prompt_ids(body), limit)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        tokenizer = self._loaded.chat.tokenizer
        if isinstance(body.prompt, str):
            self._check_length(len(body.prompt))
            # A prompt that begins with BOS, as a rendered chat does, gets no second one.
            has_bos = bool(tokenizer.bos_token) and body.prompt.startswith(tokenizer.bos_token)
            ids = await asyncio.to_thread(
                tokenizer.encode, body.prompt, add_special_tokens=not has_bos
            )
        else:
            ids = body.prompt
            if not all(0 <= number < len(tokenizer) for number in ids):
                raise ApiError(400, "a token id outside the vocabulary", "invalid_value", "prompt")
        if not ids:
            raise ApiError(400, "the prompt is empty", "invalid_value", "prompt")
        return await self._answer(request, body, ids, body.max_tokens)

    async def _prompt_ids(self, body: Conversation) -> list[int]:
        messages = [message.as_message() for message in body.messages]
        turns = [m.role for m in messages[messages[0].role == "system" :]]
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            rule = "after an optional system message, user and assistant alternate; user comes last"
            raise ApiError(400, rule, "invalid_value", "messages")
        self._check_length(sum(len(message.content) for message in messages))
        try:
            return await asyncio.to_thread(self._loaded.chat.prompt_ids, messages)
        except (FintuneError, jinja2.TemplateError):
            message = "the chat template refuses these messages"
            raise ApiError(400, message, "invalid_value", "messages") from None

    def _check_length(self, characters: int) -> None:
        if characters > CHARACTERS_PER_TOKEN * self._context:
            raise ApiError(400, "the prompt is too long", "context_length_exceeded")

    async def _answer(
        self, request: Request, body: SamplingRequest, ids: list[int], limit: int | None
    ) -> Response:
        remaining = self._context - len(ids)
        if remaining < (limit or 1):
            raise ApiError(
                400,
                f"{len(ids)} prompt tokens and {limit or 1} to answer exceed the context of"
                f" {self._context}",
                "context_length_exceeded",
            )
        if self._engine.failed:
            raise ApiError(503, "the model failed; restart the server", "server_error")
        tokenizer = self._loaded.chat.tokenizer.backend_tokenizer
        answer = Answer(ids, body, min(limit or DEFAULT_TOKENS, remaining), tokenizer)
        try:
            self._engine.submit(answer.request)
        except QueueFull:
            raise ApiError(429, "too many requests are waiting; try again", "queue_full") from None
        if body.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await _unless_disconnected(request, answer.whole())


def build_app(
    loaded: LoadedRelease,
    engine: Engine,
    *,
    folder: Path,
    run: Path,
    key: str | None,
    hosts: tuple[str, ...],
) -> FastAPI:
    """The app.

    Args:
        folder: the release, whose verdict and held-out questions the page shows.
        run: folder of the training run, whose metrics the page draws, where it is at hand.
        key: the API key, or None where none is required; only its hash is kept.
        hosts: names that a Host header may give; `*` for any. An allow-list keeps a page elsewhere
            from reaching a loopback server by DNS rebinding.
    """
    # FastAPI reads a body as JSON only under a JSON content type, so no form of another page posts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, max_body_size=MAX_BODY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    for kind in (RequestValidationError, HTTPException, TimeoutError, Exception):
        app.add_exception_handler(kind, error_response)
    server = _Server(loaded, engine, folder, run)
    routes: tuple[tuple[str, Callable[..., Any], str], ...] = (
        ("/", server.page, "GET"),
        ("/health", server.health, "GET"),
        ("/run.json", server.run, "GET"),
        ("/v1/models", server.models, "GET"),
        ("/v1/models/{name}", server.model, "GET"),
        ("/v1/chat/completions", server.chat, "POST"),
        ("/v1/completions", server.completion, "POST"),
        ("/tokenize", server.tokenize, "POST"),
    )
    for path, endpoint, method in routes:
        guards = [Depends(_KeyCheck(key))] if key and path not in OPEN_PATHS else []
        app.add_api_route(
            path, endpoint, methods=[method], response_model=None, dependencies=guards
        )
    return app


class _KeyCheck:
    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        # Both sides hashed: equal lengths, and compared in constant time (CVE-2025-59425).
        if not hmac.compare_digest(hashlib.sha256(given).digest(), self._digest):
            message = "a valid API key is required (Authorization: Bearer)"
            raise ApiError(401, message, "invalid_api_key")


def _rows(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """JSON objects of a file of the run, a line each or one in all; what is damaged is left out."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIBLING).decode("utf-8", "replace")
    except OSError:
        return []
    rows = []
    for line in [text] if whole else text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            tree = json.loads(line)
            json.dumps(tree, allow_nan=False, ensure_ascii=False).encode()  # can it be sent?
            rows += [tree] if isinstance(tree, dict) else []
    return rows


def _examples(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Short held-out questions with their answers, of each task in turn, no answer twice."""
    keys = ("task", "question", "reference")
    rows = [row for row in rows if all(isinstance(row.get(key), str) for key in keys)]
    tasks: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: len(row["question"])):
        tasks.setdefault(row["task"], {}).setdefault(row["reference"], row["question"])
    turns = itertools.zip_longest(*(answers.items() for answers in tasks.values()))
    pairs = [pair for turn in turns for pair in turn if pair]
    return [{"question": question, "reference": text} for text, question in pairs[:EXAMPLES]]


async def _unless_disconnected(request: Request, answer: Awaitable[dict[str, Any]]) -> Response:
    """Await an answer, but stop making it when the client hangs up."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    making, watching = asyncio.ensure_future(answer), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({making, watching}, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return JSONResponse(making.result())
        return JSONResponse(error_body("the client hung up", "disconnected"), 499)
    finally:
        making.cancel()
        watching.cancel()
