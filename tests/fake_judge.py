"""An OpenAI-compatible judge over real HTTP, scripted, that can fail in every way a network can."""

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FENCED = re.compile(r"<([\w ]+) ([0-9a-f]{32})>\n(.*?)\n</\1 \2>", re.DOTALL)

RETRIED = (
    "429 after seconds", "429 after a date", "429", "408", "409", "500", "502 html", "503", "529",
    "reset before the reply", "reset in the reply", "timeout", "drip",
)  # fmt: skip
ASKED_AGAIN = ("empty", "html", "cut json", "null content")
"""No completion: the call stays open, and the next run of the command makes it."""
UNSCORED = ("wrong schema", "wrong id", "prose")
FINE = ("5 MB",)
STOPPED = ("401", "402", "404")


def honest(prompt: str) -> dict[str, Any]:
    """Candidates that say the reference win; two alike are a tie."""
    texts = {name: text for name, _, text in FENCED.findall(prompt)}
    a, b = (texts[f"candidate {slot}"] == texts["reference"] for slot in "AB")
    return {"winner": "tie" if a == b else "A" if a else "B"}


class FakeJudge:
    """The server: which fault the first request of each call meets, and what was delivered.

    Attributes:
        asked: requests by call (the Idempotency-Key).
        paid: completions made by call, delivered or not.
        keys: the authorization headers that came.
        elsewhere: where a redirect leads.
        refuse: gives a body status and JSON of a refusal, or no JSON to answer it.
    """

    def __init__(
        self,
        fault: str = "",
        delay: float = 0.0,
        verdict: Callable[[str], Any] = honest,
        refuse: Callable[[dict[str, Any]], tuple[int, Any]] = lambda _: (0, None),
    ) -> None:
        self.fault, self.delay, self.verdict, self.refuse = fault, delay, verdict, refuse
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[str] = []
        self.keys: set[str | None] = set()
        self.secret = self.elsewhere = ""
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def reply(self, request: dict[str, Any], fault: str) -> bytes:
        """A completion's body; some faults spoil its text."""
        prompt = "\n".join(message["content"] for message in request["messages"])
        nonce = re.findall(r"\bid: ([0-9a-f]{32})", prompt)[-1]
        verdict = {"id": nonce, "rationale": f"looked {self.secret}", **self.verdict(prompt)}
        text = json.dumps(verdict)
        text = {
            "wrong schema": json.dumps({"score": 10}),
            "wrong id": json.dumps({**verdict, "id": "0" * 32}),
            "prose": "A is clearly better than B.",
            "5 MB": "x" * 5_000_000 + text,
        }.get(fault, text)
        content = None if fault == "null content" else text
        choice = {"index": 0, "message": {"role": "assistant", "content": content}}
        body = {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": f"fake-2026-01-01{self.secret}",
            "choices": [{**choice, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
        }
        if fault == "null content":
            body = {"error": {"message": "overloaded"}}
        return json.dumps(body).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 turns clients away under load

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what some faults are about."""


@contextlib.contextmanager
def serve(judge: FakeJudge) -> Iterator[FakeJudge]:
    """Run the server in threads of its own until the block ends."""
    thread = threading.Thread(target=judge.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()


def _handler(judge: FakeJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the test output quiet."""

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            call = self.headers["idempotency-key"]
            with judge.lock:
                judge.asked[call] += 1
                judge.keys.add(self.headers["authorization"])
                first = judge.asked[call] == 1
                judge.bodies.append(json.dumps(request))
            fault = judge.fault if first or judge.fault in STOPPED else ""
            time.sleep(judge.delay)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._answer(request, call, fault)

        def _answer(self, request: dict[str, Any], call: str, fault: str) -> None:
            refused, reason = judge.refuse(request)
            if reason is not None:
                self._send(refused, json.dumps(reason).encode())
                return
            status = re.match(r"[345]\d\d", fault)
            if status:
                self._refuse(int(status[0]), fault)
            elif fault == "reset before the reply":
                self._reset()
            elif fault == "timeout":
                self._paid(call)
                time.sleep(2.5)
                self._reset()
            elif fault in ("empty", "html", "cut json"):
                whole = judge.reply(request, "")
                body = {"empty": b"", "html": b"<html>Bad</html>", "cut json": whole[:-40]}[fault]
                self._send(200, body)
            elif fault in ("reset in the reply", "drip"):
                body = judge.reply(request, "")
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                for byte in body[: 40 if fault == "drip" else 1]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.1)
                self._reset()
            else:
                body = judge.reply(request, fault)
                if fault != "null content":
                    self._paid(call)
                self._send(200, body)

        def _paid(self, call: str) -> None:
            with judge.lock:
                judge.paid[call] += 1

        def _refuse(self, status: int, fault: str) -> None:
            extra = {"location": judge.elsewhere} if status < 400 else {}
            if "seconds" in fault:
                extra["retry-after"] = "0.3"
            if "date" in fault:
                extra["retry-after"] = formatdate(time.time() + 1, usegmt=True)
            error = {"error": {"message": f"no {judge.secret}", "code": judge.secret or "x"}}
            body = b"<html>" if "html" in fault else json.dumps(error).encode()
            self._send(status, body, extra)

        def _send(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.send_header("x-request-id", judge.secret or "r1")
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _reset(self) -> None:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

    return Handler
