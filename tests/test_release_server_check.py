"""`verify --server` against servers that prompt in another way; ours is a frozen test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import frozen
import pytest
import tiny


class _Other(BaseHTTPRequestHandler):
    """A server with its own idea of the prompt's ids."""

    prompts: dict[str, list[int]]
    shows_ids = False

    def do_GET(self) -> None:
        self._send({"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = self.prompts[json.dumps(body["messages"])]
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
def other(
    chain: tiny.Chain, change: Callable[[list[int]], list[int]], *, shows_ids: bool
) -> Iterator[str]:
    rows = frozen.read_json(chain.release / "prompt_fixture.json")["conversations"]
    prompts = {json.dumps(row["messages"][:-1]): change(row["prompt_ids"]) for row in rows}
    kind = type("Other", (_Other,), {"prompts": prompts, "shows_ids": shows_ids})
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
    assert "refused" not in said.out + said.err and "fintune release" not in said.err
    assert "release: verified" in said.out


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
