"""The real server over the tiny release, on a free loopback port, in a thread."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_release import built

from fintune.model import LoadedRelease, load_release, open_release
from fintune.serve.app import running


@dataclass(frozen=True)
class Served:
    """Where the server listens, and what it serves."""

    url: str
    loaded: LoadedRelease
    folder: Path
    base: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(
    *,
    key: str | None = None,
    release: tuple[Path, Path] | None = None,
    change: Callable[[LoadedRelease], object] = lambda _: None,
) -> Iterator[Served]:
    """Serve a release: the tiny one, or one given with its base.

    Args:
        change: of what was loaded, before it is served.
    """
    folder, base = release or built()
    loaded, port = load_release(folder, open_release(folder, base)), free_port()
    change(loaded)
    arguments = {"host": "127.0.0.1", "port": port, "key": key}
    with running(loaded, folder, **arguments) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{port}", loaded, folder, base)
        server.should_exit = True
        thread.join(timeout=10)
