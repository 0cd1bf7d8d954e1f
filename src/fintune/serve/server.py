"""Start the server: loopback unless a key is set, uvicorn with our limits, the address said."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from fintune import console
from fintune.errors import ConfigError
from fintune.serve.api import build
from fintune.serve.engine import Engine
from fintune.serve.guard import LOCAL, MAX_HEADER_BYTES, Guard, Protocol
from fintune.serve.loaded import Loaded, load

KEY_VARIABLE = "FINTUNE_API_KEY"
SHORTEST_KEY = 22
"""Characters: 128 bits in base64."""
DRAIN_S = 30
"""Seconds that running answers get after SIGTERM."""


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
    loopback = host in LOCAL | {"::1"}
    if not loopback and (key is None or len(key) < SHORTEST_KEY):
        raise ConfigError(
            f"binding to {host} needs a key of at least {SHORTEST_KEY} characters",
            why="anyone who reaches the address could use the model",
            fix=f"set {KEY_VARIABLE}, for example to the output of: openssl rand -base64 24",
        )
    loaded = load(folder, base)
    with running(loaded, folder, host=host, port=port, key=key, run=run) as server:
        console.say(f"{folder.name} on {loaded.base.id}: open http://{host}:{port}/")
        # uvicorn drains, then raises the signal again: a wished-for stop should still exit with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run()


@contextmanager
def running(
    loaded: Loaded, folder: Path, *, host: str, port: int, key: str | None, run: Path | None
) -> Iterator[uvicorn.Server]:
    """A configured server over an engine that ends with the block."""
    engine = Engine(loaded)
    app = build(loaded, engine, folder=folder, run=run or folder.parent / "run")
    hosts = LOCAL if host in LOCAL | {"::1"} else None
    settings = uvicorn.Config(
        Guard(app, key, hosts),
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=DRAIN_S,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
    )
    try:
        yield uvicorn.Server(settings)
    finally:
        engine.close()
