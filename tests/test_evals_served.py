"""`eval.server`: answers, loss and verdict as in this process, and what servers do wrong."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_server import served

from fintune import server_client
from fintune.model import LoadedRelease

Json = dict[str, Any]
Change = Callable[[Json, Json], tuple[int, Json]]
"""The body that was sent and the reply of the real server -> status and reply."""


class _Between(BaseHTTPRequestHandler):
    """A server before ours that changes completions; as another server would."""

    url: str
    place: "Place"

    def do_GET(self) -> None:
        with urllib.request.urlopen(self.url + self.path) as reply:
            self._send(200, json.loads(reply.read()))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = urllib.request.Request(
            self.url + self.path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            tree = json.loads(reply.read())
        self.place.asked.append(json.loads(body))
        self._send(*self.place.change(json.loads(body), tree))

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, tree: Json) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@dataclass
class Place:
    """Where a server before ours is, what it changes, and the completions that it was asked for."""

    url: str
    change: Change
    asked: list[Json]


@contextmanager
def between(url: str, change: Change) -> Iterator[Place]:
    """A server before ours."""
    place = Place("", change, [])
    kind = type("Between", (_Between,), {"url": url, "place": place})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        place.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
        yield place
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "PAUSE_S", 0.001)


def plain(_: Json, reply: Json) -> tuple[int, Json]:
    return 200, reply


def bare(body: Json, reply: Json) -> tuple[int, Json]:
    """A server of texts alone, without ids and log-probabilities."""
    if body.keys() & {"prompt_logprobs", "logprobs", "return_token_ids"}:
        return 400, {"error": "unknown field"}
    return 200, reply


def answers(folder: Path) -> dict[tuple[str, str], Json]:
    lines = tiny.read_lines(folder / "predictions.jsonl")
    return {(line["model"], line["item"]["id"]): line for line in lines}


def without_adapter(loaded: LoadedRelease) -> None:
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()


def test_our_server_gives_the_same_outcomes_and_the_same_verdict(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run", "release")
    found = tiny.answer_json("eval", *copy.words(server=server.url))
    before = json.loads((chain.eval / "test_results.json").read_text())
    assert (found["verdict"], found["guards"]) == (before["verdict"], before["guards"])
    here, there = answers(chain.eval), answers(copy.eval)
    assert here.keys() == there.keys() and len(here) > 100
    keys = ("text", "finish", "tokens", "prompt_sha256")
    same = [all(here[key][k] == there[key][k] for k in keys) for key in here]
    assert sum(same) >= 0.99 * len(same)
    for name in ("base", "adapter"):
        assert found["loss"][name] == pytest.approx(before["loss"][name], abs=1e-4)
    said = found["provenance"]["server"]
    assert said["models"] == {"base": "base", "adapter": "adapter"}
    written = (copy.eval / "test_results.json").read_text() + (
        copy.eval / "report.html"
    ).read_text()
    assert server.url not in written, "a release would hold the address"
    assert "nats a token from the adapter's recorded answers" in said["proof"]
    assert "token ids that a server was sent" in (copy.eval / "report.html").read_text()
    assert tiny.answer_json("eval", *copy.words(server=server.url)) == found, "kept"
    refused = tiny.fintune("eval", *copy.words())
    assert (refused.code, "server" in refused.err) == (1, True), (
        "never mixed with answers from here"
    )


def test_a_server_of_texts_gives_no_loss_and_its_absence_is_said(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run")
    with between(server.url, bare) as place:
        url = place.url
        said = tiny.done("eval", *copy.words(server=url))
    missing = "The held-out loss was not measured, so it guards nothing: the server gives no"
    assert missing in " ".join(said.out.split()) + " ".join(said.err.split())
    found = json.loads((copy.eval / "test_results.json").read_text())
    assert found["loss"]["base"] is None and found["guards"].keys() <= {"majority_class"}
    here, there = answers(chain.eval), answers(copy.eval)
    for key in here:  # a stream keeps back half a character at its end
        assert here[key]["text"].rstrip("\ufffd") == there[key]["text"].rstrip("\ufffd")
    assert "Not measured: the server gives no" in (copy.eval / "report.html").read_text()
    tiny.done("eval", "--rescore", copy.eval)
    tiny.done("release", *copy.words(server=url))
    tiny.done("show", copy.out)
    assert "—" not in tiny.done("runs", copy.out.parent).out
    tiny.done("compare", copy.out, chain.out)


def test_labels_by_their_likelihoods_come_from_prompt_logprobs(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    path, found = tmp_path / "fpb.jsonl", []
    choices = ["negative", "neutral", "positive"]
    lines = [
        {"prompt": f"Is report {n} positive, neutral or negative?", "answer": choices[n % 3]}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(line | {"choices": choices}) + "\n" for line in lines))
    for place, url in (("here", None), ("there", server.url)):
        copy = chain.copy(tmp_path / place, "data", "run")
        more = tiny.words(tasks={"fpb": str(path)}, max_new_tokens=2)
        more += tiny.words(server=url) if url else []
        tiny.done("eval", *copy.words(), *more, "-s", "eval.label_scoring=likelihood")
        found.append(answers(copy.eval))
    scored = [key for key in found[0] if "choice_logprobs" in found[0][key]]
    assert len(scored) == 8
    for key in scored:
        here, there = (each[key]["choice_logprobs"] for each in found)
        assert there == pytest.approx(here, abs=1e-3)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("data", "run", "release"), "under the adapter's name the base answers"),
        (("data", "run"), "and the same log-probabilities: the adapter is not applied"),
    ],
)
def test_the_base_under_both_names_is_refused_before_anything_is_asked(
    chain: tiny.Chain, tmp_path: Path, parts: tuple[str, ...], words: str
) -> None:
    copy = chain.copy(tmp_path, *parts)
    with served(release=(chain.release, tiny.base()), change=without_adapter) as wrong:
        said = tiny.fintune("eval", *copy.words(server=wrong.url))
    assert (said.code, words in " ".join(said.err.split())) == (3, True), said.err
    assert not (copy.eval / "predictions.jsonl").exists()


def stopping(after: int) -> Change:
    left = iter(range(after))
    return lambda _, reply: (200, reply) if next(left, None) is not None else (503, {})


def test_a_server_that_stops_loses_nothing_and_the_same_command_continues(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    copy, before = chain.copy(tmp_path, "data", "run"), answers(chain.eval)
    results = json.loads((chain.eval / "test_results.json").read_text())
    checked, losses = 16, 2 + 2 * results["loss"]["rows"]
    with between(server.url, stopping(checked + losses + 40)) as place:
        said = tiny.fintune("eval", *copy.words(server=place.url))
        assert (said.code, "HTTP 503" in said.err) == (1, True), said.err
        assert "what was answered is kept" in " ".join(said.err.split())
        assert len(answers(copy.eval)) == 40
        place.change, place.asked = plain, []
        found = tiny.answer_json("eval", *copy.words(server=place.url))
        assert len(place.asked) == checked + 2 + len(before) - 40
    assert found["verdict"] == results["verdict"]


def test_what_a_server_lacks_or_does_to_prompts_is_named(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    copy = chain.copy(tmp_path, "data", "run")

    def said(change: Change, **more: str) -> str:
        with between(server.url, change) as place:
            given = {"url": place.url, **more}
            found = tiny.fintune("eval", *copy.words(server=given))
        assert found.code == 1, found.err
        return " ".join(found.err.split())

    assert "lists base, adapter, no adapter called mine" in said(plain, adapter="mine")
    cut = {"usage": {"prompt_tokens": 3}}
    assert "read 3 prompt tokens where" in said(lambda _, reply: (200, reply | cut))
    assert "HTTP 429" in said(lambda _, reply: (429, {"error": "busy"}))
    assert "the answer is no completion" in said(lambda _, reply: (200, {"choices": []}))
    short = {"choices": [{"text": "", "finish_reason": "length", "token_ids": [5]}]}
    shown = {"logprobs", "prompt_logprobs"}
    ended = said(lambda body, reply: (200, reply if shown & body.keys() else short))
    assert "ended an answer after 1 of 8 tokens" in ended
    nobody = f"http://127.0.0.1:{tiny.free_port()}"
    gone = tiny.fintune("eval", *copy.words(server=nobody))
    assert (gone.code, "no answer from" in gone.err) == (1, True)


@pytest.mark.parametrize("url", ["https://models.example/v1", "http://models.example/v1"])
def test_a_config_alone_sends_no_key_beyond_this_machine(
    url: str, chain: tiny.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINTUNE_API_KEY", "sesame1")
    copy = chain.copy(tmp_path, "data", "run")
    said = tiny.fintune("eval", *copy.words(server=url))
    assert said.code == 1 and "is not for models.example" in said.err and "sesame1" not in said.err
    monkeypatch.setenv("FINTUNE_API_HOST", "models.example")
    again = tiny.fintune("--offline", "eval", *copy.words(server=url))
    word = "--offline" if url.startswith("https") else "is not for models.example"
    assert again.code == 1 and word in again.err, "over https alone"


def test_an_adapter_of_others_is_asked_tasks_alone_through_a_server(
    chain: tiny.Chain, server: tiny.Server, tmp_path: Path
) -> None:
    asked = tiny.words(tasks=tiny.tasks(), max_new_tokens=3, server=server.url)
    words = ("--adapter", chain.run / "best", "-s", f"out={tmp_path}", *asked)
    tiny.done("eval", *map(str, words))
    found = json.loads((tmp_path / "eval" / "test_results.json").read_text())
    assert found["loss"]["base"] is None and found["tasks"]
