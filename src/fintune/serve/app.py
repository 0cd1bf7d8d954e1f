"""An OpenAI-compatible server with two models, `base` and `adapter`, over one copy of the weights.

Unknown fields of a request are refused (400), since an ignored one would change the answer
silently. For load beyond one process use vLLM (`fintune export vllm` prints its command).
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fintune import console
from fintune.errors import ConfigError, FintuneError
from fintune.model import LoadedRelease, find_release, load_release, open_release
from fintune.serve import protocol
from fintune.serve.engine import FAILED, MAX_SCORED, Engine, StreamedRequest
from fintune.serve.protocol import ApiError
from fintune.untrusted.checks import JUDGED, RESULTS, read_object

MODELS = ("base", "adapter")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
KEY_VARIABLE = "FINTUNE_API_KEY"
SHORTEST_KEY = 22
"""Characters: 128 bits in base64."""
MAX_BODY = 1 << 20
"""Bytes; a larger body is refused (413) before it is read."""
DEFAULT_TOKENS = 256
LEAST_TEMPERATURE = 1e-3
EXAMPLES = 4
"""Held-out questions that the page proposes."""
PAGE = Path(__file__).parent / "page" / "index.html"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
}


async def _check_key(request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    key = request.app.state.key
    same = key and hmac.compare_digest(given.encode(), key.encode())
    if key and not (same and scheme.lower() == "bearer"):
        message = "a valid API key is required (Authorization: Bearer)"
        raise ApiError(401, message, "invalid_api_key")


public, guarded = APIRouter(), APIRouter(dependencies=[Depends(_check_key)])
"""Endpoints without authentication, and those that need the API key where one is set."""


@public.get("/")
async def page() -> Response:
    """The page that compares base and adapter; the page asks its user for the key."""
    return FileResponse(PAGE)


@public.get("/health")
async def health(request: Request) -> Response:
    """Rows running and requests waiting; status 503 after the model failed."""
    engine = request.app.state.engine
    running, waiting = engine.load
    state = {"status": "failed" if engine.closed else "ok", "running": running, "waiting": waiting}
    return JSONResponse(state, 503 if engine.closed else 200)


@guarded.get("/run.json")
async def run(request: Request) -> Response:
    """Data of the page: held-out questions, test_results.json, the metrics of the training run."""
    folder, base = request.app.state.folder, request.app.state.loaded.base
    rows = [row for row in _objects(folder / JUDGED) if isinstance(row.get("question"), str)]
    # The shortest question of each reference answer.
    rows.sort(key=lambda row: len(row["question"]), reverse=True)
    examples = {str(row.get("reference")): row["question"] for row in rows}
    shortest = sorted(examples.items(), key=lambda pair: len(pair[1]))[:EXAMPLES]
    tree = {
        "name": f"{folder.parent.name}/{folder.name}",
        "base": {"id": base.id, "revision": base.revision, "about": base.about},
        "results": read_object(folder, RESULTS, absent=True) or None,
        "examples": [{"question": question, "reference": text} for text, question in shortest],
        "metrics": list(_objects(folder.parent / "run" / "metrics.jsonl")),
    }
    return Response(to_json(tree, inf_nan_mode="null"), media_type="application/json")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSON Lines file; damaged lines are skipped, no file is no line."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            tree = from_json(line, allow_inf_nan=False)
            if isinstance(tree, dict):
                yield tree


@guarded.get("/v1/models")
@guarded.get("/v1/models/{model}")
async def models(request: Request, model: protocol.ModelName | None = None) -> dict[str, Any]:
    """The two models, or one of them."""
    facts = {"object": "model", "created": request.app.state.started, "owned_by": "fintune"}
    facts |= {"max_model_len": request.app.state.engine.max_context}
    if model:
        return {"id": model, **facts}
    return {"object": "list", "data": [{"id": name, **facts} for name in MODELS]}


@guarded.post("/tokenize")
async def tokenize(request: Request, body: protocol.Conversation) -> dict[str, Any]:
    """The ids of a conversation's prompt."""
    ids, tokenizer = await _prompt_ids(request, body), request.app.state.loaded.chat.tokenizer
    return {
        "count": len(ids),
        "max_model_len": request.app.state.engine.max_context,
        "tokens": ids,
        "token_strs": [tokenizer.decode([number]) for number in ids],
        "prompt": tokenizer.decode(ids),
    }


@guarded.post("/v1/chat/completions")
async def chat(request: Request, body: protocol.ChatRequest) -> Response:
    """An answer through the release's chat template."""
    limit = body.max_completion_tokens or body.max_tokens
    return await _answer(request, body, [await _prompt_ids(request, body)], limit)


@guarded.post("/v1/completions")
async def completion(request: Request, body: protocol.CompletionRequest) -> Response:
    """Continuations of texts or token ids."""
    tokenizer, prompts = request.app.state.loaded.chat.tokenizer, []
    for given in body.prompts():
        if isinstance(given, str):
            # A prompt that begins with BOS, as a rendered chat does, gets no second one.
            special = not given.startswith(tokenizer.bos_token or "\0")
            ids = await asyncio.to_thread(tokenizer.encode, given, add_special_tokens=special)
        else:
            ids = given
        if not ids or not all(0 <= number < len(tokenizer) for number in ids):
            raise _invalid("an empty prompt, or a token id outside the vocabulary", "prompt")
        prompts.append(ids)
    if body.max_tokens == 0 and not body.echo:
        raise _invalid(f"max_tokens: {protocol.RULES['max_tokens']}", "max_tokens")
    return await _answer(request, body, prompts, body.max_tokens)


async def _prompt_ids(request: Request, body: protocol.Conversation) -> list[int]:
    messages = body.conversation()
    turns = [m.role for m in messages[messages[0].role == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        rule = "after an optional system message, user and assistant alternate; user comes last"
        raise _invalid(rule, "messages")
    try:
        return await asyncio.to_thread(request.app.state.loaded.chat.prompt_ids, messages)
    except FintuneError:
        raise _invalid("the chat template refuses these messages", "messages") from None


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param)


async def _answer(
    request: Request, body: protocol.SamplingRequest, prompts: list[list[int]], limit: int | None
) -> Response:
    engine, chat = request.app.state.engine, request.app.state.loaded.chat
    completion = body if isinstance(body, protocol.CompletionRequest) else None
    asked = [getattr(body, name, None) for name in ("logprobs", "prompt_logprobs")]
    scores = any(each is not None and each is not False for each in asked)
    if body.stream and (scores or len(prompts) > 1 or (completion and completion.echo)):
        raise _invalid("a stream has one prompt, no echo and no logprobs", "stream")
    for ids in prompts:
        wanted, context = 1 if limit is None else limit, engine.max_context
        if context - len(ids) < wanted:
            said = f"{len(ids)} prompt tokens and {wanted} more exceed the context of {context}"
            raise ApiError(400, said, "context_length_exceeded")
        if scores and len(ids) + wanted > MAX_SCORED:
            raise _invalid(f"logprobs: of at most {MAX_SCORED} tokens", "logprobs")
    if engine.closed:
        raise ApiError(503, FAILED, "server_error")
    parts = []
    for ids in prompts:
        most = min(DEFAULT_TOKENS if limit is None else limit, engine.max_context - len(ids))
        streamed = StreamedRequest(
            ("cmpl-" if completion else "chatcmpl-") + secrets.token_hex(12),
            ids,
            most,
            adapter=body.model == "adapter",
            # The smallest numbers overflow the logits that they divide, and sample nothing else.
            temperature=body.temperature if body.temperature > LEAST_TEMPERATURE else 0.0,
            top_p=body.top_p,
            seed=body.seed,
            tokenizer=chat.tokenizer.backend_tokenizer,
            reader=chat.reader(thoughts=completion is not None),
            ignore_eos=body.ignore_eos,
            stop_strings=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        )
        parts.append(streamed)
        if most:
            engine.submit(streamed)
    answer = protocol.Answer(parts, body, engine if scores else None, chat.tokenizer.decode)
    if body.stream:
        return StreamingResponse(answer.events(), media_type="text/event-stream")
    return JSONResponse(await answer.whole(request))


@contextlib.contextmanager
def running(
    loaded: LoadedRelease, folder: Path, *, host: str, port: int, key: str | None
) -> Iterator[uvicorn.Server]:
    """A configured server; its engine is closed when the block ends.

    On loopback only local Host names are allowed, against DNS rebinding by a web page.

    Args:
        folder: of the release.
        key: the API key; None: no authentication.
    """
    engine = Engine(loaded)
    # FastAPI parses a body only under a JSON content type, so that no web form can post one.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, max_body_size=MAX_BODY)
    app.state.loaded, app.state.engine, app.state.folder = loaded, engine, folder.resolve()
    app.state.key, app.state.started = key, int(time.time())
    hosts = LOOPBACK if host in LOOPBACK else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    for kind in (RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, protocol.error_response)
    app.include_router(public)
    app.include_router(guarded)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        access_log=False,
        log_level="warning",
        server_header=False,
        headers=[*SECURITY_HEADERS.items()],
        limit_concurrency=512,  # connections; the engine answers 64 requests at once
        timeout_graceful_shutdown=30,
        h11_max_incomplete_event_size=16 << 10,  # bytes of headers
    )
    try:
        yield uvicorn.Server(settings)
    finally:
        engine.close()


def serve(
    folder: Path, *, base: Path | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve a release until stopped.

    Args:
        folder: a release folder; the page shows the curves of the `run` beside it.
        base: folder or GGUF file of its base; absent: as `model.release_base` finds it.
        host: address to bind; anything but loopback needs FINTUNE_API_KEY.

    Raises:
        ConfigError: not loopback and no key of at least 128 bits.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if host not in LOOPBACK and (key is None or len(key) < SHORTEST_KEY):
        raise ConfigError(
            f"binding to {host} needs a key of at least {SHORTEST_KEY} characters",
            why="anyone who reaches the address could use the model",
            fix=f"set {KEY_VARIABLE}, for example to the output of: openssl rand -base64 24",
        )
    folder = find_release(folder)
    loaded = load_release(folder, open_release(folder, base))
    with running(loaded, folder, host=host, port=port, key=key) as server:
        # uvicorn drains, then raises the signal again; a stop on request exits with 0. One that
        # comes before uvicorn listens for it counts too.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        console.say(f"{folder.name} on {loaded.base.id}: open http://{host}:{port}/")
        server.run()
