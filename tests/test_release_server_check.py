"""`verify --server` against our server, and against servers that prompt in another way."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tiny_server import Served, served

from fintune.chat import ChatFormat
from fintune.errors import GateRefused, ModelError
from fintune.example import Message
from fintune.releasing.verify import verify


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


class _Other(BaseHTTPRequestHandler):
    """A server with its own idea of the prompt: `prefix(messages) -> ids`."""

    prefix: Any
    shows_ids = False

    def do_GET(self) -> None:
        self._send({"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = type(self).prefix([Message(**row) for row in body["messages"]])
        if self.path == "/v1/chat/completions":
            choice = {"message": {"content": "It is."}}
            self._send({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})
        elif self.path == "/tokenize" and self.shows_ids:
            self._send({"tokens": ids})
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def other(prefix: Any, *, shows_ids: bool = False) -> Iterator[str]:
    kind = type("Other", (_Other,), {"prefix": staticmethod(prefix), "shows_ids": shows_ids})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def checked(served: Served, url: str) -> list[tuple[str, str]]:
    """Status and detail of what `verify --server` says of a server."""
    report = verify(served.folder, base=served.base, server=url)
    return [(check.status, check.detail) for check in report.checks if check.name == "server"]


STAYS = ("note", "control tokens in a user's text stay text there")


def test_our_server_is_equal_by_ids(server: Served) -> None:
    equal = ("ok", "equal: the same ids in 5 conversations")
    assert checked(server, server.url) == [equal, STAYS]


def test_equal_counts_alone_are_undecided(server: Served) -> None:
    with other(server.loaded.chat.prompt_ids) as url:
        (status, detail), control = checked(server, url)
    assert status == "note" and control == STAYS
    assert detail.startswith("undecided: the same number of prompt tokens in 5 conversations")


@pytest.mark.parametrize("shows_ids", [False, True])
def test_other_prefixes_are_different(server: Served, shows_ids: bool) -> None:
    chat = server.loaded.chat
    bos = chat.tokenizer.bos_token_id

    def second_bos(messages: list[Message]) -> list[int]:
        return [bos, *chat.prompt_ids(messages)]

    with other(second_bos, shows_ids=shows_ids) as url:
        report = verify(server.folder, base=server.base, server=url)
    message = r"different: other prompts in question \(\+1 tokens\), system \(\+1 tokens\)"
    with pytest.raises(GateRefused, match=message):
        report.settle()


def test_another_date_of_the_same_length_is_different_by_ids(server: Served) -> None:
    """26 Jul 2024 and 27 Jul 2024 count alike."""
    late = ChatFormat(server.loaded.chat.tokenizer, "27 Jul 2024")
    with other(late.prompt_ids, shows_ids=True) as url:
        status, detail = checked(server, url)[0]
    assert status == "failed" and detail.startswith("different: ")


def test_no_server_is_said(server: Served) -> None:
    with pytest.raises(ModelError, match="no answer from http://127.0.0.1:9"):
        verify(server.folder, base=server.base, server="http://127.0.0.1:9")
