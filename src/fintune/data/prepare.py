"""The stage `prepare`: rows in, a Parquet file for each part of the split and its account out.

Text filters and exact duplicates run over everything, streaming; then only the rows that come
first in hash order are compared, tokenized and split, until the caps are full.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fintune import __version__, seal
from fintune.chat import ChatFormat
from fintune.config import Config, DataConfig
from fintune.console import heading, say
from fintune.data.benchmarks import Question, find_benchmarks, read_benchmarks
from fintune.data.decontaminate import contaminated
from fintune.data.dedup import near_duplicates
from fintune.data.ledger import Ledger
from fintune.data.ngrams import asked, hash64, passage
from fintune.data.pii import mask_messages
from fintune.data.report import write_report
from fintune.data.scan import Scanned, scan
from fintune.data.sources import Source, find_sources
from fintune.data.split import split
from fintune.data.tokenize import Tokenized, adaptive_max_length, fit, tokenize
from fintune.errors import DataError
from fintune.example import Example
from fintune.files import read_json, sha256_file, sha256_json, staged_folder, write_json
from fintune.model import Base, find_base, load_tokenizer

MARGIN = 1.15
"""Candidates beyond the caps: what later filters usually take. Too few, and more are scanned."""

ROW_GROUP = 8192
PARTS = ("train", "validation", "test")
FILES = (*(f"{part}.parquet" for part in PARTS), "ledger.parquet", "manifest.json", "report.html")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROWS = pa.schema(
    {
        "example_id": pa.string(),
        "source": pa.string(),
        "line": pa.int64(),
        "group": pa.string(),
        "messages": MESSAGES,
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "length": pa.int32(),
    }
)
"""Columns of prepared rows."""

Grouped = tuple[str, Tokenized]
"""A row with the key of its group."""


@dataclass(frozen=True, slots=True)
class Selected:
    """All rows of one preparation: kept in a part, or dropped in the ledger."""

    scanned: Scanned
    masked: list[dict[str, Any]]
    """Source, line and kinds of the rows with personal data."""
    contaminated: list[dict[str, Any]]
    lengths: list[int]
    """Before the maximum length applied."""
    max_length: int
    parts: dict[str, list[Grouped]]

    @property
    def ledger(self) -> Ledger:
        """The dropped rows."""
        return self.scanned.ledger


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
    base = find_base(config.model, weights=False)
    chat = ChatFormat(load_tokenizer(base), config.chat.date_string)
    sources, benchmarks = find_sources(config.data), find_benchmarks(config.data)
    inputs = _inputs(config, base, chat, sources, benchmarks)
    folder = config.data_dir
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        if seal.state(folder, inputs, command="fintune prepare") is seal.State.FINISHED:
            say(f"{folder}: unchanged, kept")
            return read_json(folder / "manifest.json")
        with staged_folder(folder) as staging:
            check_columns([*sources, *benchmarks])
            questions = read_benchmarks(benchmarks, redact=config.data.pii != "off")
            selected = _select(config, sources, chat, questions)
            manifest = _write(staging, selected, sources, questions, inputs)
            seal.seal(staging, inputs, needed=FILES)
    rows = manifest["rows"]
    say(
        f"{folder}: {rows['read']} rows read = {rows['train']} train + {rows['validation']}"
        f" validation + {rows['test']} test + {sum(rows['dropped'].values())} dropped"
    )
    return manifest


def _inputs(
    config: Config, base: Base, chat: ChatFormat, sources: list[Source], benchmarks: list[Source]
) -> dict[str, Any]:
    """What the prepared rows depend on; other inputs are refused in the same folder."""
    settings = config.data.model_dump(
        mode="json", exclude={"out", "source", "sources", "benchmarks"}
    )
    # A cap is one for all files of a glob; which share it is told by the first one's name.
    first = {id(source.config): source.name for source in reversed(sources)}
    return {
        "sources": {
            source.name: source.config.model_dump(mode="json", exclude={"path"})
            | {"identity": source.identity}
            | ({"cap_of": first[id(source.config)]} if source.config.max_rows else {})
            for source in sources
        },
        "settings": settings | {"chat": config.chat.model_dump(mode="json"), "seed": config.seed},
        "base": base.id,
        "tokenizer_sha256": sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
        "benchmarks": {
            source.name: source.config.model_dump(mode="json", include={"split", "columns"})
            | {"identity": source.identity}
            for source in benchmarks
        },
        "fintune": __version__,  # other filters, other rows
    }


def check_columns(sources: list[Source]) -> None:
    """Refuse a column that `columns` names and no row has, which would be read as empty."""
    for config in {id(source.config): source.config for source in sources}.values():
        lacking, found = set((config.columns or {}).values()), set[str]()
        own = (source for source in sources if source.config is config and lacking)
        for row in (row for source in own for _, row in source.rows() if isinstance(row, dict)):
            found.update(row)
            if lacking <= found:
                break
        if lacking - found:
            raise DataError(
                f"no row of {config.path} has the column {', '.join(sorted(lacking - found))}",
                fix=f"its columns are: {', '.join(sorted(found))[:300]}",
            )


def _select(
    config: Config, sources: list[Source], chat: ChatFormat, questions: list[Question]
) -> Selected:
    """Select the rows; where the caps are not filled, again among four times the candidates."""
    data = config.data
    share = data.validation_share + data.test_share
    most = max(data.max_train_rows / (1 - share), data.max_held_out_rows / share)
    wanted = math.ceil(MARGIN * most)
    while True:
        scanned = scan(sources, data, config.seed, wanted)
        ledger = scanned.ledger
        say(f"{len(scanned.candidates)} of {scanned.read.total()} rows go on")
        examples, masked = _mask(scanned.candidates, data.pii, ledger)
        examples, hits = _decontaminate(examples, questions, ledger)
        rows = tokenize(examples, chat, data.min_tokens, ledger)
        lengths = [row.length for row in rows]
        max_length = adaptive_max_length(lengths, data.max_length, data.over_length)
        rows = fit(rows, max_length, data.over_length, ledger)
        rows = _drop_near_duplicates(rows, data.near_duplicates, ledger)
        parts, full = _fill(rows, sources, scanned, data)
        if full:
            _check_left(scanned, parts)
            return Selected(scanned, masked, hits, lengths, max_length, parts)
        say(f"{wanted} candidates did not fill the caps: {wanted * 4} are taken")
        wanted *= 4


def _mask(
    examples: list[Example], policy: str, ledger: Ledger
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Rows without personal data (all under `off`), and where which kinds were found."""
    if policy == "off":
        return examples, []
    kept: list[Example] = []
    found: list[dict[str, Any]] = []
    for example in examples:
        messages, kinds = mask_messages(example.messages)
        clean = replace(example, messages=messages)
        if kinds:
            place = {"source": example.source, "line": example.line}
            found.append({**place, "kinds": sorted(kinds)})
        if kinds and policy == "drop":
            ledger.drop(clean, "personal_data", " ".join(sorted(kinds)))
        else:
            kept.append(clean)
    return kept, found


def _decontaminate(
    examples: list[Example], questions: list[Question], ledger: Ledger
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Rows that repeat no benchmark, and of the others what they repeat."""
    passages = np.array([hash64(passage(example)) for example in examples], np.uint64)
    hits = contaminated(examples, passages, questions)
    found: list[dict[str, Any]] = []
    for at, hit in sorted(hits.items()):
        row, question = examples[at], hit.question
        detail = f"{question.benchmark}:{question.line} {hit.measure} {hit.score}"
        ledger.drop(row, "contaminated", detail)
        place = {"source": row.source, "line": row.line, "row_sha256": row.row_sha256}
        near = {"measure": hit.measure, "score": hit.score}
        of = {"benchmark": question.benchmark, "benchmark_line": question.line}
        texts = {"row_text": asked(row)[-300:], "benchmark_text": question.text[-300:]}
        found.append({**place, **near, **of, **texts})
    return [example for at, example in enumerate(examples) if at not in hits], found


def _drop_near_duplicates(
    rows: list[Tokenized], threshold: float, ledger: Ledger
) -> list[Tokenized]:
    examples = [row.example for row in rows]
    repeats = near_duplicates(examples, threshold)
    for at, of in sorted(repeats.items()):
        first = examples[of]
        ledger.drop(examples[at], "near_duplicate", f"of {first.source}:{first.line}")
    return [row for at, row in enumerate(rows) if at not in repeats]


def _fill(
    rows: list[Tokenized], sources: list[Source], scanned: Scanned, data: DataConfig
) -> tuple[dict[str, list[Grouped]], bool]:
    """Put rows in hash order into their parts until the caps are full.

    Returns:
        The parts; and whether they are full, or no more candidates could fill them: each source
        is spent, or has no rows left but these.
    """
    shares = (data.validation_share, data.test_share)
    validation = max(1, round(data.max_held_out_rows * shares[0] / sum(shares)))
    test = max(1, data.max_held_out_rows - validation)
    caps = dict(zip(PARTS, (data.max_train_rows, validation, test), strict=True))
    parts: dict[str, list[Grouped]] = {name: [] for name in caps}
    configs = {source.name: source.config for source in sources}
    taken: Counter[int] = Counter()
    placed = split([row.example for row in rows], *shares) if rows else []
    for row, place in zip(rows, placed, strict=True):
        own = configs[row.example.source]
        if own.max_rows is not None and taken[id(own)] >= own.max_rows:
            scanned.ledger.drop(row.example, "over_cap", "source")
        elif len(parts[place.part]) >= caps[place.part]:
            scanned.ledger.drop(row.example, "over_cap", place.part)
        else:
            taken[id(own)] += 1
            parts[place.part].append((place.group, row))
    waiting = [configs[name] for name in scanned.waiting]
    spent = all(c.max_rows is not None and taken[id(c)] >= c.max_rows for c in waiting)
    return parts, spent or all(len(parts[name]) == cap for name, cap in caps.items())


def _check_left(scanned: Scanned, parts: dict[str, list[Grouped]]) -> None:
    reasons, read = scanned.ledger.counts(), scanned.read.total()
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
    if reasons["unknown_columns"] == read > 0:
        columns = scanned.ledger.rows[0].detail
        raise DataError(
            f"no row fits a known format; the first one's columns are: {columns}",
            fix="name them: data.sources=[{path: ..., columns: {user: ..., assistant: ...}}]",
        )
    if not parts["train"]:
        raise DataError(
            f"no training row is left of {read} rows read: {told or 'the sources are empty'}",
            fix="look at the rows, or relax the filters in the data section",
        )
    if not all(parts.values()):
        raise DataError(
            f"{len(parts['train'])} rows are left, too few to hold some out ({told})",
            why="without validation rows no checkpoint can be chosen, without test rows no verdict",
            fix="give more rows, or raise data.validation_share and data.test_share",
        )


def _write(
    folder: Path,
    selected: Selected,
    sources: list[Source],
    questions: list[Question],
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """Write everything but the seal; return the manifest."""
    manifest = _manifest(selected, sources, inputs)
    for part, rows in selected.parts.items():
        _write_rows(folder / f"{part}.parquet", rows)
    selected.ledger.write(folder / "ledger.parquet")
    write_json(folder / "manifest.json", manifest)
    if selected.masked and inputs["settings"]["pii"] == "mask":
        write_json(folder / "personal.json", {"rows": selected.masked})
    if questions:
        asked_in = Counter(question.benchmark for question in questions)
        facts = {"benchmarks": dict(asked_in), "contaminated": selected.contaminated}
        write_json(folder / "contamination.json", facts)
    write_report(
        folder / "report.html",
        manifest,
        ledger=selected.ledger,
        before=selected.lengths,
        train=[row.length for _, row in selected.parts["train"]],
        hits=selected.contaminated,
    )
    return manifest


def _manifest(selected: Selected, sources: list[Source], inputs: dict[str, Any]) -> dict[str, Any]:
    read, dropped, parts = selected.scanned.read, selected.ledger.counts(), selected.parts
    by_source: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    for row in selected.ledger.rows:
        by_source[row.source][row.reason] += 1
    for part, rows in parts.items():
        for _, kept in rows:
            by_source[kept.example.source][part] += 1
    sizes = {part: len(rows) for part, rows in parts.items()}
    if read.total() != sum(sizes.values()) + dropped.total():
        raise AssertionError(f"{read} rows read, {sizes} kept, {dropped}")
    cut = [row.truncated for rows in parts.values() for _, row in rows if row.truncated]
    kinds = Counter(kind for found in selected.masked for kind in found["kinds"])
    hits = Counter(str(hit["benchmark"]) for hit in selected.contaminated)
    return {
        "rows": {"read": read.total(), **sizes, "dropped": dict(sorted(dropped.items()))},
        "sources": {
            source.name: {
                "identity": source.identity,
                "licence": source.config.licence,
                "read": read[source.name],
                **dict(sorted(by_source[source.name].items())),
            }
            for source in sources
        },
        "related": _related(**parts),
        "max_length": selected.max_length,
        "lengths": {
            "before": distribution(selected.lengths),
            **{part: distribution([r.length for _, r in rows]) for part, rows in parts.items()},
        },
        "truncated": {"rows": len(cut), "tokens": sum(cut)},
        "personal_data": dict(sorted(kinds.items())),
        "contamination": dict(sorted(hits.items())),
        "repairs": dict(sorted(selected.scanned.repairs.items())),
        "inputs": inputs,
        "inputs_sha256": sha256_json(inputs),
    }


def _related(
    train: list[Grouped], validation: list[Grouped], test: list[Grouped]
) -> dict[str, int]:
    """Groups of related rows, and those with rows both in training and held out."""
    held_out = [*validation, *test]
    trained, held = {group for group, _ in train}, {group for group, _ in held_out}
    both = trained & held
    return {
        "groups": len(trained | held),
        "groups_on_both_sides": len(both),
        "held_out_rows_of_those": sum(group in both for group, _ in held_out),
    }


def distribution(lengths: list[int]) -> dict[str, float]:
    """Count, total, mean and percentiles of lengths in tokens."""
    if not lengths:
        return {"rows": 0}
    ordered = sorted(lengths)
    percentiles = {
        f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (5, 50, 95, 99)
    }
    sums = {"tokens": sum(lengths), "mean": round(sum(lengths) / len(lengths), 1)}
    return {"rows": len(lengths), **sums, **percentiles, "max": ordered[-1]}


def _write_rows(path: Path, rows: list[Grouped]) -> None:
    with pq.ParquetWriter(path, ROWS, compression="zstd") as writer:
        for start in range(0, len(rows), ROW_GROUP):
            chunk = [_record(*row) for row in rows[start : start + ROW_GROUP]]
            writer.write_table(pa.Table.from_pylist(chunk, ROWS))


def _record(group: str, row: Tokenized) -> dict[str, Any]:
    return {
        "example_id": row.example.example_id,
        "source": row.example.source,
        "line": row.example.line,
        "group": group,
        "messages": [asdict(message) for message in row.example.messages],
        "input_ids": row.input_ids,
        "labels": row.labels,
        "length": row.length,
    }
