"""Frozen: the endpoints of `fintune serve`, over real HTTP, and how the process starts and ends."""

import http.client
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import frozen
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "What is EBITDA?"}]
LEAD = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "It is."}


@pytest.fixture(scope="module")
def reference(chain: tiny.Chain) -> Any:
    """Base and adapter in plain transformers and peft."""
    model = AutoModelForCausalLM.from_pretrained(tiny.base())
    return PeftModel.from_pretrained(model, chain.release).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.base())


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for an answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def greedy(model: Any, tokenizer: Any, ids: list[int], limit: int, who: str) -> str:
    """The text of transformers' own greedy answer, its end token left out."""
    given = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": tokenizer.pad_token_id}
    with torch.inference_mode():
        if who == "base":
            with model.disable_adapter():
                made = model.generate(torch.tensor([ids]), **given)
        else:
            made = model.generate(torch.tensor([ids]), **given)
    text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    return str(text).rstrip("\ufffd")  # half a character is held back


def asked(server: tiny.Server, **changes: Any) -> Any:
    """The reply to a chat of one question."""
    return server.get(CHAT, {"model": "adapter", "messages": ASK, "max_tokens": 12, **changes})


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_health_and_models(server: tiny.Server) -> None:
    assert server.get("/health") == {"status": "ok", "running": 0, "waiting": 0}
    models = server.get("/v1/models")
    assert models["object"] == "list"
    assert [row["id"] for row in models["data"]] == ["base", "adapter"]
    assert server.get("/v1/models/adapter") == models["data"][1]
    assert server.ask("/v1/models/gpt-4")[0] == 404


@pytest.mark.parametrize("who", ["base", "adapter"])
@pytest.mark.parametrize(
    "messages", [ASK, [LEAD, *ASK], [*ASK, REPLY, *ASK]], ids=["user", "system", "turns"]
)
def test_a_chat_is_answered_as_transformers_answers(
    server: tiny.Server, reference: Any, tokenizer: Any, who: str, messages: list[dict[str, str]]
) -> None:
    ids = chat_ids(tokenizer, messages)
    found = asked(server, model=who, messages=messages)
    (choice,) = found["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": greedy(reference, tokenizer, ids, 12, who),
    }
    assert choice["finish_reason"] in ("stop", "length")
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["total_tokens"] == len(ids) + usage["completion_tokens"]
    assert (found["object"], found["model"]) == ("chat.completion", who)


@pytest.mark.parametrize("who", ["base", "adapter"])
def test_a_streamed_chat_says_the_same(server: tiny.Server, who: str) -> None:
    whole = asked(server, model=who)
    body = {"model": who, "messages": ASK, "max_tokens": 12, "stream": True}
    status, text = server.ask(CHAT, body | {"stream_options": {"include_usage": True}})
    assert status == 200
    chunks = events(text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == whole["choices"][0]["message"]["content"]
    ends = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert ends == [None] * (len(ends) - 1) + [whole["choices"][0]["finish_reason"]]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])


def test_completions_take_text_and_ids(server: tiny.Server, reference: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("Revenue is")
    assert ids[0] == tokenizer.bos_token_id
    expected = greedy(reference, tokenizer, ids, 12, "adapter")
    for prompt in ("Revenue is", "<|begin_of_text|>Revenue is", ids):
        body = {"model": "adapter", "prompt": prompt, "max_tokens": 12}
        found = server.get(COMPLETIONS, body)
        assert found["choices"][0]["text"] == expected
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert found["object"] == "text_completion"
        status, text = server.ask(COMPLETIONS, body | {"stream": True})
        assert status == 200
        assert "".join(chunk["choices"][0]["text"] for chunk in events(text)) == expected


def test_base_and_adapter_differ(server: tiny.Server) -> None:
    base, adapter = (asked(server, model=who)["choices"][0] for who in ("base", "adapter"))
    assert base["message"] != adapter["message"]


def test_a_seed_repeats_a_sampled_answer_and_a_stop_string_cuts(server: tiny.Server) -> None:
    sampled = [
        asked(server, model="base", temperature=1.5, seed=seed)["choices"][0]["message"]["content"]
        for seed in (3, 3, 4)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    text = asked(server, model="base")["choices"][0]["message"]["content"]
    cut = asked(server, model="base", stop=text[3:6])["choices"][0]
    assert cut["message"]["content"] == text[: text.index(text[3:6])]
    assert cut["finish_reason"] == "stop"


def test_tokenize_gives_the_trained_prompt(server: tiny.Server, chain: tiny.Chain) -> None:
    fixture = frozen.read_json(chain.release / "prompt_fixture.json")
    for row in fixture["conversations"]:
        found = server.get("/tokenize", {"messages": row["messages"][:-1]})
        assert found["tokens"] == row["prompt_ids"]
        assert found["count"] == len(row["prompt_ids"])
        assert (found["prompt"], found["max_model_len"]) == (row["prompt"], 2048)


def test_the_page_and_its_data(server: tiny.Server) -> None:
    status, page = server.ask("/")
    assert status == 200
    assert page.lstrip().lower().startswith("<!doctype html>")
    run = server.get("/run.json")
    assert run["results"]["verdict"] == "no_detectable_difference"
    assert run["base"]["id"] == tiny.BASE_ID
    assert [row["step"] for row in run["metrics"] if "loss" in row] == [*range(1, 25)]
    assert all(set(example) == {"question", "reference"} for example in run["examples"])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"model": "gpt-4", "messages": ASK}, 404, "model"),
        (CHAT, {"model": "adapter", "messages": []}, 400, "messages"),
        (CHAT, {"model": "adapter", "messages": [*ASK, *ASK]}, 400, "messages"),
        (CHAT, {"model": "adapter", "messages": [*ASK, REPLY]}, 400, "messages"),
        (CHAT, {"model": "adapter", "messages": ASK, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"model": "adapter", "messages": ASK, "temperature": 9}, 400, "temperature"),
        (CHAT, {"model": "adapter", "messages": ASK, "n": 4}, 400, "n"),
        (CHAT, {"model": "adapter", "messages": ASK, "tools": [{}]}, 400, "tools"),
        (COMPLETIONS, {"model": "adapter", "prompt": [512]}, 400, "prompt"),
        (COMPLETIONS, {"model": "adapter", "prompt": "x", "suffix": "y"}, 400, "suffix"),
    ],
)
def test_a_body_that_cannot_be_answered_is_refused_by_field(
    server: tiny.Server, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    found, text = server.ask(path, body)
    error = json.loads(text)["error"]
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"]


def test_a_prompt_beyond_the_context_is_refused(server: tiny.Server) -> None:
    long = [{"role": "user", "content": "What is it? " * 2000}]
    status, text = server.ask(CHAT, {"model": "adapter", "messages": long})
    assert (status, json.loads(text)["error"]["code"]) == (400, "context_length_exceeded")


def test_requests_that_are_none(server: tiny.Server) -> None:
    good = {"model": "adapter", "messages": ASK, "max_tokens": 1}
    assert server.ask(CHAT, b"no JSON")[0] == 400
    assert server.ask(CHAT, good, Content_Type="text/plain")[0] == 400
    assert server.ask(CHAT, good, Host="evil.example")[0] == 400
    assert server.ask("/v1/nothing", good)[0] == 404
    assert server.ask(CHAT)[0] == 405
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", CHAT, b"{" + b" " * (1 << 20) + b"}")
    assert connection.getresponse().status == 413
    connection.close()
    assert server.ask(CHAT, b"[" * 100_000)[0] == 400
    assert server.ask(CHAT, b'{"model": NaN}')[0] == 400
    assert server.ask(CHAT, b"\xff\xfe")[0] == 400
    assert server.ask(CHAT, good)[0] == 200


def test_a_client_that_hangs_up_harms_nobody(server: tiny.Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = {"model": "base", "messages": ASK, "max_tokens": 1500, "stream": True}
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().read(10)
    connection.close()
    assert asked(server)["choices"]
    for _ in range(200):
        if server.get("/health") == {"status": "ok", "running": 0, "waiting": 0}:
            return
        time.sleep(0.02)
    raise AssertionError("a row outlived its client")


def test_clients_at_once_get_the_answers_that_each_gets_alone(server: tiny.Server) -> None:
    def answer(number: int) -> str:
        who = "adapter" if number % 2 else "base"
        text = f"What is {number} of {number * 13}?" + " margin" * (number % 7)
        found = asked(server, model=who, messages=[{"role": "user", "content": text}])
        return str(found["choices"][0]["message"]["content"])

    alone = [answer(number) for number in range(24)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(answer, range(24))) == alone


def test_verify_finds_the_trained_prompt_at_the_server(
    server: tiny.Server, chain: tiny.Chain
) -> None:
    given = ("--base", tiny.base(), "--server", server.url, "--json")
    checks = json.loads(tiny.done("verify", chain.release, *given).out)
    last = [check for check in checks if check["name"] == "server"]
    assert [check["status"] for check in last] == ["ok", "note", "ok", "ok"]
    assert last[0]["detail"].startswith("equal: ")
    for check, name in zip(last[2:], ("adapter", "base"), strict=True):
        assert check["detail"].startswith(f"{name} answers as the {name}: ")
    nobody = f"http://127.0.0.1:{tiny.free_port()}"
    said = tiny.fintune("verify", chain.release, "--base", tiny.base(), "--server", nobody)
    assert (said.code, "no answer from" in said.err) == (1, True)


@pytest.fixture(scope="module")
def keyed(chain: tiny.Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.Server]:
    """The same release behind a key."""
    log = tmp_path_factory.mktemp("keyed") / "log"
    serving = tiny.Server(chain.release, log, FINTUNE_API_KEY="k" * 32)
    yield serving
    serving.stop()


def test_a_key_is_asked_for_and_sigterm_ends_with_0(keyed: tiny.Server, chain: tiny.Chain) -> None:
    assert asked(keyed)["choices"]
    good = {"model": "adapter", "messages": ASK, "max_tokens": 1}
    for wrong in ("", "Bearer x", "Bearer " + "k" * 31):
        status, text = keyed.ask(CHAT, good, Authorization=wrong)
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
    assert keyed.ask("/v1/models", Authorization="")[0] == 401
    assert keyed.ask("/health", Authorization="")[0] == 200
    given = ("verify", chain.release, "--base", tiny.base(), "--server", keyed.url)
    with mock.patch.dict(os.environ, {"FINTUNE_API_KEY": "k" * 32}):
        assert tiny.fintune(*given).code == 0
    assert tiny.fintune(*given).code == 1
    assert keyed.stop() == 0, keyed.process.text()
    assert "k" * 32 not in keyed.process.text()


def test_binding_elsewhere_needs_a_key(chain: tiny.Chain) -> None:
    given = ("--base", tiny.base(), "--host", "0.0.0.0")
    said = tiny.fintune("serve", chain.release, *given)
    assert (said.code, "FINTUNE_API_KEY" in said.err) == (1, True)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    said = tiny.fintune("serve", tmp_path)
    assert (said.code, "adapter_config.json" in said.err) == (1, True)
