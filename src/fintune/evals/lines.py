"""Append-only JSON Lines that survive a kill: one write a line, synced, one writer.

A line is on disk when `append` returns. A torn last line (the process was killed while writing
it) is moved to `NAME.torn` on the next opening, never repaired.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from fintune.errors import OutputError
from fintune.files import read_jsonl


class Lines:
    """One append-only file, locked while open.

    Raises:
        OutputError: another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise OutputError(
                f"{path} is being written by another process", fix="wait for it, or stop it"
            ) from None
        self._cut_torn_line()

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return list(read_jsonl(self.path))

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows, one line each, in one system call; return when they are on disk."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._handle, data) :]
        os.fsync(self._handle)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)  # and its lock with it

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._handle).st_size
        whole = self.path.read_bytes().rfind(b"\n") + 1
        if whole < size:
            torn = os.pread(self._handle, size - whole, whole)
            self.path.with_name(f"{self.path.name}.torn").write_bytes(torn)
            os.ftruncate(self._handle, whole)
            os.fsync(self._handle)
