"""First pass: every row of every source, streamed; text filters, and keys for what follows.

Only the rows that come first in hash order keep their text, so memory does not grow with the
input: of the others a few numbers stay. Batches may be scanned in several processes; results are
taken in order, so their number changes nothing.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from operator import attrgetter
from typing import Any

import numpy as np

from fintune.config import DataConfig
from fintune.data.filters import check_filters
from fintune.data.report import Ledger
from fintune.data.schema import Rejected, to_messages
from fintune.data.texts import repair
from fintune.example import Example, named_document
from fintune.files import sha256_bytes, sha256_json
from fintune.formats import Row, Unreadable, parse
from fintune.ngrams import hash64, normal
from fintune.sources import Source

LABEL_CHARACTERS = 40
"""Longest answer that counts as a label when one prompt carries two of them."""

PARALLEL_BYTES = 24 << 20
"""Smaller inputs are scanned in this process: starting others takes longer than the work."""

PROCESSES = min(16, os.cpu_count() or 1)
"""Processes that scan; one that reads feeds no more."""


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


def scan(
    sources: list[Source], config: DataConfig, seed: int, wanted: int
) -> tuple[Ledger, list[Example]]:
    """Scan everything; the ledger, and the `wanted` rows that come first in hash order.

    Exact duplicates go here (the first in hash order stays), and every row of a prompt that
    carries two different labels.
    """
    ledger, rows = Ledger(redact=config.pii != "off"), list[ScannedRow]()
    texts, threshold = 0, math.inf
    for part, scanned in _batches(sources, config, seed):
        ledger.extend(part)
        rows += scanned
        texts += _strip(scanned, threshold)
        if texts > 2 * wanted:
            threshold = np.partition([row.priority for row in rows], wanted)[wanted]
            texts = _strip(rows, threshold)
    place = attrgetter("priority", "example.row_sha256", "example.source", "example.line")
    rows.sort(key=place)  # the same whatever the order of the input
    return ledger, _deduplicate(rows, wanted, ledger)


def _strip(rows: list[ScannedRow], threshold: float) -> int:
    """Drop the text of rows above a priority; return how many keep theirs."""
    for row in rows:
        if row.priority > threshold and row.example.messages:
            row.example = replace(row.example, messages=())
    return sum(bool(row.example.messages) for row in rows)


def _batches(
    sources: list[Source], config: DataConfig, seed: int
) -> Iterator[tuple[Ledger, list[ScannedRow]]]:
    """Every batch scanned, in order, whatever the number of processes."""
    size = sum(path.stat().st_size for source in sources for path in source.paths)
    batches = ((batch, source) for source in sources for batch in source.batches())
    if PROCESSES == 1 or size < PARALLEL_BYTES:
        yield from (scan_batch(*batch, config, seed) for batch in batches)
        return
    waiting: list[Future[tuple[Ledger, list[ScannedRow]]]] = []
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for batch in batches:
            waiting.append(pool.submit(scan_batch, *batch, config, seed))
            if len(waiting) > 2 * PROCESSES:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)


def scan_batch(
    batch: list[Row], source: Source, config: DataConfig, seed: int
) -> tuple[Ledger, list[ScannedRow]]:
    """Parse, repair, filter and key the rows of one batch."""
    ledger, rows = Ledger(redact=config.pii != "off"), list[ScannedRow]()
    cut = ledger.repairs if config.inline_turns == "cut" else None

    def clean(text: str) -> str:
        return repair(text, ledger.repairs).strip()

    for line, given in batch:
        raw = parse(given)
        ledger.read[source.name] += 1
        if not ledger.columns and isinstance(raw, dict):
            ledger.columns = [*map(str, raw)]
        example = Example(source.name, line, _row_sha256(raw), ())
        try:
            if isinstance(raw, Unreadable):
                raise Rejected(raw.reason, raw.detail)
            turns = to_messages(raw, source.config.columns, cut)
            messages = tuple(turn.changed(clean, "content", "thought") for turn in turns)
            check_filters(messages, config)
        except (Rejected, RecursionError) as out:  # or nested too deeply
            reason, detail = getattr(out, "reason", "not_text"), getattr(out, "detail", str(out))
            ledger.drop(example, reason, ledger.shown(detail)[:200], str(raw))
        else:
            document = named_document(raw, source.config.columns)
            example = replace(example, messages=messages, document=document)
            rows.append(_keyed(example, source.config.weight, seed))
    return ledger, rows


def _row_sha256(raw: Any) -> str:
    try:
        return sha256_json(raw)
    except (ValueError, TypeError, RecursionError):  # unreadable, NaN, a date, bytes
        text = raw.raw if isinstance(raw, Unreadable) else repr(raw)
        return sha256_bytes(text.encode("utf-8", "backslashreplace"))


def _keyed(example: Example, weight: float, seed: int) -> ScannedRow:
    texts = [normal(message.content + message.tool_calls) for message in example.messages]
    key = hash64(*texts[example.messages[0].role == "system" :])
    uniform = (hash64(str(seed), str(key)) + 1) / 2**64
    row = ScannedRow(example, key, -math.log(uniform) / weight)
    if len(texts[-1]) <= LABEL_CHARACTERS:
        row.prompt, row.label = hash64(*texts[:-1]), hash64(texts[-1])
    return row


def _deduplicate(rows: list[ScannedRow], wanted: int, ledger: Ledger) -> list[Example]:
    labels: dict[int, int] = {}
    torn = {row.prompt for row in rows if labels.setdefault(row.prompt, row.label) != row.label}
    first: dict[int, Example] = {}
    candidates: list[Example] = []
    for row in rows:
        if row.label and row.prompt in torn:
            ledger.drop(row.example, "contradictory_labels", f"{row.prompt:016x}")
        elif row.key in first:
            ledger.drop(row.example, "duplicate", f"of {first[row.key].place}")
        else:
            first[row.key] = row.example
            if row.example.messages and len(candidates) < wanted:
                candidates.append(row.example)
            else:
                ledger.drop(row.example, "over_cap")
    return candidates
