"""The server as the official openai client sees it, and as a careless or hostile client does."""

import gzip
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import tiny
import torch
from tiny_server import served

from fintune.config import ModelConfig
from fintune.example import Message
from fintune.model import adapter_set, find_base, load_release
from fintune.serve import app, protocol

openai = pytest.importorskip("openai", reason="the official openai client is not installed")

HEALTH = b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n"
ASK = [{"role": "user", "content": "What is EBITDA?"}]


@pytest.fixture(scope="module")
def client(server: tiny.Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def said(client: Any, **changes: Any) -> Any:
    asked = {"model": "adapter", "messages": ASK, "max_tokens": 12} | changes
    return client.chat.completions.create(**asked)


def completed(client: Any, **changes: Any) -> Any:
    asked = {"model": "adapter", "prompt": "EBITDA is", "max_tokens": 12} | changes
    return client.completions.create(**asked)


@pytest.mark.parametrize("who", ["base", "adapter"])
def test_chat_whole_and_streamed_say_the_same(client: Any, who: str) -> None:
    whole = said(client, model=who)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 12 and whole.model == who
    chunks = list(said(client, model=who, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in {"stop", "length"}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    pieces = [c.choices[0].text for c in completed(client, model=who, stream=True)]
    assert "".join(pieces) == completed(client, model=who).choices[0].text


def test_stop_strings_cut_also_across_pieces(client: Any) -> None:
    text = said(client, model="base", max_tokens=40).choices[0].message.content
    for start in (3, 9, 17):
        stop = text[start : start + 4]
        cut = said(client, model="base", max_tokens=40, stop=[stop, "never said"]).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text[: text.find(stop)], "stop")
        chunks = said(client, model="base", max_tokens=40, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut.message.content


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "adapter"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"


TURN = {"role": "assistant", "content": "It is."}
SYSTEM = {"role": "system", "content": "Be exact."}
DUMPED = {**TURN, "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
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
    (said, {"tools": [], "logit_bias": {}, "presence_penalty": 0, "store": False}),
    (said, {"response_format": {"type": "text"}, "extra_body": {"tool_choice": "none"}}),
    (said, {"temperature": 1e-320, "extra_body": {"n": None, "logprobs": None}}),
    (said, {"messages": [{"role": "developer", "content": "Short."}, SYSTEM, *ASK]}),
    (said, {"messages": [*ASK, DUMPED, *ASK]}),
    (said, {"logprobs": True, "top_logprobs": 2}),
    (completed, {"prompt": ["a", "b"], "best_of": 1}),
    (completed, {"prompt": [[1, 2], [3]]}),
    (completed, {"echo": True}),
    (said, {"extra_body": {"ignore_eos": True}}),
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
    (said, {"max_tokens": 4000}, "BadRequestError"),
    (said, {"temperature": -1}, "BadRequestError"),
    (said, {"temperature": 9}, "BadRequestError"),
    (said, {"top_p": 0}, "BadRequestError"),
    (said, {"n": 4}, "BadRequestError"),
    (said, {"stop": ["x"] * 9}, "BadRequestError"),
    (said, {"stop": ""}, "BadRequestError"),
    (said, {"seed": 2**70}, "BadRequestError"),
    (said, {"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "BadRequestError"),
    (said, {"extra_body": {"stream": "yes"}}, "BadRequestError"),
    (completed, {"prompt": ""}, "ok"),
    (completed, {"prompt": [10**9]}, "BadRequestError"),
    (completed, {"prompt": [-1]}, "BadRequestError"),
    (completed, {"best_of": 3}, "BadRequestError"),
    (completed, {"max_tokens": 0}, "BadRequestError"),
    (said, {"tools": [{"type": "function"}]}, "BadRequestError"),
    (said, {"response_format": {"type": "json_object"}}, "BadRequestError"),
    (said, {"messages": [{"role": "user", "content": [IMAGE]}]}, "BadRequestError"),
    (said, {"logprobs": True, "stream": True}, "BadRequestError"),
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


def post(server: Any, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    sent = {"Host": "localhost", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in sent.items() if value]
    return raw(server, "\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(server: Any, data: bytes) -> tuple[int, Any]:
    """Status and body of the answer to these bytes; the body as JSON where it says it is."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    kind = response.headers["Content-Type"]
    return response.status, json.loads(body) if kind == "application/json" else body.decode()


def test_guards(server: Any) -> None:
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


def test_what_is_refused_before_the_app(server: Any) -> None:
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


def test_every_answer_carries_the_security_headers(server: Any) -> None:
    for host in ("localhost", "evil.example"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
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
def test_damaged_files_of_the_run_are_left_out(server: Any, damage: bytes) -> None:
    metrics = server.release.parent / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.write_bytes(damage)
    try:
        tree = server.get("/run.json")
        assert tree["results"]["verdict"] == "no_detectable_difference" and tree["examples"]
        assert tree["metrics"] == [{"step": 1}][: damage.startswith(b'{"step": 1}')]
    finally:
        metrics.write_bytes(before)


FUZZED = 1000 if os.environ.get("FINTUNE_TEST_ALL") else 300
FIELDS = (*protocol.ChatRequest.model_fields, *protocol.CompletionRequest.model_fields)
SCORED = {"echo": True, "logprobs": 2, "prompt_logprobs": 1}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": ASK}),
    ("/v1/chat/completions", {"messages": [SYSTEM, *ASK, DUMPED, PART], "logprobs": True}),
    ("/v1/chat/completions", {"messages": ASK, "stream": True, "stream_options": {}, "stop": []}),
    ("/v1/completions", {"prompt": ["a", "b"], "temperature": 1.5, "top_p": 0.5, "seed": 1}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], **SCORED}),
    ("/v1/completions", {"prompt": "a", "stream": True, "stop": "x", "ignore_eos": True}),
    ("/tokenize", {"messages": ASK}),
]


def test_fuzzed_bodies_are_answered_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never 5xx, also inside a stream, never without an answer; and the server lives on."""
    monkeypatch.setattr(app, "DEFAULT_TOKENS", 4)
    rng, statuses = random.Random(25), list[int]()
    keys = (*FIELDS, *protocol.NEUTRAL, *fuzz.KEYS)
    with served() as server:
        for number in range(FUZZED):
            path, row = rng.choice(BODIES)
            row = {"model": rng.choice(["base", "adapter"]), "max_tokens": 4, **row}
            body = json.dumps(fuzz.changed(row, rng, keys)).encode()
            if rng.random() < 0.3:
                body = fuzz.line(row, rng, keys)
            status, tree = post(server, path, body)
            message = (number, path, body[:400], status, tree)
            statuses.append(status)
            if status == 200:
                assert "server_error" not in str(tree), message
            else:
                assert status in (400, 404, 413) and tree["error"]["message"], message
        _, tree = raw(server, HEALTH)
        assert tree == {"status": "ok", "running": 0, "waiting": 0}
    assert statuses.count(200) > FUZZED / 6 and statuses.count(400) > FUZZED / 5


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


def test_hanging_up_frees_the_row(server: Any, client: Any) -> None:
    stream = said(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    asked = {"model": "base", "max_tokens": 1900, "ignore_eos": True}
    several = asked | {"prompt": ["a", "b", "c"]}
    for path, more in (("chat/completions", asked | {"messages": ASK}), ("completions", several)):
        body = json.dumps(more).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
            time.sleep(0.1)
    time.sleep(0.1)
    for _ in range(40):
        status, tree = raw(server, HEALTH)
        if (status, tree["running"], tree["waiting"]) == (200, 0, 0):
            return
        time.sleep(0.02)
    raise AssertionError("a row outlived its client")


def test_long_prompts_run_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch are bounded in tokens, padding included, and the answers stay the same."""
    prompts, seen, done = ["what is a bond " * 12, *"abcde"], list[int](), threading.Event()
    more = {"prompt": prompts, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    with served() as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        free = completed(client, **more)
        longest = completed(client, prompt=prompts[0], max_tokens=1).usage.prompt_tokens
        monkeypatch.setattr("fintune.serve.engine.CACHE_TOKENS", 3 * longest)

        def watch() -> None:
            while not done.is_set():
                seen.append(raw(server, HEALTH)[1]["running"])

        watching = threading.Thread(target=watch)
        watching.start()
        bounded = completed(client, **more)
        done.set()
        watching.join()
    assert [each.text for each in bounded.choices] == [each.text for each in free.choices]
    assert 1 < max(seen) <= 3


def test_all_that_is_refused_is_named_at_once_in_plain_words(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": [IMAGE]}], "stop": ["x"] * 9, "tools": [{}]}
    status, text = server.ask(
        "/v1/chat/completions", {**body, "presence_penalty": 1, "nonsense": 2}
    )
    message = json.loads(text)["error"]["message"]
    assert status == 400
    for words in (
        "model: is missing",
        "a list of 1 to 64 text parts",
        "at most 8 of them",
        "tools: this server calls no tools",
        "presence_penalty: this server has no penalties",
        "nonsense: no such field",
    ):
        assert words in message, message


def test_a_load_test_gets_as_many_tokens_as_it_asks_for_and_counts_them(client: Any) -> None:
    """guidellm's body: past the end of an answer, with the usage of every piece."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for call in (said, completed):
        ends = [call(client, seed=seed, temperature=2, max_tokens=60) for seed in range(8)]
        seed = next(at for at, end in enumerate(ends) if end.choices[0].finish_reason == "stop")
        asked = {"seed": seed, "temperature": 2, "max_tokens": 60}
        asked["extra_body"] = {"ignore_eos": True}
        chunks = list(call(client, stream=True, stream_options=options, **asked))
        counts = [c.usage.completion_tokens for c in chunks if c.usage]
        assert counts == sorted(counts) and len(counts) > 2 and counts[-1] == 60
        assert call(client, **asked).usage.completion_tokens == 60


def test_a_path_that_is_not_there_is_told_in_words(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="no such path; there are /v1/chat/completions"):
        client.responses.create(model="adapter", input="What is EBITDA?")


def test_log_probabilities_are_those_of_a_forward_pass(server: Any, chain: Any) -> None:
    """As lm-eval asks for them: the prompt given back, one token more."""
    loaded = load_release(chain.release, find_base(ModelConfig(id="test/tiny", path=tiny.base())))
    ids = loaded.chat.prompt_ids([Message("user", "What is EBITDA?")])
    for who, adapter in (("adapter", True), ("base", False)):
        asked = {"model": who, "prompt": [ids, ids[:9]], "max_tokens": 1, "echo": True}
        found = server.get("/v1/completions", {**asked, "logprobs": 1, "prompt_logprobs": 0})
        for index, prompt in enumerate((ids, ids[:9])):
            choice = found["choices"][index]
            rows = choice["logprobs"]
            with torch.inference_mode(), adapter_set(loaded.model, adapter):
                logits = loaded.model(input_ids=torch.tensor([prompt])).logits[0]
            wanted = logits.log_softmax(-1)
            own = wanted[:-1].gather(-1, torch.tensor(prompt)[1:, None])[:, 0]
            assert rows["token_logprobs"][0] is None and len(rows["tokens"]) == len(prompt) + 1
            served = torch.tensor(rows["token_logprobs"][1:-1])
            torch.testing.assert_close(served, own, atol=1e-4, rtol=0)
            best = loaded.chat.tokenizer.decode(int(wanted[-1].argmax()))
            assert rows["tokens"][-1] == best and best in rows["top_logprobs"][-1]
            assert len(choice["prompt_logprobs"]) == len(prompt)
