"""Room on the output volume: checked before the run and at each save, waited for, never assumed.

A full disk is somebody else's mistake more often than ours, and mostly mended within minutes. A
run that ends there costs its slot on the machine, so it waits; nothing is half-written meanwhile.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fintune.console import say, warn
from fintune.errors import NoSpace, Stopped
from fintune.files import FULL, free_bytes

T = TypeVar("T")
WAIT_S = 30 * 60.0
"""Longest wait for room; a process group's timeout is longer (processes.py)."""
POLL_S = 5.0
SAY_S = 60.0
SLACK = 2**20
"""Bytes beyond what is counted: the small files, blocks of the file system, a line of metrics."""

_WORDS = (*(f"os error {code}" for code in FULL), "inline_container", "iostream error")


class Room:
    """Runs what writes, when there is room for it.

    Args:
        folder: any folder on the volume; it need not exist yet.
        stopped: whether a stop was asked for, which ends a wait.
    """

    def __init__(self, folder: Path, stopped: Callable[[], bool]) -> None:
        self._folder, self._stopped = folder, stopped

    def write(self, needed: int, action: Callable[[], T]) -> T:
        """Run `action` once `needed` bytes are free, and again where space ran out inside it.

        Args:
            action: leaves nothing half-written when it raises, and may be run again.

        Raises:
            NoSpace: no room within `WAIT_S`.
            Stopped: a stop was asked for while waiting.
        """
        start: float | None = None
        told = -SAY_S
        while True:
            if free_bytes(self._folder) >= needed:
                try:
                    done = action()
                except Exception as error:
                    if not out_of_space(error):
                        raise
                    # A quota, or a neighbour was quicker: only trying again tells.
                else:
                    if start is not None:
                        say(f"room again on {self._folder} after {time.monotonic() - start:.0f} s")
                    return done
            now = time.monotonic()
            start = now if start is None else start
            if now - start >= WAIT_S:
                raise NoSpace(
                    f"{self._missing(needed)}, after waiting {WAIT_S / 60:.0f} minutes",
                    why="everything saved before is intact",
                    fix="make room; the same command continues",
                )
            if self._stopped():
                raise Stopped(
                    f"stopped while waiting for room ({self._missing(needed)})",
                    fix="make room; the same command continues from the last checkpoint",
                )
            if now - start - told >= SAY_S:
                told = now - start
                left = (WAIT_S - (now - start)) / 60
                warn(f"{self._missing(needed)}: waiting, {left:.0f} minutes more at most")
            time.sleep(POLL_S)

    def _missing(self, needed: int) -> str:
        free = free_bytes(self._folder)
        return f"{self._folder}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"


def out_of_space(error: Exception) -> bool:
    """Whether a write failed for want of room.

    safetensors says it in words only; torch's writer (inline_container.cc, and an iostream under
    it) says no more than that its bytes did not arrive.
    """
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(word in str(error) for word in _WORDS)
