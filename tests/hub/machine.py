"""A machine that knows the hub for tests: commands in forks, with a cache of the hub of its own.

huggingface_hub reads its environment at import. A fork is given other constants instead, which
saves the ten seconds of imports of a new process; tests/test_hub_model.py starts a few of those.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from hub.server import Hub
from huggingface_hub import constants


class Said(NamedTuple):
    """How a command ended: its exit code, both streams, and what it asked the hub."""

    code: int
    text: str
    asked: list[str]


class Machine:
    """Runs commands of `fintune` with HF_HOME at `home` and HF_ENDPOINT at the hub."""

    def __init__(
        self, hub: Hub, home: Path, token: str = "", *, offline: bool = False, xet: bool = False
    ) -> None:
        self.hub, self.home, self.token, self.offline, self.xet = hub, home, token, offline, xet
        home.mkdir(parents=True, exist_ok=True)

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def snapshot(self, repo_id: str, commit: str) -> Path:
        return self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit

    def enter(self) -> None:
        """Make this process one of the machine."""
        os.environ |= {"HF_TOKEN": self.token, "XDG_CACHE_HOME": str(self.home / "xdg")}
        known: dict[str, Any] = {"HF_HUB_DISABLE_XET": not self.xet, "HF_HUB_OFFLINE": self.offline}
        known["HF_HUB_DISABLE_TELEMETRY"] = True  # as the command line sets it before the import
        known |= {"ENDPOINT": self.hub.url, "HF_HUB_CACHE": str(self.cache)}
        known["HUGGINGFACE_CO_URL_TEMPLATE"] = (
            f"{self.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        for name, value in known.items():
            setattr(constants, name, value)

    def start(self, *words: object, change: Callable[[], object] = bool) -> tiny.Forked:
        """Begin a command.

        Args:
            change: what the fork does first.
        """
        log = self.home / f"log-{len(list(self.home.glob('log-*')))}"
        log.touch()
        return tiny.Forked(*words, log=log, prepare=lambda: (self.enter(), change()))

    def run(self, *words: object, change: Callable[[], object] = bool) -> Said:
        """A command, to its end."""
        before = len(self.hub.log)
        process = self.start(*words, change=change)
        code = process.wait()
        asked = [f"{each.method} {each.path}" for each in self.hub.log[before:]]
        text = process.text()
        assert "Traceback" not in text, text
        return Said(code, text, asked)

    def done(self, *words: object, change: Callable[[], object] = bool) -> Said:
        """A command that must end with exit code 0."""
        said = self.run(*words, change=change)
        assert said.code == 0, f"fintune {' '.join(map(str, words))}: {said.code}\n{said.text}"
        return said
