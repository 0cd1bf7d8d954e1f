"""SIGTERM, SIGINT and SIGHUP end a command with exit code 75; one handler for the process.

What the handler does follows from what there is to lose. Nothing yet (imports, reading): the
process leaves at once, since an exception raised inside an import may be caught by the importer.
A folder is written, under its lock: an exception unwinds the block, which removes what is
half-written. Updates are made: the request is noted, and the run saves at the end of the update.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from fintune.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Interrupt(BaseException):
    """Raised by the handler; no `except Exception` of a library catches it."""


class StopRequest:
    """The handler of the signals, and whether one came.

    Attributes:
        asked: a signal came since the outermost `listening` began.
    """

    def __init__(self) -> None:
        self.asked = False
        self._stepping = self._interrupted = False
        self._last_words: bytes | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first and self._stepping:
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; again to stop now\n")
            return
        if self._last_words is not None:
            with suppress(OSError):
                os.write(2, self._last_words)
            os._exit(Stopped.exit_code)
        self._interrupted = True
        raise _Interrupt

    @contextmanager
    def listening(self, last_words: bytes | None = None) -> Iterator[None]:
        """Listen while the block runs; only the main thread may (a rule of `signal`).

        A signal that was ignored before stays ignored, as `nohup` wants it for SIGHUP.

        Args:
            last_words: said by a process that leaves at once, before `guard`; None: none does.

        Raises:
            Stopped: a signal ended the block.
        """
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = self._interrupted = False
        self._last_words = last_words
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        try:
            yield
        except BaseException as error:
            # Whatever an interrupted library made of it, but for a command that ended well.
            if not self._interrupted or isinstance(error, Stopped | SystemExit):
                raise
            raise Stopped(
                "stopped; nothing half-written stays", fix="the same command continues"
            ) from None
        finally:
            self.release()

    def release(self) -> None:
        """Give the signals back before `listening` ends, to a command with nothing to continue."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def guard(self) -> None:
        """From here on there is something to unwind: a signal raises."""
        self._last_words = None

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """While updates are made: the first request is noted, the second ends the run at once."""
        if self.asked:
            raise Stopped("stopped before the first step", fix="the same command continues")
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False


STOP = StopRequest()
"""The one of this process, as signal handlers are."""
