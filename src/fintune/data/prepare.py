"""The stage `prepare`: from sources to a Parquet file for each part of the split and a ledger.

Text filters and exact duplicates run over everything, streaming; then only the rows that come
first in hash order are compared, tokenized and split, until the caps are full.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fintune import __version__, seal
from fintune.chat import ChatFormat
from fintune.config import Config, DataConfig, SourceConfig
from fintune.console import heading, meter, say, warn
from fintune.data import WORDS
from fintune.data.decontaminate import read_benchmarks
from fintune.data.filters import MEANINGS
from fintune.data.report import (
    FINAL,
    PARTS,
    Ledger,
    Part,
    Parts,
    Selected,
    Tokenized,
    write_account,
)
from fintune.data.scan import scan
from fintune.data.split import LEAST_TEST_SHARE, near_duplicates, share_of_test, split
from fintune.data.texts import mask_messages
from fintune.errors import DataError
from fintune.example import IGNORE_INDEX, Example, Message
from fintune.files import read_json, sha256_file, staged_folder
from fintune.labels import tell
from fintune.model import Base, find_base, load_chat
from fintune.ngrams import same_facts
from fintune.rewording import contaminated
from fintune.sources import Source, find_sources, named, recorded_commits
from fintune.template import Refused

MARGIN = 1.15
"""Candidates beyond the caps: what later filters usually take. Too few, and more are scanned."""

LENGTH_MULTIPLE = 64
"""The maximum length is a multiple of this, as attention kernels and padding like it."""

KEPT_SHARE = 0.99
"""Share of rows that the adaptive maximum length must keep, as the published recipe's."""

MANY_TOO_LONG = 0.1
"""Share of rows dropped as too long from which a warning tells of the cap."""

MOST_DROPPED = 0.2
"""Share of the rows above which it is said that many are dropped."""

HINTS: dict[str, str] = WORDS["hints"]
SHOWN = 300
"""Characters of the first dropped row in a message."""

ROWS_A_CALL = 512
_COLUMNS = ["example_id", "source", "line", "group", "messages", "input_ids", "labels", "length"]
ROW_GROUP = 2048
"""Rows that are made a table and written at once."""


def prepare(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Prepare the data of a config and return its manifest.

    A finished folder of the same inputs is kept as it is.

    Args:
        fresh: move an existing folder aside first.

    Raises:
        DataError: sources that cannot be read, or nothing left of them.
        OutputError: the folder holds the result of other inputs, lacks a file, is being written
            by another run, or cannot be written.
        ModelError: no base folder, tokenizer or usable chat template.
    """
    heading("prepare")
    kept_in = () if fresh else (config.data_dir,)
    base = find_base(config.model, weights=False, kept_in=kept_in)
    chat = load_chat(base, config.chat)
    folder = config.data_dir
    old = {} if fresh else seal.recorded_inputs(folder)
    known = recorded_commits(*(old.get(table, {}) for table in ("sources", "benchmarks")))
    sources = find_sources(config.data, known)
    encoding = config.data.encoding
    wanted = [SourceConfig(**b.model_dump(), encoding=encoding) for b in config.data.benchmarks]
    benchmarks = named(wanted, "data.benchmarks", known)
    inputs = _inputs(config, base, chat, sources, benchmarks)
    # Rows depend on the tokenizer alone: prepared once, they are kept for other weights.
    inputs["base"] = seal.recorded_base(kept_in, base.id) or base.record
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        if seal.finished(folder, inputs, command="fintune prepare"):
            say(f"{folder}: unchanged, kept")
            return read_json(folder / "manifest.json")
        with staged_folder(folder) as staging:
            sources = [source.fetched() for source in sources]
            questions = read_benchmarks(benchmarks, redact=config.data.pii != "off")
            selected = _select(config, sources, chat, questions)
            _write_rows(staging, selected.parts)
            manifest = write_account(staging, selected, sources, inputs)
            seal.seal(staging, inputs)
    _tell(folder, manifest)
    kept = (row.example for part in selected.parts.values() for _, row in part)
    tell(manifest["labels"], kept)
    return manifest


def _tell(folder: Path, manifest: dict[str, Any]) -> None:
    """Say what became of the rows, and what can be done about those that are out."""
    rows, out = manifest["rows"], Counter(manifest["rows"]["dropped"])
    for note in manifest["chat"]["notes"]:
        say(f"chat template: {note}")
    if again := manifest["chat"]["tokens_read_again"]:
        total = sum(manifest["lengths"][part]["tokens"] for part in PARTS)
        say(f"{again / total:.0%} of the tokens are read again: an example an answer")
    if thoughts := manifest["reasoning"]:
        thinking = manifest["chat"]["settings"]["thinking"]
        say(f"{thoughts} rows hold reasoning (chat.thinking: {thinking})")
    if cut := manifest["repairs"].get("inline_turns"):
        warn(f"{cut} questions hold a chat and became turns; data.inline_turns=keep: one text")
    if found := Counter(manifest["personal_data"]):
        dealt = "masked" if manifest["inputs"]["settings"]["pii"] == "mask" else "rows dropped"
        say(f"personal data {dealt}: {_listed(found)}; names and addresses are not looked for")
    if manifest["inputs"]["settings"]["test_share"] != (share := manifest["test_share"]):
        say(f"data.test_share is not set: {share:.0%} of the texts are kept for the test")
    kept = " + ".join(f"{rows[part]} {part}" for part in (*PARTS, FINAL) if part in rows)
    say(f"{folder}: {rows['read']} rows read = {kept} + {out.total()} dropped")
    if (most := manifest["related"]["largest"]) > (rows["read"] - out.total()) / 2:
        more = "give rows of more reports, or texts that overlap less"
        warn(f"{most} rows are one group of related texts, none of which can be tested: {more}")
    for reason, count in out.most_common():
        hint = f"; {HINTS[reason]}" if reason in HINTS else ""
        say(f"{count:>8,} {reason}: {MEANINGS[reason]}{hint}")
    del out["over_cap"]  # as the caps say
    if out.total() > MOST_DROPPED * rows["read"]:
        ((main, _),) = out.most_common(1)
        look = f"look at them: fintune dropped --reason {main}"
        warn(f"{out.total() / rows['read']:.0%} of the rows are dropped, mostly {main}; {look}")


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _inputs(
    config: Config, base: Base, chat: ChatFormat, sources: list[Source], benchmarks: list[Source]
) -> dict[str, Any]:
    """What the prepared rows depend on; other inputs are refused in the same folder."""

    def described(source: Source) -> dict[str, Any]:
        settings = source.config.model_dump(mode="json", exclude={"path"})
        return settings | {"identity": source.identity}

    places = {"out", "source", "sources", "benchmarks"}
    settings = config.data.model_dump(mode="json", exclude=places)
    settings |= {"chat": config.chat.model_dump(mode="json"), "seed": config.seed}
    return {
        "sources": {source.name: described(source) for source in sources},
        "benchmarks": {source.name: described(source) for source in benchmarks},
        "settings": settings,
        "tokenizer_sha256": sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
        "fintune": __version__,  # other filters, other rows
    }


def _select(
    config: Config, sources: list[Source], chat: ChatFormat, questions: list[Example]
) -> Selected:
    """Select the rows; where the caps are not filled, again among four times the candidates."""
    data = config.data
    share = data.validation_share + (data.test_share or LEAST_TEST_SHARE) + data.final_share
    most = max(data.max_train_rows / (1 - share), data.max_held_out_rows / share)
    wanted = math.ceil(MARGIN * most)
    while True:
        ledger, examples = scan(sources, data, config.seed, wanted)
        complete = not ledger.counts()["over_cap"]
        if data.pii != "off":
            examples = _mask(examples, data.pii, ledger)
        chat = chat.for_rows(example.messages for example in examples)
        hits = contaminated(examples, questions)
        for at, hit in sorted(hits.items()):
            question = "{benchmark}:{benchmark_line} {measure} {score}".format(**hit)
            ledger.drop(examples[at], "contaminated", question)
        examples = [example for at, example in enumerate(examples) if at not in hits]
        rows = _tokenize(examples, chat, data.min_tokens, ledger)
        lengths = [row.length for row in rows]
        max_length = _adaptive_max_length(lengths, data.max_length)
        rows = _fit(rows, max_length, data.over_length, ledger)
        repeats = near_duplicates([row.example for row in rows], data.near_duplicates)
        for at, first in sorted(repeats.items()):
            ledger.drop(rows[at].example, "near_duplicate", f"of {rows[first].example.place}")
        rows = [row for at, row in enumerate(rows) if at not in repeats]
        test_share = data.test_share or share_of_test(len(rows))
        parts, full = _fill(rows, sources, data, test_share, ledger)
        if full or complete:
            asked = [row for part in ("test", FINAL) for row in parts.get(part, [])]
            parts["train"] = _unrepeated(parts["train"], asked, ledger)
            _check_left(Ledger.beside(config.data_dir), ledger, parts)
            record = chat.template.record
            found = [*hits.values()]
            return Selected(ledger, found, lengths, max_length, parts, record, test_share)
        say(f"{wanted} candidates did not fill the caps: {wanted * 4} are taken")
        wanted *= 4


def _mask(examples: list[Example], policy: str, ledger: Ledger) -> list[Example]:
    """Rows without personal data; the ledger counts the rows of each kind."""
    kept = []
    for example in examples:
        messages, kinds = mask_messages(example.messages)
        clean = replace(example, messages=messages)
        ledger.personal.update(kinds)
        if kinds and policy == "drop":
            ledger.drop(clean, "personal_data", " ".join(sorted(kinds)))
        else:
            kept.append(clean)
    return kept


def _tokenize(
    examples: list[Example], chat: ChatFormat, min_tokens: int, ledger: Ledger
) -> list[Tokenized]:
    """Encode rows; those that the template refuses, or with fewer than `min_tokens` of text, the
    template apart, are dropped."""
    rows: list[Tokenized] = []
    with meter("tokenize", len(examples)) as progress:
        for start in range(0, len(examples), ROWS_A_CALL):
            chunk = examples[start : start + ROWS_A_CALL]
            encoded = chat.encode_many([example.messages for example in chunk])
            for example, row in zip(chunk, encoded, strict=True):
                if isinstance(row, Refused):
                    ledger.drop(example, *row)
                    continue
                tokens = chat.text_tokens(example.messages, row[-1])
                if tokens < min_tokens:
                    ledger.drop(example, "too_short", f"{tokens} tokens")
                else:
                    pairs = ((each.input_ids, each.labels) for each in row)
                    arrays = [(np.array(i, np.int32), np.array(n, np.int32)) for i, n in pairs]
                    rows.append(Tokenized(example, arrays))
            progress.advance(len(chunk))
    return rows


def _adaptive_max_length(lengths: list[int], cap: int) -> int:
    """The smallest multiple of 64 that 99 % of the lengths fit in, at most `cap`."""
    needed = sorted(lengths)[math.ceil(KEPT_SHARE * len(lengths)) - 1] if lengths else cap
    return min(cap, math.ceil(needed / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _fit(rows: list[Tokenized], max_length: int, policy: str, ledger: Ledger) -> list[Tokenized]:
    """Drop rows over the maximum length, or cut their end off.

    A row without a token left to train is dropped in any case.
    """
    long = sum(row.length > max_length for row in rows)
    if policy == "drop" and long > MANY_TOO_LONG * len(rows):
        fix = "to keep them raise data.max_length, or set data.over_length=truncate"
        warn(f"{long} of {len(rows)} rows are longer than {max_length} tokens and dropped: {fix}")
    kept = []
    for row in rows:
        excess = row.length - max_length
        cut = [(ids[:max_length], labels[:max_length]) for ids, labels in row.encoded]
        trained = [(ids, labels) for ids, labels in cut if (labels != IGNORE_INDEX).any()]
        if excess <= 0:
            kept.append(row)
        elif policy == "truncate" and trained:
            kept.append(Tokenized(row.example, trained, excess))
        else:
            ledger.drop(row.example, "too_long", f"{row.length} tokens")
    return kept


def _fill(
    rows: list[Tokenized],
    sources: list[Source],
    data: DataConfig,
    test_share: float,
    ledger: Ledger,
) -> tuple[Parts, bool]:
    """Put rows in hash order into their parts until the caps are full; whether all are."""
    shares = {"validation": data.validation_share, "test": test_share, FINAL: data.final_share}
    shares = {part: share for part, share in shares.items() if share}
    held_out = data.max_held_out_rows / sum(shares.values())
    caps = {part: max(1, round(held_out * share)) for part, share in shares.items()}
    caps = {"train": data.max_train_rows, **caps}
    parts: Parts = {part: [] for part in caps}
    configs = {source.name: source.config for source in sources}
    taken: Counter[int] = Counter()
    placed = split([row.example for row in rows], shares)
    for row, (group, part) in zip(rows, placed, strict=True):
        source = configs[row.example.source]
        if taken[id(source)] >= (source.max_rows or math.inf):
            ledger.drop(row.example, "over_cap", "source")
        elif len(parts[part]) >= caps[part]:
            ledger.drop(row.example, "over_cap", part)
        else:
            taken[id(source)] += 1
            parts[part].append((group, row))
    return parts, all(len(parts[part]) == cap for part, cap in caps.items())


def _unrepeated(train: Part, test: Part, ledger: Ledger) -> Part:
    """The training rows that do not repeat a test row, reworded and with its answer.

    By the measure of benchmarks' questions, but for the same words in any order: rows of one
    template have them, too.
    """
    examples = [row.example for _, row in train]
    hits = repeats(examples, [row.example for _, row in test])
    for at, hit in sorted(hits.items()):
        said = "{benchmark}:{benchmark_line} {measure} {score}".format(**hit)
        ledger.drop(examples[at], "repeats_test_row", said)
    return [placed for at, placed in enumerate(train) if at not in hits]


def repeats(train: list[Example], test: list[Example]) -> dict[int, dict[str, Any]]:
    """Index of every training row that repeats a test row, and which one (see `contaminated`).

    Rows of one template have the same words too, but other numbers and names.
    """
    asked = {example.row_sha256: example for example in test}
    hits = contaminated(train, test, same_answer=True)
    return {
        at: hit for at, hit in hits.items() if same_facts(train[at], asked[hit["benchmark_sha256"]])
    }


def _check_left(path: Path, ledger: Ledger, parts: Parts) -> None:
    """Refuse parts without rows; the ledger then stays, at this path.

    Raises:
        DataError: so it is.
    """
    path.unlink(missing_ok=True)
    reasons, read = ledger.counts(), ledger.read.total()
    empty = [part for part, rows in parts.items() if not rows]
    if not empty:
        return
    why = "without validation rows no checkpoint can be chosen, without test rows no verdict"
    if not read:
        raise DataError("0 rows read: the sources are empty", fix="see data.source and its split")
    if not reasons:
        what = f"{read} rows: too few, no {empty[0]} row is among them"
        raise DataError(what, why=why, fix="give more rows: 300 can decide, see docs/own-data.md")
    ledger.write(path)
    ((reason, count),) = reasons.most_common(1)
    shown = " ".join(" ".join(ledger.samples[reason][:1]).split())[:SHOWN]
    what = f"no {empty[0]} row is left of {read} rows read: {_listed(reasons)}"
    if reason == "unknown_columns" and count == read:
        what = f"no row fits a known format; the first one's columns: {', '.join(ledger.columns)}"
    columns = f"columns: {', '.join(ledger.columns) or 'none'}; the first row that is out: {shown}"
    what = f"{what}\n  {columns}\n  every row and its reason: {path} (fintune dropped)"
    fix = "give more rows, relax the filters, or raise data.validation_share and test_share"
    raise DataError(what, why=why, fix=HINTS.get(reason) or fix)


def _write_rows(folder: Path, parts: Parts) -> None:
    """Write each part by row groups: one table of a part would be its rows in memory again."""
    turns = [turn for rows in parts.values() for _, row in rows for turn in row.example.messages]
    filled = {name for turn in turns for name in turn.record}
    text, number, ids = pa.string(), pa.int64(), pa.list_(pa.int32())
    kinds = {name: pa.bool_() if name == "trained" else text for name in Message.__slots__}
    messages = pa.list_(pa.struct([pair for pair in kinds.items() if pair[0] in filled]))
    types = (text, text, number, text, messages, ids, ids, number)
    schema = pa.schema(zip(_COLUMNS, types, strict=True))
    for part, rows in parts.items():
        with pq.ParquetWriter(folder / f"{part}.parquet", schema, compression="zstd") as file:
            for at in range(0, len(rows), ROW_GROUP):
                group = [record for each in rows[at : at + ROW_GROUP] for record in _records(*each)]
                file.write_table(pa.Table.from_pylist(group, schema))


def _records(group: str, row: Tokenized) -> Iterator[dict[str, Any]]:
    """A row's examples; the last one alone holds the messages."""
    for at, (ids, labels) in enumerate(row.encoded, start=1):
        yield {
            **{name: getattr(row.example, name) for name in _COLUMNS[:3]},
            "group": group,
            "messages": [turn.record for turn in row.example.messages * (at == len(row.encoded))],
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
        }
