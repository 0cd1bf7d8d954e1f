"""`verify --server` against servers that prompt in another way; ours is a frozen test."""

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

from fintune.errors import ModelError
from fintune.releasing.server_check import Server


class _Other(BaseHTTPRequestHandler):
    """A server with its own idea of the prompt's ids."""

    prompts: dict[str, list[int]]
    shows_ids = False

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
        self._send({"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        listed = not (self.broken and self.broken[0] == "/v1/models")
        assert body.get("model") == ("only" if listed else None)
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
        self._send_bytes(200, json.dumps(tree).encode())

    def _send_bytes(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def other(
    chain: tiny.Chain,
    change: Callable[[list[int]], list[int]],
    *,
    shows_ids: bool,
    broken: tuple[str, int, bytes] | None = None,
) -> Iterator[str]:
    rows = frozen.read_json(chain.release / "prompt_fixture.json")["conversations"]
    prompts = {json.dumps(row["messages"][:-1]): change(row["prompt_ids"]) for row in rows}
    kind = type("Other", (_Other,), {"prompts": prompts, "shows_ids": shows_ids, "broken": broken})
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
            checked = Server(url, chain.release)
            if path == "/tokenize":
                assert checked.prompt(question, None)[0] is None
                continue
            with pytest.raises(ModelError, match="prompt tokens|no answer"):
                checked.prompt(question, None)


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
