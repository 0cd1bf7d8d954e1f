"""What a request must pass before anything parses it, and how long it may take to arrive.

Counted on the bytes that arrive, since a chunked body names no length. A host allow-list stops a
page elsewhere from reaching a loopback server by DNS rebinding, and a required JSON content type
stops it from posting a form. uvicorn has no deadline for receiving a request, so its protocol is
given one: a socket that trickles a byte a second is closed like any other.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 1 << 20
MAX_HEADERS, MAX_HEADER_BYTES = 64, 16 << 10
RECEIVE_S = 10.0
"""Seconds from a request's first byte (or the connection) to its last."""
DRAIN_S = 0.05
"""Pause after which a refused body is no longer waited for."""
LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/", "/health"})
"""Readable without a key: the page (which asks for the key) and whether the server lives."""
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        b" img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        b" frame-ancestors 'none'",
    ),
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def error_body(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "server_error" if code == "server_error" else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Middleware: host, key, sizes, content type; then the app gets the body whole.

    Args:
        key: the API key, or None where none is required; only its hash is kept.
        hosts: names a Host header may give, or None for any (a key is required then).
    """

    def __init__(self, app: App, key: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts
        self._digest = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 4xx, or pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def safe(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        headers = dict(scope["headers"])
        refused = self._refusal(scope, headers)
        body = b""
        if refused is None and scope["method"] == "POST":
            try:
                async with asyncio.timeout(RECEIVE_S):
                    body = await _read(receive)
            except _TooLarge:
                refused = 413, f"the body is larger than {MAX_BODY} bytes", "too_large"
            except (TimeoutError, ConnectionError):
                refused = 408, f"the request took longer than {RECEIVE_S:.0f} s", "timeout"
        if refused is not None:
            await _drain(receive)
            return await _answer(safe, *refused)
        sent = False

        async def whole() -> MutableMapping[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return await self._app(scope, whole, safe)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            return 431, "too many or too large headers", "headers_too_large"
        host = headers.get(b"host", b"").decode("latin-1").rpartition(":")
        name = host[0] if host[2].isdigit() else "".join(host)
        if self._hosts is not None and name.lower() not in self._hosts:
            return 403, "this server does not answer to that Host", "host_not_allowed"
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        # Both sides hashed: equal lengths, and compared in constant time (CVE-2025-59425).
        if (
            self._digest
            and scope["path"] not in OPEN_PATHS
            and not hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)
        ):
            return 401, "a valid API key is required (Authorization: Bearer)", "invalid_api_key"
        if scope["method"] != "POST":
            return None
        if headers.get(b"content-encoding"):
            return 415, "encoded bodies are not read", "unsupported_encoding"
        if headers.get(b"content-type", b"").split(b";")[0].strip() != b"application/json":
            return 415, "the body must be application/json", "unsupported_media_type"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return 413, f"the body is larger than {MAX_BODY} bytes", "too_large"
        return None


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline for receiving, and errors in OpenAI's shape."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline with the connection, so that a silent one is closed too."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Feed uvicorn; stop the clock when the request is complete."""
        if self._deadline is None:
            self._arm()
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock with the connection."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP, or headers larger than h11 was told to hold."""
        body = json.dumps(error_body(msg, "bad_request")).encode()
        length = ("content-length", str(len(body)))
        headers = [("content-type", "application/json"), length, ("connection", "close")]
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body)):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(RECEIVE_S, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.conn.their_state in {h11.IDLE, h11.SEND_BODY}:
            self.transport.abort()


class _TooLarge(Exception):
    pass


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise _TooLarge
        if not message.get("more_body", False):
            return b"".join(parts)


async def _drain(receive: Receive) -> None:
    """Read on a little before refusing: closing on unread bytes would reset the connection, and
    the client would never see why. Over when the body ends, pauses, or reaches twice the limit."""
    left = 2 * MAX_BODY
    with contextlib.suppress(TimeoutError):
        while left > 0:
            message = await asyncio.wait_for(receive(), DRAIN_S)
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(message, code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
