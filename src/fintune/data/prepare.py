"""The stage `prepare`: rows in, a Parquet file for each part of the split and its account out.

Text filters and exact duplicates run over everything, streaming; then only the rows that come
first in hash order are compared, tokenized and split, until the caps are full.
"""

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintune import __version__, seal
from fintune.chat import ChatFormat
from fintune.config import Config, DataConfig
from fintune.console import heading, say
from fintune.data.decontaminate import Question, contaminated, find_benchmarks, read_benchmarks
from fintune.data.ledger import Ledger
from fintune.data.ngrams import asked
from fintune.data.pii import mask_messages
from fintune.data.report import PARTS, Parts, Selected, make_manifest, write_report
from fintune.data.scan import Scanned, scan
from fintune.data.sources import Source, find_sources
from fintune.data.split import near_duplicates, split
from fintune.data.tokenize import Tokenized, adaptive_max_length, fit, tokenize
from fintune.errors import DataError
from fintune.example import Example
from fintune.files import read_json, sha256_file, staged_folder, write_json
from fintune.model import Base, find_base, load_tokenizer

MARGIN = 1.15
"""Candidates beyond the caps: what later filters usually take. Too few, and more are scanned."""

ROW_GROUP = 8192
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
        if seal.finished(folder, inputs, command="fintune prepare"):
            say(f"{folder}: unchanged, kept")
            return read_json(folder / "manifest.json")
        with staged_folder(folder) as staging:
            questions = read_benchmarks(benchmarks, redact=config.data.pii != "off")
            selected = _select(config, sources, chat, questions)
            manifest = make_manifest(selected, sources, inputs)
            _write(staging, selected, questions, manifest)
            seal.seal(staging, inputs)
    rows = manifest["rows"]
    kept = " + ".join(f"{rows[part]} {part}" for part in PARTS)
    say(f"{folder}: {rows['read']} rows read = {kept} + {sum(rows['dropped'].values())} dropped")
    return manifest


def _inputs(
    config: Config, base: Base, chat: ChatFormat, sources: list[Source], benchmarks: list[Source]
) -> dict[str, Any]:
    """What the prepared rows depend on; other inputs are refused in the same folder."""
    settings = config.data.model_dump(
        mode="json", exclude={"out", "source", "sources", "benchmarks"}
    )
    found = {
        kind: {
            source.name: source.config.model_dump(mode="json", exclude={"path"})
            | {"identity": source.identity}
            for source in named
        }
        for kind, named in (("sources", sources), ("benchmarks", benchmarks))
    }
    return found | {
        "settings": settings | {"chat": config.chat.model_dump(mode="json"), "seed": config.seed},
        "base": base.id,
        "tokenizer_sha256": sha256_file(base.folder / "tokenizer.json"),
        "template_sha256": chat.template_sha256,
        "fintune": __version__,  # other filters, other rows
    }


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
        examples, kinds = _mask(scanned.candidates, data.pii, ledger)
        examples, hits = _decontaminate(examples, questions, ledger)
        rows = tokenize(examples, chat, data.min_tokens, ledger)
        lengths = [row.length for row in rows]
        max_length = adaptive_max_length(lengths, data.max_length, data.over_length)
        rows = fit(rows, max_length, data.over_length, ledger)
        rows = _drop_near_duplicates(rows, data.near_duplicates, ledger)
        parts, full = _fill(rows, sources, data, ledger)
        if full or scanned.complete:
            _check_left(scanned, parts)
            return Selected(scanned, kinds, hits, lengths, max_length, parts)
        say(f"{wanted} candidates did not fill the caps: {wanted * 4} are taken")
        wanted *= 4


def _mask(
    examples: list[Example], policy: str, ledger: Ledger
) -> tuple[list[Example], Counter[str]]:
    """Rows without personal data (all under `off`), and in how many which kinds were found."""
    kept, counts = list[Example](), Counter[str]()
    if policy == "off":
        return examples, counts
    for example in examples:
        messages, kinds = mask_messages(example.messages)
        clean = replace(example, messages=messages)
        counts.update(kinds)
        if kinds and policy == "drop":
            ledger.drop(clean, "personal_data", " ".join(sorted(kinds)))
        else:
            kept.append(clean)
    return kept, counts


def _decontaminate(
    examples: list[Example], questions: list[Question], ledger: Ledger
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Rows that repeat no benchmark, and of the others what they repeat."""
    hits = contaminated(examples, questions)
    found = []
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
    repeats = near_duplicates([row.example for row in rows], threshold)
    for at, of in sorted(repeats.items()):
        ledger.drop(rows[at].example, "near_duplicate", f"of {rows[of].example.place}")
    return [row for at, row in enumerate(rows) if at not in repeats]


def _fill(
    rows: list[Tokenized], sources: list[Source], data: DataConfig, ledger: Ledger
) -> tuple[Parts, bool]:
    """Put rows in hash order into their parts until the caps are full; whether all are."""
    shares = (data.validation_share, data.test_share)
    validation = max(1, round(data.max_held_out_rows * shares[0] / sum(shares)))
    test = max(1, data.max_held_out_rows - validation)
    caps = dict(zip(PARTS, (data.max_train_rows, validation, test), strict=True))
    parts: Parts = {part: [] for part in PARTS}
    configs = {source.name: source.config for source in sources}
    taken: Counter[int] = Counter()
    placed = split([row.example for row in rows], *shares)
    for row, (group, part) in zip(rows, placed, strict=True):
        own = configs[row.example.source]
        if taken[id(own)] >= (own.max_rows or math.inf):
            ledger.drop(row.example, "over_cap", "source")
        elif len(parts[part]) >= caps[part]:
            ledger.drop(row.example, "over_cap", part)
        else:
            taken[id(own)] += 1
            parts[part].append((group, row))
    return parts, all(len(parts[part]) == cap for part, cap in caps.items())


def _check_left(scanned: Scanned, parts: Parts) -> None:
    reasons, read = scanned.ledger.counts(), scanned.read.total()
    if reasons["unknown_columns"] == read > 0:
        raise DataError(
            f"no row fits a known format; the first one's columns: {scanned.ledger.rows[0].detail}",
            fix="name them: data.sources=[{path: ..., columns: {user: ..., assistant: ...}}]",
        )
    if empty := [part for part, rows in parts.items() if not rows]:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
        raise DataError(
            f"no {empty[0]} row is left of {read} rows read: {why or 'the sources are empty'}",
            why="without validation rows no checkpoint can be chosen, without test rows no verdict",
            fix="give more rows, relax the filters, or raise data.validation_share and test_share",
        )


def _write(
    folder: Path, selected: Selected, questions: list[Question], manifest: dict[str, Any]
) -> None:
    """Write everything but the seal."""
    for part, rows in selected.parts.items():
        records = [
            {
                **{name: getattr(row.example, name) for name in ("example_id", "source", "line")},
                "group": group,
                "messages": [asdict(message) for message in row.example.messages],
                "input_ids": row.input_ids,
                "labels": row.labels,
                "length": row.length,
            }
            for group, row in rows
        ]
        table = pa.Table.from_pylist(records, ROWS)
        path = folder / f"{part}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    selected.scanned.ledger.write(folder / "ledger.parquet")
    write_json(folder / "manifest.json", manifest)
    if questions:
        counts = dict(Counter(question.benchmark for question in questions))
        facts = {"benchmarks": counts, "contaminated": selected.contaminated}
        write_json(folder / "contamination.json", facts)
    write_report(folder / "report.html", manifest, selected)
