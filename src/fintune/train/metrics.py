"""`metrics.jsonl`: a line a logged step, an evaluation or a spike; and the rule for a spike."""

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from fintune.console import warn
from fintune.files import write_jsonl

WINDOW = 50
"""Updates that a loss is compared with; below `LEAST` there is no judgement."""
LEAST = 20
SIGMAS = 6.0
"""A normal loss would pass this once in 10^9 updates; those of language have a longer tail."""
MAD = 1.4826
"""Median absolute deviation -> standard deviation of a normal (Rousseeuw and Croux 1993)."""
FLOOR = 0.01
"""Least deviation, as a share of the median: equal losses are no reason to call noise a spike."""


class Metrics:
    """The file, appended line by line, and cut back to a checkpoint on resume.

    Args:
        resumed_at: step of the checkpoint; what came after it is dropped and will come again.
        evaluated: whether the checkpoint holds its own step's evaluation.
    """

    def __init__(self, path: Path, *, resumed_at: int, evaluated: bool) -> None:
        kept = [
            row
            for row in _whole_rows(path)
            if row["step"] < resumed_at
            or (row["step"] == resumed_at and (evaluated or "eval_loss" not in row))
        ]
        write_jsonl(path, kept)
        self._file = path.open("ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Hand a line to the operating system, whole. Raises ValueError on NaN."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = self._file.tell()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows up to the first that a power cut left unfinished."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


class Losses:
    """The losses of the last updates; `limit` is what the newest passed, if it stands out."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=WINDOW)
        self.limit: float | None = None

    def add(self, loss: float, share: float = 1.0) -> None:
        """Take an update's loss and judge it by those before it.

        Args:
            share: its examples over those of a whole update; a mean over fewer varies more.
        """
        before = np.array(self.last)
        self.last.append(loss)
        self.limit = None
        if before.size >= LEAST:
            median = float(np.median(before))
            spread = MAD * float(np.median(np.abs(before - median)))
            limit = median + SIGMAS * max(spread, FLOOR * abs(median)) / share**0.5
            self.limit = limit if loss > limit else None


class Spikes(TrainerCallback):  # type: ignore[misc]
    """Flags an update whose loss stands out: a line of metrics each, one notice for a row of them.

    Args:
        ids_of_step: example ids of an update, by its global step from 0.
    """

    def __init__(
        self, metrics: Metrics, losses: Losses, ids_of_step: Callable[[int], list[str]]
    ) -> None:
        self._metrics, self._losses, self._ids_of_step = metrics, losses, ids_of_step
        self._told = -WINDOW

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the update that was just made."""
        step, limit = state.global_step, self._losses.limit
        if limit is None:
            return
        loss, ids = self._losses.last[-1], self._ids_of_step(step - 1)
        row = {"spike_loss": loss, "spike_limit": limit, "rows": ids}
        self._metrics.append({"step": step, "epoch": round(state.epoch, 4), **row})
        if step - self._told >= WINDOW:
            warn(
                f"loss spike at step {step}: {loss:.3f}, where the last {WINDOW} updates allow"
                f" {limit:.3f}; rows: {', '.join(ids[:4])}{' ...' if len(ids) > 4 else ''}"
            )
            self._told = step
