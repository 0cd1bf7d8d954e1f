"""`verify --server` against our server, and against servers that prompt in another way."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Served, greedy, served

from fintune.chat import ChatFormat
from fintune.errors import GateRefused, ModelError
from fintune.example import Message
from fintune.release.golden import read_golden_prompts
from fintune.release.server_check import check_server
from fintune.release.verify import verify


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


class _Other(BaseHTTPRequestHandler):
    """A server with its own idea of the prompt: `prefix(messages) -> ids`."""

    served: Served
    prefix: Any
    completions = True

    def do_GET(self) -> None:
        self._send({"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loaded = self.served.loaded
        if self.path == "/v1/chat/completions":
            ids = type(self).prefix([Message(**row) for row in body["messages"]])
        elif self.path == "/v1/completions" and self.completions:
            ids = loaded.chat.tokenizer(body["prompt"])["input_ids"]  # adds BOS, as many do
        else:
            return self.send_error(404)
        text = greedy(loaded, "adapter", ids, body["max_tokens"])
        choice = {"message": {"content": text}, "text": text}
        return self._send({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def other(served: Served, prefix: Any, **changes: Any) -> Iterator[str]:
    kind = type("Other", (_Other,), {"served": served, "prefix": staticmethod(prefix), **changes})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def verdict(served: Served, url: str) -> str:
    fixture = read_golden_prompts(served.folder)
    assert fixture is not None
    return check_server(fixture, served.loaded.chat.tokenizer, url, ["adapter"])[0].detail


def test_our_server_is_equal_by_ids(server: Served) -> None:
    report = verify(server.folder, base=server.base, server=server.url)
    said = [check.detail for check in report.checks if check.name == "server"]
    assert said == [
        "equal: the same ids in 5 conversations",
        "control tokens in a user's text stay text there",
    ]


def test_equal_by_counts_and_answers(server: Served) -> None:
    with other(server, server.loaded.chat.prompt_ids) as url:
        assert (
            verdict(server, url) == "equal: the same counts and greedy answers in 5 conversations"
        )


def test_other_prefixes_are_different(server: Served) -> None:
    chat = server.loaded.chat
    bos = chat.tokenizer.bos_token_id

    def second_bos(messages: list[Message]) -> list[int]:
        return [bos, *chat.prompt_ids(messages)]

    with other(server, second_bos) as url:
        report = verify(server.folder, base=server.base, server=url)
    message = r"different: prompt tokens \[1, 1, 1, 1, 1\] against the golden prompts"
    with pytest.raises(GateRefused, match=message):
        report.settle()


def test_another_date_of_the_same_length_is_different(server: Served) -> None:
    """26 Jul 2024 and 27 Jul 2024 count alike; the answers tell them apart, or nothing is said."""
    late = ChatFormat(server.loaded.chat.tokenizer, "27 Jul 2024")
    with other(server, late.prompt_ids) as url:
        assert verdict(server, url).startswith("different: ")


def test_undecided_without_completions(server: Served) -> None:
    with other(server, server.loaded.chat.prompt_ids, completions=False) as url:
        assert verdict(server, url).startswith("undecided: the counts agree; no /v1/completions")


def test_no_server_is_said(server: Served, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no answer from http://127.0.0.1:9"):
        verdict(server, "http://127.0.0.1:9")
