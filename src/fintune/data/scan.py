"""First pass: every row of every source, streamed; text filters, and keys for what follows.

Only the rows that come first in hash order keep their text, so memory does not grow with the
input: of the others a few numbers stay. Batches may be scanned in several processes; results are
taken in order, so their number changes nothing.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from fintune.config import DataConfig
from fintune.data.clean import repair
from fintune.data.filters import first_rejection
from fintune.data.ledger import Ledger
from fintune.data.ngrams import hash64, normal
from fintune.data.readers import Batch, Unreadable
from fintune.data.schema import Rejected, to_messages
from fintune.data.sources import Source
from fintune.example import Dropped, Example, Message
from fintune.files import sha256_bytes, sha256_json

LABEL_CHARACTERS = 40
"""Longest answer that counts as a label when one prompt carries two of them."""

PARALLEL_BYTES = 24 << 20
"""Smaller inputs are scanned in this process: starting others takes longer than the work."""


@dataclass(slots=True)
class ScannedRow:
    """A row that passed the filters; without messages where it comes too late to be a candidate."""

    example: Example
    key: int
    """Hash of its turns but the system's: rows of one key are duplicates."""
    priority: float
    """Place in hash order, by the source's weight; the lowest are taken first."""
    prompt: int = 0
    label: int = 0
    """Hashes of what stands before the answer and of the answer, where that is short; else 0."""


class TopK:
    """All rows, of which about the first `wanted` by priority keep their text."""

    def __init__(self, wanted: int) -> None:
        self.rows: list[ScannedRow] = []
        self.threshold = math.inf
        """Priority above which a row needs no text."""
        self._wanted, self._texts = wanted, 0

    def extend(self, rows: list[ScannedRow]) -> None:
        """Add rows; the threshold falls each time that twice as many texts are held as wanted."""
        self.rows += rows
        self._texts += _strip(rows, self.threshold)
        if self._texts > 2 * self._wanted:
            priorities = np.array([row.priority for row in self.rows])
            self.threshold = float(np.partition(priorities, self._wanted)[self._wanted])
            self._texts = _strip(self.rows, self.threshold)


def _strip(rows: list[ScannedRow], threshold: float) -> int:
    """Drop the text of rows above a priority; return how many keep theirs."""
    for row in rows:
        if row.priority > threshold and row.example.messages:
            row.example = replace(row.example, messages=())
    return sum(bool(row.example.messages) for row in rows)


@dataclass(slots=True)
class Scanned:
    """What one batch, or all sources, came to."""

    ledger: Ledger
    read: Counter[str] = field(default_factory=Counter)
    """Rows by source."""
    repairs: Counter[str] = field(default_factory=Counter)
    rows: list[ScannedRow] = field(default_factory=list)
    candidates: list[Example] = field(default_factory=list)
    """In hash order."""
    complete: bool = True
    """Every row that is no duplicate is a candidate."""


def scan(sources: list[Source], config: DataConfig, seed: int, wanted: int) -> Scanned:
    """Scan everything; keep the text of the `wanted` rows that come first in hash order.

    Exact duplicates go here (the first in hash order stays), and every row of a prompt that
    carries two different labels.
    """
    found = Scanned(Ledger(redact=config.pii != "off"))
    top = TopK(wanted)
    for batch in _batches(sources, config, seed, top):
        found.ledger.extend(batch.ledger)
        found.read += batch.read
        found.repairs += batch.repairs
        top.extend(batch.rows)
    top.rows.sort(key=_order)
    _deduplicate(top.rows, wanted, found)
    return found


def _order(row: ScannedRow) -> tuple[float, str, str, int]:
    example = row.example
    return row.priority, example.row_sha256, example.source, example.line


def scan_batch(
    batch: Batch, source: Source, config: DataConfig, seed: int, threshold: float
) -> Scanned:
    """Parse, repair, filter and key the rows of one batch.

    Args:
        threshold: rows whose priority is above it come back without their text.
    """
    found = Scanned(Ledger(redact=config.pii != "off"))
    for line, raw in batch.parsed():
        found.read[source.name] += 1
        sha256 = _row_sha256(raw)
        try:
            if isinstance(raw, Unreadable):
                raise Rejected(raw.reason, raw.detail)
            messages = tuple(
                Message(message.role, repair(message.content, found.repairs).strip())
                for message in to_messages(raw, source.config.columns)
            )
            if reason := first_rejection(messages, config):
                raise Rejected(*reason)
        except Rejected as out:
            detail = found.ledger.shown(out.detail)[:200]
            dropped = Dropped(source.name, line, sha256, out.reason, detail)
            found.ledger.add(dropped, str(raw))
            continue
        example = Example(source.name, line, sha256, messages)
        found.rows.append(_keyed(example, source.config.weight, seed))
    _strip(found.rows, threshold)
    return found


def _row_sha256(raw: Any) -> str:
    if isinstance(raw, Unreadable):
        return sha256_bytes(raw.raw)
    try:
        return sha256_json(raw)
    except (ValueError, TypeError, RecursionError):  # NaN, a date, bytes
        return sha256_bytes(repr(raw).encode("utf-8", "backslashreplace"))


def _keyed(example: Example, weight: float, seed: int) -> ScannedRow:
    messages = example.messages
    key = hash64(*(normal(message.content) for message in messages if message.role != "system"))
    uniform = (hash64(str(seed), str(key)) + 1) / 2**64
    row = ScannedRow(example, key, -math.log(uniform) / weight)
    if len(answer := normal(messages[-1].content)) <= LABEL_CHARACTERS:
        row.prompt = hash64(*(normal(message.content) for message in messages[:-1]))
        row.label = hash64(answer)
    return row


def _deduplicate(rows: list[ScannedRow], wanted: int, found: Scanned) -> None:
    labels: dict[int, int] = {}
    torn = {row.prompt for row in rows if labels.setdefault(row.prompt, row.label) != row.label}
    first: dict[int, Example] = {}
    for row in rows:
        if row.label and row.prompt in torn:
            found.ledger.drop(row.example, "contradictory_labels", f"{row.prompt:016x}")
        elif row.key in first:
            found.ledger.drop(row.example, "duplicate", f"of {first[row.key].place}")
        else:
            first[row.key] = row.example
            if row.example.messages and len(found.candidates) < wanted:
                found.candidates.append(row.example)
            else:
                found.ledger.drop(row.example, "over_cap")
                found.complete = False


def workers() -> int:
    """Processes that scan: one a core that this process may use."""
    limited = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def _batches(sources: list[Source], config: DataConfig, seed: int, top: TopK) -> Iterator[Scanned]:
    """Every batch scanned, in order, whatever the number of processes."""
    size = sum(source.path.stat().st_size for source in sources if source.path)
    batches = ((batch, source) for source in sources for batch in source.batches())
    count = workers()
    if count == 1 or size < PARALLEL_BYTES:
        for batch, source in batches:
            yield scan_batch(batch, source, config, seed, top.threshold)
        return
    waiting: list[Future[Scanned]] = []
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for batch, source in batches:
            waiting.append(pool.submit(scan_batch, batch, source, config, seed, top.threshold))
            if len(waiting) > 2 * count:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)
