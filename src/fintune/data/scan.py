"""First pass: every row of every source, streamed; text filters, and keys for what follows.

Only the rows that come first in hash order keep their text, so memory does not grow with the
input: of the others a few numbers stay. Batches may be scanned in several processes; results are
taken in order, so their number changes nothing.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np

from fintune.config import DataConfig
from fintune.data.filters import refuse
from fintune.data.personal import mask
from fintune.data.raw import Bad, Batch, parse_block
from fintune.data.rows import Rejected, repair, to_messages
from fintune.data.sources import Source
from fintune.data.text import hash64, normal, passage
from fintune.example import Dropped, Example, Message
from fintune.files import sha256_bytes, sha256_json

LABEL_CHARACTERS = 40
"""Longest answer that counts as a label when one input carries two of them."""

BODY_CHARACTERS = 400
"""Longest text, and longest instruction, of a label that describes the text as a whole; of a longer
one more than one thing can be asked."""

YES_OR_NO = ("yes", "no", "true", "false")
MARKS = ".,;:!?'\"()[]\u2018\u2019\u201c\u201d"
_QUOTED = re.compile(r"['\"\u2018\u201c]([^'\"\u2019\u201d\n]{1,60})['\"\u2019\u201d](?!\w)")

_ESCAPED = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")

MOST_CHARACTERS = 1_000_000
"""A longer row is out at once: no context window holds it, and every later step would crawl."""

PARALLEL_BYTES = 24 << 20
"""Smaller inputs are scanned in this process: starting others takes longer than the work."""

SAMPLES = 3
"""Rows of each reason whose text the report shows."""

Row = tuple[int, str, int, float, int, int, tuple[Message, ...] | None]
"""line, row_sha256, key, order, input key, label key, messages (None when over the limit)."""


@dataclass(slots=True)
class BatchResult:
    """What one batch came to."""

    read: int = 0
    rows: list[Row] = field(default_factory=list)
    dropped: list[tuple[int, str, str, str]] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass(slots=True)
class Scanned:
    """What all sources came to: candidates in hash order with text, the rest as numbers."""

    read: Counter[str]
    dropped: list[Dropped]
    candidates: list[Example]
    waiting: set[str]
    """Sources with rows that more candidates would bring."""
    repairs: Counter[str]
    samples: dict[str, list[str]]


def scan_batch(
    batch: Batch, source: Source, config: DataConfig, seed: int, limit: float
) -> BatchResult:
    """Parse, repair, filter and key the rows of one batch.

    Args:
        limit: rows whose order is above it come back without their text.
    """
    result, columns = BatchResult(), source.config.columns
    for line, raw in parse_block(batch):
        result.read += 1
        sha = _row_sha256(raw)
        try:
            if isinstance(raw, Bad):
                raise Rejected(raw.reason, raw.detail)
            messages = tuple(
                Message(message.role, repair(message.content, result.repairs).strip())
                for message in to_messages(raw, columns, inline_turns=config.inline_turns)
            )
            if sum(len(message.content) for message in messages) > MOST_CHARACTERS:
                raise Rejected("too_long", f"more than {MOST_CHARACTERS} characters")
            if reason := refuse(messages, config):
                raise Rejected(*reason)
        except Rejected as out:
            result.dropped.append((line, sha, out.reason, _shown(out.detail, config)[:200]))
            if len(result.samples[out.reason]) < SAMPLES:
                text = str(raw)
                if isinstance(raw, Bad):  # a comma may stand between two values there
                    text = f"{raw.detail}: {raw.raw.decode('utf-8', 'replace')}".replace(",", ", ")
                place = f"{source.name}:{line}"
                result.samples[out.reason].append(f"{place} {_shown(text, config)[:400]}")
            continue
        result.rows.append(_keyed(line, sha, messages, source.config.weight, seed, limit))
    return result


def _shown(text: str, config: DataConfig) -> str:
    """A text for the ledger or the report: without escapes, which would hide values, and masked.
    Of a long one the first 20,000 characters; callers cut behind the masks, not through a number.
    """
    plain = _ESCAPED.sub(lambda found: chr(int(found[1] or found[2], 16)), text[:20_000])
    plain = repair(plain, Counter()).replace("\ufffd", " ")
    return plain if config.personal_data == "off" else mask(plain)[0]


def _row_sha256(raw: object) -> str:
    if isinstance(raw, Bad):
        return sha256_bytes(raw.raw)
    try:
        return sha256_json(raw)
    except (ValueError, TypeError, RecursionError):
        return sha256_bytes(repr(raw).encode("utf-8", "backslashreplace"))


def _keyed(
    line: int, sha: str, messages: tuple[Message, ...], weight: float, seed: int, limit: float
) -> Row:
    turns = [normal(message.content) for message in messages if message.role != "system"]
    key = hash64(*turns)
    uniform = (hash64(str(seed), str(key)) + 1) / 2**64
    order = -math.log(uniform) / weight
    label = _bare(turns[-1]) if len(turns[-1]) <= LABEL_CHARACTERS else ""
    shown = messages if order <= limit else None
    keys = (_input(messages, label), hash64(label)) if label else (0, 0)
    return line, sha, key, order, *keys, shown


def _bare(text: str) -> str:
    """A text without case, white space and the marks around its words."""
    return " ".join(word.strip(MARKS) for word in text.casefold().split())


def _input(messages: tuple[Message, ...], label: str) -> int:
    """What a label answers. Of one text with the labels to choose from, the instruction's wording
    does not count, but terms that it quotes do; yes or no answers its very words."""
    asked = [message.content for message in messages if message.role == "user"]
    if len(asked) == 1 and label not in YES_OR_NO and not any(map(str.isdigit, label)):
        body = passage(Example("", 0, "", messages))
        rest = normal("\n".join(message.content for message in messages[:-1])).replace(body, " ")
        offered = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", rest)
        if offered and max(len(body), len(rest)) <= BODY_CHARACTERS:
            return hash64("offered", _bare(body), *sorted(set(_QUOTED.findall(rest))))
    return hash64(*(_bare(message.content) for message in messages[:-1]))


def scan(sources: list[Source], config: DataConfig, seed: int, wanted: int) -> Scanned:
    """Scan everything; keep the text of the `wanted` rows that come first in hash order.

    Exact duplicates go here (the first in hash order stays), and every row of an input that
    carries two different labels.
    """
    found = Scanned(Counter(), [], [], set(), Counter(), defaultdict(list))
    rows: list[tuple[str, Row]] = []
    limit, texts = [math.inf], 0
    for source, result in _results(sources, config, seed, limit):
        found.read[source.name] += result.read
        found.repairs.update(result.repairs)
        found.dropped += (Dropped(source.name, *row) for row in result.dropped)
        for reason, shown in result.samples.items():
            found.samples[reason] += shown[: SAMPLES - len(found.samples[reason])]
        # Scanned under an older limit where several processes work: held to today's here.
        new = [row if row[3] <= limit[0] else (*row[:6], None) for row in result.rows]
        rows += ((source.name, row) for row in new)
        texts += sum(row[6] is not None for row in new)
        if texts > 2 * wanted:
            limit[0] = float(np.partition([row[3] for _, row in rows], wanted)[wanted])
            rows = [(name, row if row[3] <= limit[0] else (*row[:6], None)) for name, row in rows]
            texts = sum(row[6] is not None for _, row in rows)
    rows.sort(key=lambda item: (item[1][3], item[1][1], item[0], item[1][0]))
    _settle(rows, wanted, found, config)
    return found


def _settle(rows: list[tuple[str, Row]], wanted: int, found: Scanned, config: DataConfig) -> None:
    labels: dict[int, int] = {}
    torn: set[int] = set()
    for _, row in rows:
        if row[5] and labels.setdefault(row[4], row[5]) != row[5]:
            torn.add(row[4])
    first: dict[int, tuple[str, int]] = {}
    for name, (line, sha, key, _, asked, label, messages) in rows:
        reason, detail = "over_cap", ""
        if label and asked in torn:
            reason, detail = "contradictory_labels", f"{asked:016x}"
        elif key in first:
            reason, detail = "duplicate", "of {}:{}".format(*first[key])
        else:
            first[key] = (name, line)
            if len(found.candidates) < wanted and messages is not None:
                found.candidates.append(Example(name, line, sha, messages))
                continue
        found.dropped.append(Dropped(name, line, sha, reason, detail))
        if messages is not None and len(found.samples[reason]) < SAMPLES:
            found.samples[reason].append(excerpt(found.dropped[-1], messages, config))
    found.waiting.update(row.source for row in found.dropped if row.reason == "over_cap")


def excerpt(row: Dropped, messages: tuple[Message, ...], config: DataConfig) -> str:
    """The end of a dropped row, for the report."""
    text = "\n".join(f"{message.role}: {message.content}" for message in messages)[-20_000:]
    return f"{row.source}:{row.line} ({row.detail})\n{_shown(text, config)[-500:]}"


def _results(
    sources: list[Source], config: DataConfig, seed: int, limit: list[float]
) -> Iterator[tuple[Source, BatchResult]]:
    """Results in the order of the batches, whatever the number of processes."""
    size = sum(source.path.stat().st_size for source in sources if source.path)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = config.workers or cores or 1
    if workers == 1 or size < PARALLEL_BYTES:
        for source in sources:
            for batch in source.batches():
                yield source, scan_batch(batch, source, config, seed, limit[0])
        return
    waiting: list[tuple[Source, Future[BatchResult]]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for source in sources:
            for batch in source.batches():
                work = pool.submit(scan_batch, batch, source, config, seed, limit[0])
                waiting.append((source, work))
                if len(waiting) > 2 * workers:
                    done, result = waiting.pop(0)
                    yield done, result.result()
        for done, result in waiting:
            yield done, result.result()
