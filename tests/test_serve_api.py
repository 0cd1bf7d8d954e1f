"""The server as the official openai client sees it, and as a careless or hostile client does."""

import gzip
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Served, greedy, served

from fintune.example import Message

openai = pytest.importorskip("openai", reason="the official openai client is not installed")

ASK = [{"role": "user", "content": "What is EBITDA?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(server: Served, who: str, text: str, limit: int) -> str:
    ids = server.loaded.chat.prompt_ids([Message("user", text)])
    return greedy(server.loaded, who, ids, limit)


def said(client: Any, **changes: Any) -> Any:
    asked = {"model": "adapter", "messages": ASK, "max_tokens": 12} | changes
    return client.chat.completions.create(**asked)


def completed(client: Any, **changes: Any) -> Any:
    asked = {"model": "adapter", "prompt": "EBITDA is", "max_tokens": 12} | changes
    return client.completions.create(**asked)


@pytest.mark.parametrize("who", ["base", "adapter"])
def test_chat_whole_and_streamed_say_the_same(server: Served, client: Any, who: str) -> None:
    whole = said(client, model=who)
    text = whole.choices[0].message.content
    assert text == expected(server, who, ASK[0]["content"], 12)
    assert whole.usage.prompt_tokens == len(server.loaded.chat.prompt_ids([Message(**ASK[0])]))
    assert whole.usage.completion_tokens <= 12 and whole.model == who
    chunks = list(said(client, model=who, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_base_and_adapter_differ(client: Any) -> None:
    answers = {said(client, model=who).choices[0].message.content for who in ("base", "adapter")}
    assert len(answers) == 2


def test_stop_strings_cut_also_across_pieces(client: Any) -> None:
    text = said(client, max_tokens=40).choices[0].message.content
    for start in (3, 9, 17):
        stop = text[start : start + 4]
        cut = said(client, max_tokens=40, stop=[stop, "never said"]).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text[: text.find(stop)], "stop")
        chunks = said(client, max_tokens=40, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut.message.content


def test_seed_repeats_a_sampled_answer(client: Any) -> None:
    def sample(seed: int) -> str:
        found = said(client, temperature=1.5, top_p=0.9, seed=seed, max_tokens=20)
        return str(found.choices[0].message.content)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_completions_take_text_and_ids(server: Served, client: Any) -> None:
    tokenizer = server.loaded.chat.tokenizer
    text = completed(client)
    ids = completed(client, prompt=tokenizer.encode("EBITDA is"))
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage.prompt_tokens == len(tokenizer.encode("EBITDA is"))
    rendered = server.loaded.chat.render([Message(**ASK[0])], prompt=True)
    chat = said(client)
    same = completed(client, prompt=rendered)
    assert same.usage.prompt_tokens == chat.usage.prompt_tokens  # no second BOS
    assert same.choices[0].text == chat.choices[0].message.content
    pieces = [c.choices[0].text for c in completed(client, stream=True)]
    assert "".join(pieces) == text.choices[0].text


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "adapter"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"


TURN = {"role": "assistant", "content": "It is."}
PART = {"role": "user", "content": [{"type": "text", "text": "What is EBITDA?"}]}
ACCEPTED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (said, {}),
    (said, {"messages": [PART]}),
    (said, {"messages": [{"role": "system", "content": "Short."}, *ASK]}),
    (said, {"messages": [*ASK, TURN, *ASK]}),
    (said, {"messages": [{"role": "system", "content": ""}, *ASK, TURN, *ASK]}),
    (said, {"messages": [{"role": "user", "content": "<|eot_id|> spelled out"}]}),
    (said, {"messages": [{"role": "user", "content": "€ 兆 🙂 \u200b"}]}),
    (said, {"max_tokens": None, "max_completion_tokens": 5}),
    (said, {"max_tokens": 1}),
    (said, {"temperature": 0}),
    (said, {"temperature": 2}),
    (said, {"temperature": 0.7, "top_p": 0.1}),
    (said, {"top_p": 1}),
    (said, {"seed": 0}),
    (said, {"seed": -7, "temperature": 1}),
    (said, {"stop": "x"}),
    (said, {"stop": ["x", "y"]}),
    (said, {"stop": []}),
    (said, {"n": 1}),
    (said, {"user": "someone"}),
    (said, {"stream": False}),
    (completed, {}),
    (completed, {"prompt": " "}),
    (completed, {"prompt": [1, 2, 3]}),
    (completed, {"model": "base"}),
    (completed, {"stop": ["\n"]}),
    (completed, {"temperature": 1, "seed": 3}),
    (completed, {"prompt": "<|begin_of_text|>EBITDA"}),
    (said, {"stream_options": {"include_usage": True}}),
]
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (said, {"model": "gpt-4"}, "NotFoundError"),
    (said, {"messages": []}, "BadRequestError"),
    (said, {"messages": [TURN]}, "BadRequestError"),
    (said, {"messages": [*ASK, *ASK]}, "BadRequestError"),
    (said, {"messages": [*ASK, TURN]}, "BadRequestError"),
    (said, {"messages": [{"role": "tool", "content": "x"}]}, "BadRequestError"),
    (said, {"messages": [{"role": "user", "content": None}]}, "BadRequestError"),
    (said, {"messages": [{"role": "user", "content": 5}]}, "BadRequestError"),
    (said, {"messages": [{"role": "user", "content": "a " * 60_000}]}, "BadRequestError"),
    (said, {"max_tokens": 0}, "BadRequestError"),
    (said, {"max_tokens": -1}, "BadRequestError"),
    (said, {"max_tokens": 1_000_000}, "BadRequestError"),
    (said, {"max_tokens": 600}, "BadRequestError"),
    (said, {"temperature": -1}, "BadRequestError"),
    (said, {"temperature": 9}, "BadRequestError"),
    (said, {"top_p": 0}, "BadRequestError"),
    (said, {"n": 4}, "BadRequestError"),
    (said, {"stop": ["x"] * 9}, "BadRequestError"),
    (said, {"stop": ""}, "BadRequestError"),
    (said, {"seed": 2**70}, "BadRequestError"),
    (said, {"tools": []}, "BadRequestError"),
    (said, {"logprobs": True}, "BadRequestError"),
    (said, {"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "BadRequestError"),
    (said, {"extra_body": {"stream": "yes"}}, "BadRequestError"),
    (completed, {"prompt": ""}, "ok"),
    (completed, {"prompt": [10**9]}, "BadRequestError"),
    (completed, {"prompt": [-1]}, "BadRequestError"),
    (completed, {"prompt": ["a", "b"]}, "BadRequestError"),
    (completed, {"best_of": 3}, "BadRequestError"),
    (completed, {"echo": True}, "BadRequestError"),
    (completed, {"model": ""}, "NotFoundError"),
    (said, {"extra_body": {"stop": [1]}}, "BadRequestError"),
]


def test_openai_client_accepted_cases(client: Any) -> None:
    assert len(ACCEPTED) + len(REFUSED) >= 60
    for number, (call, changes) in enumerate(ACCEPTED):
        found = call(client, **changes)
        assert found.choices[0].finish_reason in {"stop", "length"}, (number, changes)
        assert found.usage.total_tokens == (
            found.usage.prompt_tokens + found.usage.completion_tokens
        )


def test_openai_client_refused_cases(client: Any) -> None:
    for number, (call, changes, kind) in enumerate(REFUSED):
        if kind == "ok":  # an empty text is BOS alone
            assert call(client, **changes).usage.prompt_tokens == 1
            continue
        with pytest.raises(getattr(openai, kind)) as refused:
            call(client, **changes)
        assert refused.value.body["message"] and refused.value.body["type"], (number, changes)


def test_tokenize_gives_the_trained_ids(server: Served) -> None:
    body = json.dumps({"messages": ASK}).encode()
    status, tree = post(server, "/tokenize", body)
    assert status == 200
    assert tree["tokens"] == server.loaded.chat.prompt_ids([Message(**ASK[0])])
    assert "".join(tree["token_strs"]) == tree["prompt"]


def post(server: Served, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    sent = {"Host": "localhost", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in sent.items() if value]
    return raw(server, "\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(server: Served, data: bytes) -> tuple[int, Any]:
    """Status and body of the answer to these bytes; the body as JSON where it says it is."""
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    kind = response.headers["Content-Type"]
    return response.status, json.loads(body) if kind == "application/json" else body.decode()


def test_guards(server: Served) -> None:
    """Sizes, types, nonsense: 4xx in OpenAI's shape, at once."""
    good = json.dumps({"model": "base", "messages": ASK, "max_tokens": 1}).encode()
    path = "/v1/chat/completions"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    cases = [
        (post(server, path, good), 200),
        (post(server, path, good, Content_Type="application/json; charset=utf-8"), 200),
        (post(server, path, b"{" + b" " * (1 << 20) + b"}"), 413),
        (raw(server, head + b"Content-Length: 1073741824\r\n\r\n"), 413),
        (raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17), 413),
        (post(server, path, good, Content_Type="text/plain"), 400),
        (post(server, path, good, Content_Type=""), 400),
        (post(server, path, good, Content_Type="application/x-www-form-urlencoded"), 400),
        (post(server, path, gzip.compress(good), Content_Encoding="gzip"), 400),
        (post(server, path, b"[" * 100_000), 400),
        (post(server, path, b"[]"), 400),
        (post(server, path, b""), 400),
        (post(server, path, b'{"model": NaN}'), 400),
        (post(server, path, b'{"max_tokens": 1' + b"0" * 9_000 + b"}"), 400),
        (post(server, path, b'{"model": "base", "\\ud800": 1}'), 400),
        (post(server, path, b"\xff\xfe"), 400),
        (post(server, "/v1/nothing", good), 404),
        (raw(server, b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"), 405),
        (raw(server, b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"), 405),
    ]
    for number, ((status, tree), wanted) in enumerate(cases):
        assert status == wanted, (number, status, tree)
        # Bodies that are too large are refused before the app, in plain text.
        assert status in (200, 413) or tree["error"]["message"], number


def test_what_is_refused_before_the_app(server: Served) -> None:
    """Other Hosts (DNS rebinding), headers without end, two lengths, bytes that are no HTTP."""
    good = json.dumps({"model": "base", "messages": ASK, "max_tokens": 1}).encode()
    path = "/v1/chat/completions"
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]"):
        assert post(server, path, good, Host=host)[0] == 400, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
        assert post(server, path, good, Host=host)[0] == 200, host
    cases = (
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * 60_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
    )
    for data in cases:
        assert raw(server, data)[0] == 400, data[:60]
    both = b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    status, _ = raw(server, b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n" + both + smuggled)
    assert status == 400, "the chunked, empty body counts"


def test_every_answer_carries_the_security_headers(server: Served) -> None:
    for host in ("localhost", "evil.example"):
        connection = http.client.HTTPConnection(*server.address)
        connection.request("GET", "/", headers={"Host": host})
        headers = connection.getresponse().headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers and "server" not in headers
        connection.close()


def test_a_too_large_body_is_said_to_the_client(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        said(client, messages=[{"role": "user", "content": "a" * (3 << 20)}])
    assert refused.value.status_code == 413


@pytest.mark.parametrize(
    "damage", [b'{"step": 1}\n{"st', b'{"step": NaN}\n[1]\n\xff', b"[" * 10**6]
)
def test_damaged_files_of_the_run_are_left_out(server: Served, damage: bytes) -> None:
    metrics = server.folder.parent / "run" / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else None
    metrics.write_bytes(damage)
    try:
        status, tree = raw(server, b"GET /run.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status == 200 and tree["results"]["verdict"] == "better" and tree["examples"]
        assert tree["metrics"] == [{"step": 1}][: damage.startswith(b'{"step": 1}')]
    finally:
        metrics.unlink()
        if before is not None:
            metrics.write_bytes(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_model_says_500_and_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 5}).encode()
        embedding = server.loaded.model.get_input_embeddings()
        monkeypatch.setattr(embedding, "forward", lambda *_: 1 / 0)
        status, tree = post(server, "/v1/completions", body)
        assert status == 500 and "division" not in str(tree) and tree["error"]["message"]
        assert post(server, "/v1/completions", body)[0] == 503
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 503


def test_key_is_required_where_one_is_set() -> None:
    key = "k" * 32
    with served(key=key) as server:
        good = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1}).encode()
        path = "/v1/completions"
        assert post(server, path, good)[0] == 401
        for wrong in ("", key[:-1], key + "k", key.upper(), "\xe9" * 32):
            status, tree = post(server, path, good, Authorization=f"Bearer {wrong}")
            assert (status, tree["error"]["code"]) == (401, "invalid_api_key")
        assert post(server, path, good, Authorization=f"Bearer {key}")[0] == 200
        for url, status in (("/", 200), ("/health", 200), ("/run.json", 401), ("/v1/models", 401)):
            assert (
                raw(server, f"GET {url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())[0] == status
            )


def test_concurrent_clients_get_their_own_answers(server: Served, client: Any) -> None:
    """32 at once over one batch of base and adapter; each equals the answer made alone."""
    asked = [(f"What is {n} of {n * 13}?" + " margin" * (n % 7)) for n in range(32)]
    who = ["adapter" if n % 2 else "base" for n in range(32)]
    alone = [expected(server, name, text, 16) for name, text in zip(who, asked, strict=True)]

    def ask(number: int) -> str:
        messages = [{"role": "user", "content": asked[number]}]
        found = said(client, model=who[number], messages=messages, max_tokens=16)
        return str(found.choices[0].message.content)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == alone


def test_hanging_up_frees_the_row(server: Served, client: Any) -> None:
    stream = said(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    body = json.dumps({"model": "base", "messages": ASK, "max_tokens": 400}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(server.address) as connection:
        connection.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
        time.sleep(0.05)
    for _ in range(100):
        status, tree = raw(server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        if (status, tree["running"], tree["waiting"]) == (200, 0, 0):
            return
        time.sleep(0.02)
    raise AssertionError("a row outlived its client")


def test_binding_elsewhere_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fintune.errors import ConfigError
    from fintune.serve.app import serve

    for key in ("", "short"):
        monkeypatch.setenv("FINTUNE_API_KEY", key)
        with pytest.raises(ConfigError, match="needs a key"):
            serve(tmp_path, host="0.0.0.0")
