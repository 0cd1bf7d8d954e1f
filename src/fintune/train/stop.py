"""SIGTERM and SIGINT, noted while updates are made and met at once before and after."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fintune.errors import Stopped
from fintune.train import processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether SIGTERM or SIGINT asked to stop.

    While updates are made, the first request is noted and met at the next step's end; the second
    ends the run at once. Before and after, where there is nothing to save, so does the first.
    """

    def __init__(self) -> None:
        self.asked = False
        self._stepping = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._stepping:
            self.asked = True
            raise Stopped(
                "stopped at once; what was saved before is intact",
                fix="the same command continues from the last checkpoint",
            )
        self.asked = True

    def everywhere(self) -> bool:
        """Whether any process was asked: all stop at the same step. All must call it."""
        self.asked = processes.any_of(self.asked)
        return self.asked

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """While updates are made. A request that a library swallowed before is met here."""
        if self.asked:
            raise Stopped("stopped before the first step", fix="the same command continues")
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listen while the block runs; only the main thread may (signal's own rule)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
