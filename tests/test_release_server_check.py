"""`verify --server` against servers that prompt in another way, or answer with another model.

`_Other` is a double of vLLM, from its documentation: what it lists, `/tokenize`, and completions of
token ids with `logprobs`, `return_tokens_as_token_ids` and `return_token_ids`.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import frozen
import pytest
import tiny
import torch
from tiny_server import served

from fintune.errors import ModelError
from fintune.model import LoadedRelease
from fintune.releasing.server_check import ReleaseServer
from fintune.server_client import Completion, whose


class _Other(BaseHTTPRequestHandler):
    """A server with its own idea of the prompt's ids."""

    prompts: dict[str, list[int]]
    answers: dict[str, dict[str, dict[str, Any]]]
    shows_ids = False
    lacks: tuple[str, ...] = ()

    broken: tuple[str, int, bytes] | None = None

    def parse_request(self) -> bool:
        """A path that is broken answers with a status and a body of its own."""
        fine = super().parse_request()
        if fine and self.broken and self.path == self.broken[0]:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._send_bytes(*self.broken[1:])
            return False
        return fine

    def do_GET(self) -> None:
        parents = {name: None if "/" in name else "org/base" for name in self.answers}
        self._send({"data": [{"id": name, "parent": of} for name, of in parents.items()]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        listed = not (self.broken and self.broken[0] == "/v1/models")
        assert (body.get("model") in self.answers) if listed else "model" not in body
        ids = self.prompts.get(json.dumps(body.get("messages")), [])
        if self.path == "/v1/completions" and not any(name in body for name in self.lacks):
            self._send(self._completion(body))
        elif self.path == "/v1/chat/completions":
            choice = {"message": {"content": "It is."}}
            self._send({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})
        elif self.path == "/tokenize" and self.shows_ids:
            self._send({"count": len(ids), "max_model_len": 256, "tokens": ids})
        else:
            self.send_error(400 if self.lacks else 404)

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.answers[body.get("model", "adapter")][json.dumps(body["prompt"])]
        assert len(answer["ids"]) <= body["max_tokens"] and body["temperature"] == 0
        choice: dict[str, Any] = {"text": answer["text"], "finish_reason": "length"}
        if "logprobs" in body:
            names = [f"token_id:{token}" for token in answer["ids"]]
            values = [*map(float, answer["logprobs"])]
            likely = [{name: value} for name, value in zip(names, values, strict=True)]
            likely[-1] |= answer.get("tie", {})
            choice["logprobs"] = {
                "tokens": names, "token_logprobs": values, "top_logprobs": likely,
            }  # fmt: skip
        if "return_token_ids" in body:
            choice["token_ids"] = answer["ids"]
        return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, tree: dict[str, Any]) -> None:
        self._send_bytes(200, json.dumps(tree).encode())

    def _send_bytes(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Answers = Callable[[dict[str, Any]], dict[str, Any]]


def adapter(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row["answer"])


def base(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row["base_answer"])


def stranger(row: dict[str, Any]) -> dict[str, Any]:
    ids = row["answer"]["ids"]
    return {"ids": [5] * len(ids), "logprobs": [-0.1] * len(ids), "text": "5 5 5"}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """The adapter's answers in coarser numbers, which flip a near tie at their last token."""
    ids, logprobs = row["answer"]["ids"], [value + 0.03 for value in row["answer"]["logprobs"]]
    tie = {f"token_id:{ids[-1]}": logprobs[-1] - 0.02}
    return {"ids": [*ids[:-1], 5], "logprobs": logprobs, "text": "It is 5", "tie": tie}


@contextmanager
def other(
    chain: tiny.Chain,
    change: Callable[[list[int]], list[int]] = list,
    *,
    shows_ids: bool = True,
    broken: tuple[str, int, bytes] | None = None,
    models: dict[str, Answers] | None = None,
    lacks: tuple[str, ...] = (),
) -> Iterator[str]:
    rows = frozen.read_json(chain.release / "prompt_fixture.json")["conversations"]
    prompts = {json.dumps(row["messages"][:-1]): change(row["prompt_ids"]) for row in rows}
    answers = {
        name: {json.dumps(row["prompt_ids"]): said(row) for row in rows}
        for name, said in (models or {"adapter": adapter}).items()
    }
    known = {"prompts": prompts, "answers": answers, "shows_ids": shows_ids}
    kind = type("Other", (_Other,), {**known, "broken": broken, "lacks": lacks})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def verify(chain: tiny.Chain, url: str) -> tiny.Said:
    return tiny.fintune("verify", chain.release, "--base", tiny.base(), "--server", url)


def test_equal_counts_alone_are_undecided_and_the_release_is_not_to_blame(
    chain: tiny.Chain,
) -> None:
    with other(chain, lambda ids: ids, shows_ids=False) as url:
        said = verify(chain, url)
    assert said.code == 3
    assert "server: undecided: the same number of prompt tokens in 5 conversations" in said.err
    for words in ("no ids are shown there", "answers /tokenize or /apply-template would decide it"):
        assert words in said.err
    assert "refused" not in said.out + said.err and "fintune release" not in said.err
    assert "release: verified" in said.out


def test_no_model_is_named_to_a_server_that_lists_none(chain: tiny.Chain) -> None:
    with other(chain, list, shows_ids=True, broken=("/v1/models", 200, b'{"data": []}')) as url:
        said = verify(chain, url)
    assert (said.code, "equal: the same ids" in said.out) == (0, True), said.err


@pytest.mark.parametrize("shows_ids", [False, True])
def test_a_second_bos_is_different(chain: tiny.Chain, shows_ids: bool) -> None:
    with other(chain, lambda ids: [ids[0], *ids], shows_ids=shows_ids) as url:
        said = verify(chain, url)
    message = "different: other prompts in question (+1 tokens), system (+1 tokens)"
    assert (said.code, message in said.err) == (3, True), said.err


def test_another_prompt_of_the_same_length_is_different_by_ids(chain: tiny.Chain) -> None:
    with other(chain, lambda ids: ids[::-1], shows_ids=True) as url:
        said = verify(chain, url)
    assert (said.code, "server: different: " in said.err) == (3, True), said.err


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
def test_a_refusal_shows_what_the_server_said(
    chain: tiny.Chain, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINTUNE_API_KEY", "sesame1")
    body = b'{"error": "no database\x1b[2J for sesame1"}' + b"x" * 9000
    with other(chain, list, shows_ids=False, broken=(path, 500, body)) as url:
        said = verify(chain, url)
    assert said.code == 1
    assert f"{path} refused the request (HTTP 500): " in said.err
    assert "no database\\x1b[2J for [redacted]" in said.err
    assert len(said.err) < 1000 and "sesame1" not in said.err


@pytest.mark.parametrize(
    "body", [b"[1]", b'{"data": 3}', b'{"data": [{}, 1]}', b"[" * 100_000, b"\xff", b""]
)
def test_nonsense_of_a_server_is_one_message(chain: tiny.Chain, body: bytes) -> None:
    with other(chain, list, shows_ids=True, broken=("/v1/models", 200, body)) as url:
        said = verify(chain, url)
    assert said.code == 1 and "Traceback" not in said.err, said.err
    rows = frozen.read_json(chain.release / "prompt_fixture.json")["conversations"]
    question = rows[0]["messages"][:-1]
    for path in ("/tokenize", "/v1/chat/completions"):
        with other(chain, list, shows_ids=False, broken=(path, 200, body)) as url:
            checked = ReleaseServer(url, chain.release)
            if path == "/tokenize":
                assert checked.prompt(question, None)[0] is None
                continue
            with pytest.raises(ModelError, match="prompt tokens|no answer"):
                checked.prompt(question, None)


LOGPROBS = ("return_token_ids", "logprobs")
PLAIN = {"org/base": base, "adapter": adapter}


@pytest.mark.parametrize(
    ("models", "lacks", "code", "words"),
    [
        (PLAIN, (), 0, "adapter answers as the adapter"),
        (PLAIN, ("return_token_ids",), 0, "org/base answers as the base"),
        (PLAIN, LOGPROBS, 0, "adapter answers as the adapter: no log-probabilities are shown"),
        ({"adapter": rounded}, (), 0, "adapter answers as the adapter: 0.02"),
        ({"adapter": base}, (), 3, "the same as the base: the base is served under the adapter's"),
        (PLAIN | {"adapter": base}, LOGPROBS, 3, "the same as the base"),
        ({"adapter": stranger}, (), 3, "another adapter, or weights coarser than 8 bits: the"),
        ({"adapter": stranger}, LOGPROBS, 3, "another adapter, or weights coarser"),
        (PLAIN | {"org/base": adapter}, (), 3, "org/base, the base's name, answers as the adapter"),
        (PLAIN, ("prompt",), 3, "undecided: whether the adapter is applied is asked with token"),
    ],
)  # fmt: skip
def test_a_server_like_vllm_answers_with_the_adapter(
    chain: tiny.Chain, models: dict[str, Answers], lacks: tuple[str, ...], code: int, words: str
) -> None:
    with other(chain, models=models, lacks=lacks) as url:
        said = verify(chain, url)
    assert (said.code, words in said.out + said.err) == (code, True), said.out + said.err


def test_answers_alike_without_log_probabilities_decide_nothing() -> None:
    row = {"answer": {"text": "It is."}, "base_answer": {"text": "It is. "}}
    heard = Completion("It is.")
    assert whose([heard], [row], str)[0] == "undecided"


def _without_adapter(loaded: LoadedRelease) -> None:
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()


def _another_adapter(loaded: LoadedRelease) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_" in name:
                weight.copy_(weight[torch.randperm(len(weight))])


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda _: None, 0, "base answers as the base"),
        (_without_adapter, 3, "the same as the base"),
        (_another_adapter, 3, "another adapter, or weights coarser"),
    ],
)
def test_our_server_answers_with_the_adapter(
    chain: tiny.Chain, change: Callable[[LoadedRelease], object], code: int, words: str
) -> None:
    with served(release=(chain.release, tiny.base()), change=change) as server:
        said = verify(chain, server.url)
    assert (said.code, words in said.out + said.err) == (code, True), said.out + said.err


def test_the_address_is_asked_before_anything_is_loaded(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{tiny.free_port()}"
    wrong = {nobody: "no answer from", "127.0.0.1:8000": "http://127.0.0.1:8000, or https"}
    for url, words in wrong.items():
        code = (
            "import sys; from fintune.cli import app\n"
            f"try:\n    app(['verify', {str(tmp_path / 'absent')!r}, '--server', {url!r}])\n"
            "except Exception as error:\n    print(error, 'torch' in sys.modules)"
        )
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert words in made.stdout and made.stdout.endswith(" False\n"), made
