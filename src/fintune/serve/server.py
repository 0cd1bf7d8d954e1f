"""Start the server: loopback unless a key is set, uvicorn with limits, the address said."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from fintune import console
from fintune.errors import ConfigError
from fintune.model import LoadedRelease, load_release, open_release
from fintune.serve.app import LOOPBACK, build_app
from fintune.serve.engine import Engine

KEY_VARIABLE = "FINTUNE_API_KEY"
SHORTEST_KEY = 22
"""Characters: 128 bits in base64."""
SECURITY_HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    (
        "content-security-policy",
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'",
    ),
]


def serve(
    folder: Path,
    *,
    base: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    run: Path | None = None,
) -> None:
    """Serve a release until stopped.

    Args:
        folder: a release folder.
        base: folder of its base; absent: the bundled one, or the hub's.
        host: address to bind; anything but loopback needs FINTUNE_API_KEY.
        run: the training run's folder, whose curves the page shows; absent: `run` beside `folder`.

    Raises:
        ConfigError: not loopback and no key of at least 128 bits.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if not _is_loopback(host) and (key is None or len(key) < SHORTEST_KEY):
        raise ConfigError(
            f"binding to {host} needs a key of at least {SHORTEST_KEY} characters",
            why="anyone who reaches the address could use the model",
            fix=f"set {KEY_VARIABLE}, for example to the output of: openssl rand -base64 24",
        )
    loaded = load_release(folder, open_release(folder, base))
    with running(loaded, folder, host=host, port=port, key=key, run=run) as server:
        console.say(f"{folder.name} on {loaded.base.id}: open http://{host}:{port}/")
        # uvicorn drains, then raises the signal again: a wished-for stop should still exit with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run()


def _is_loopback(host: str) -> bool:
    return host in LOOPBACK or host == "::1"


@contextmanager
def running(
    loaded: LoadedRelease,
    folder: Path,
    *,
    host: str,
    port: int,
    key: str | None,
    run: Path | None,
) -> Iterator[uvicorn.Server]:
    """A configured server over an engine that ends with the block."""
    engine = Engine(loaded)
    app = build_app(
        loaded,
        engine,
        folder=folder,
        run=run or folder.parent / "run",
        key=key,
        hosts=LOOPBACK if _is_loopback(host) else ("*",),
    )
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        headers=SECURITY_HEADERS,
        limit_concurrency=512,  # connections; above the 64 + 256 requests that the engine takes
        timeout_keep_alive=5,
        timeout_graceful_shutdown=30,
        h11_max_incomplete_event_size=16 << 10,  # bytes of headers
    )
    try:
        yield uvicorn.Server(settings)
    finally:
        engine.close()
