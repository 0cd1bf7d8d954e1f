"""What was decided while a run ran, in `record.json`, so that a continued run decides nothing anew.

Precision and recomputation are chosen by what is measured on the machine at that moment; a second
measurement may fall out otherwise, and then the continued run would be another one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from fintune.errors import ModelError, Stopped
from fintune.files import read_json, write_json
from fintune.train.processes import is_lead

T = TypeVar("T")


class Record:
    """The file; written at each decision."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "record.json"
        self._facts = read_json(self._path) if self._path.is_file() else {}

    def once(self, name: str, decide: Callable[[], T]) -> T:
        """What was decided before, or is decided now."""
        return self._facts[name] if name in self._facts else self.put(name, decide())

    def put(self, name: str, decided: T) -> T:
        """Decide, or decide again; the first process writes it down."""
        self._facts[name] = decided
        if is_lead():
            write_json(self._path, self._facts)
        return decided

    def forget(self, *names: str) -> None:
        """Let these be decided again."""
        for name in names:
            self._facts.pop(name, None)

    @property
    def caps(self) -> list[dict[str, int]]:
        """Every time memory ran out: `step`, what the largest micro-batch `was`, the cap since."""
        caps: list[dict[str, int]] = self._facts.get("token_caps", [])
        return caps

    def cap(self, configured: int | None) -> int | None:
        """Most tokens of a micro-batch: what is configured, or what memory has taught since."""
        known = [cap["max_tokens"] for cap in self.caps] + ([configured] if configured else [])
        return min(known, default=None)

    @contextmanager
    def watch_memory(self, step: Callable[[], int], largest: int, longest: int) -> Iterator[None]:
        """Where memory runs out inside, halve the cap for the next start and end with 75.

        Args:
            step: updates made so far.
            largest: tokens of the largest micro-batch of this start.
            longest: tokens of the longest example, which no cap can divide.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(step(), largest, longest) from None

    def _out_of_memory(self, step: int, largest: int, longest: int) -> Stopped | ModelError:
        if largest <= longest:
            return ModelError(
                f"step {step + 1}: out of memory on one example of {longest:,} tokens",
                why="a micro-batch cannot be smaller",
                fix="set train.activation_checkpointing=on or model.quantization=4bit, or lower"
                " data.max_length_cap",
            )
        cap = max(largest // 2, longest)
        self.forget("activations")
        fact = {"step": step, "was": largest, "max_tokens": cap}
        self._facts["token_caps"] = [*self.caps, fact]
        write_json(self._path, self._facts)  # by whichever process met it: the others only wait
        return Stopped(
            f"step {step + 1}: out of memory on micro-batches of up to {largest:,} tokens; saved"
            " is what the last checkpoint holds",
            fix=f"the same command continues, with at most {cap:,} tokens a micro-batch (the same"
            " examples a step)",
        )


def fits(attempt: Callable[[], None]) -> bool:
    """Whether memory holds what is attempted; what it took is free again."""
    try:
        attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; only CUDA has a class for it."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
