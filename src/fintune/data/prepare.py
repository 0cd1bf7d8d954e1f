"""The stage `prepare`: rows in, `train.parquet`, `validation.parquet` and their account out.

Order of work: text filters and exact duplicates over everything, streaming; then only the rows
that come first in hash order are compared, tokenised and split, until the caps are full.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fintune import __version__, seal
from fintune.chat import ChatFormat
from fintune.config import Config, DataConfig, SourceConfig
from fintune.console import heading, say
from fintune.data.decontaminate import Question, contaminated, read_benchmarks
from fintune.data.lengths import Tokenised, adaptive_max_length, drop, fit, tokenise
from fintune.data.personal import mask, mask_messages
from fintune.data.raw import parse_block
from fintune.data.related import near_duplicates, split
from fintune.data.report import Findings, write_report
from fintune.data.scan import SAMPLES, Scanned, excerpt, scan
from fintune.data.sources import Source, find_sources, named
from fintune.data.text import asked, hash64, passage
from fintune.errors import DataError
from fintune.example import Dropped, Example
from fintune.files import read_json, sha256_file, sha256_json, staged_folder, write_json
from fintune.model import find_base, load_tokenizer

MARGIN = 1.15
"""Candidates beyond the caps: what later filters usually take. Too few, and more are scanned."""

ROW_GROUP = 8192
FILES = ("train.parquet", "validation.parquet", "ledger.parquet", "manifest.json", "report.html")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TEXT = pa.string()
LEDGER = pa.schema(
    [
        ("source", TEXT),
        ("line", pa.int64()),
        ("row_sha256", TEXT),
        ("reason", TEXT),
        ("detail", TEXT),
    ]
)


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
    sources = find_sources(config.data)
    benchmarks = named([SourceConfig(**item.model_dump()) for item in config.data.benchmarks])
    settings = config.data.model_dump(
        mode="json", exclude={"out", "workers", "source", "sources", "benchmarks"}
    )
    # A cap is one for all files of a glob; which share it is told by the first one's name.
    first = {id(source.config): source.name for source in reversed(sources)}
    inputs = {
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
    folder = config.data_dir
    with seal.lock(folder):
        if fresh:
            seal.move_aside(folder)
        if seal.state(folder, inputs, command="fintune prepare") is seal.State.FINISHED:
            say(f"{folder}: unchanged, kept")
            return read_json(folder / "manifest.json")
        with staged_folder(folder) as staging:
            _check_columns([*sources, *benchmarks])
            result = _Preparation(config, sources, chat, read_benchmarks(benchmarks))
            manifest = result.write(staging, inputs)
            seal.seal(staging, inputs, needed=FILES)
    rows = manifest["rows"]
    say(
        f"{folder}: {rows['read']} rows read = {rows['train']} train + {rows['validation']}"
        f" validation + {sum(rows['dropped'].values())} dropped"
    )
    return manifest


class _Preparation:
    """All rows of one preparation: kept on a side, or dropped with a reason."""

    def __init__(
        self, config: Config, sources: list[Source], chat: ChatFormat, questions: list[Question]
    ) -> None:
        self.data: DataConfig = config.data
        self.seed = config.seed
        self.sources, self.chat, self.questions = sources, chat, questions
        if self.data.personal_data != "off":  # as the rows that they are compared with
            self.questions = [
                replace(each, text=mask(each.text)[0], answer=mask(each.answer)[0])
                for each in questions
            ]
        share = self.data.validation_share
        rows = max(self.data.max_train_rows / (1 - share), self.data.max_validation_rows / share)
        wanted = math.ceil(MARGIN * rows)
        while not self._attempt(wanted):
            say(f"{wanted} candidates did not fill the caps: {wanted * 4} are taken")
            wanted *= 4

    def _attempt(self, wanted: int) -> bool:
        """One preparation over `wanted` candidates; False where they were too few."""
        self.scanned: Scanned = scan(self.sources, self.data, self.seed, wanted)
        self.dropped: list[Dropped] = self.scanned.dropped
        self.samples = self.scanned.samples
        say(f"{len(self.scanned.candidates)} of {self.scanned.read.total()} rows go on")
        examples = self._decontaminate(self._mask(self.scanned.candidates))
        rows, short = tokenise(examples, self.chat, self.data.min_tokens)
        self.lengths_before = [row.length for row in rows]
        self.max_length = adaptive_max_length(
            self.lengths_before, self.data.max_length_keep, self.data.max_length_cap
        )
        rows, long = fit(rows, self.max_length, self.data, self.chat)
        of_line = {(each.source, each.line): each for each in examples}
        for row in (*short, *long):
            self._drop(of_line[row.source, row.line], row.reason, row.detail)
        if not self._fill(self._unrepeated(rows), of_line):
            return False
        self._check_left()
        return True

    def _drop(self, example: Example, reason: str, detail: str = "") -> None:
        self.dropped.append(drop(example, reason, detail))
        shown = self.samples.setdefault(reason, [])
        if len(shown) < SAMPLES:
            shown.append(excerpt(self.dropped[-1], example.messages, self.data))

    def _mask(self, examples: list[Example]) -> list[Example]:
        self.personal: Counter[str] = Counter()
        self.masked: list[dict[str, Any]] = []
        if self.data.personal_data == "off":
            return examples
        kept: list[Example] = []
        for example in examples:
            messages, kinds = mask_messages(example.messages)
            self.personal.update(kinds)
            found = sorted(kinds)
            clean = replace(example, messages=messages)
            if found and self.data.personal_data == "drop":
                self._drop(clean, "personal_data", " ".join(found))
                continue
            kept.append(clean)
            if found:
                place = {"source": example.source, "line": example.line}
                self.masked.append({**place, "kinds": found})
        return kept

    def _decontaminate(self, examples: list[Example]) -> list[Example]:
        passages = np.array([hash64(passage(example)) for example in examples], np.uint64)
        hits = contaminated(examples, passages, self.questions)
        self.contamination: list[dict[str, Any]] = []
        for at, hit in sorted(hits.items()):
            row, question = examples[at], hit.question
            detail = f"{question.benchmark}:{question.line} {hit.measure} {hit.score}"
            self._drop(row, "contaminated", detail)
            place = {"source": row.source, "line": row.line, "row_sha256": row.row_sha256}
            near = {"measure": hit.measure, "score": hit.score}
            of = {"benchmark": question.benchmark, "benchmark_line": question.line}
            texts = {"row_text": asked(row)[-300:], "benchmark_text": question.text[-300:]}
            self.contamination.append({**place, **near, **of, **texts})
        return [example for at, example in enumerate(examples) if at not in hits]

    def _unrepeated(self, rows: list[Tokenised]) -> list[Tokenised]:
        examples = [row.example for row in rows]
        repeats = near_duplicates(examples, self.data.near_duplicates)
        for at, of in sorted(repeats.items()):
            first = examples[of]
            self._drop(examples[at], "near_duplicate", f"of {first.source}:{first.line}")
        return [row for at, row in enumerate(rows) if at not in repeats]

    def _fill(self, rows: list[Tokenised], of_line: dict[tuple[str, int], Example]) -> bool:
        """Put rows in hash order onto their sides until the caps are full.

        Returns:
            True when they are, or when no more candidates could fill them: each source is spent,
            or has no rows left but these.
        """
        half = self.data.max_validation_rows // 2
        caps = {
            "train": self.data.max_train_rows,
            "select": half,
            "decide": self.data.max_validation_rows - half,
        }
        self.kept: dict[str, list[tuple[str, Tokenised]]] = {name: [] for name in caps}
        room = {source.name: source.config for source in self.sources}
        taken: Counter[int] = Counter()
        # As they were before they were shortened: no maximum length moves a row across.
        whole = [of_line[row.example.source, row.example.line] for row in rows]
        places = split(whole, self.data.validation_share) if rows else []
        for row, place in zip(rows, places, strict=True):
            own = room[row.example.source]
            if own.max_rows is not None and taken[id(own)] >= own.max_rows:
                self._drop(row.example, "over_cap", "source")
            elif len(self.kept[place.side]) >= caps[place.side]:
                self._drop(row.example, "over_cap", place.side)
            else:
                taken[id(own)] += 1
                self.kept[place.side].append((place.group, row))
        waiting = [room[name] for name in self.scanned.waiting]
        spent = all(c.max_rows is not None and taken[id(c)] >= c.max_rows for c in waiting)
        return spent or all(len(self.kept[name]) == cap for name, cap in caps.items())

    def _check_left(self) -> None:
        reasons = Counter(row.reason for row in self.dropped)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
        read = sum(self.scanned.read.values())
        if reasons["unknown_columns"] == read > 0:
            columns = next(row.detail for row in self.dropped)
            raise DataError(
                f"no row fits a known format; the first one's columns are: {columns}",
                fix="name them in data.columns, such as {user: QUESTION, assistant: ANSWER}",
            )
        if not self.kept["train"]:
            raise DataError(
                f"no training row is left of {read} rows read: {told or 'the sources are empty'}",
                fix="look at the rows, or relax the filters in the data section",
            )
        if not self.kept["select"] or not self.kept["decide"]:
            raise DataError(
                f"{len(self.kept['train'])} rows are left, too few to hold some out ({told})",
                why="without held-out rows no checkpoint can be chosen and nothing proved",
                fix="give more rows, or raise data.validation_share",
            )

    def write(self, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
        """Write everything but the seal; return the manifest."""
        validation = [(p, g, row) for p in ("select", "decide") for g, row in self.kept[p]]
        train = [("train", group, row) for group, row in self.kept["train"]]
        _write_rows(folder / "train.parquet", train, parts=False)
        _write_rows(folder / "validation.parquet", validation, parts=True)
        self.dropped.sort(key=lambda row: (row.source, row.line))
        columns = [[getattr(row, name) for row in self.dropped] for name in LEDGER.names]
        ledger = pa.table(columns, schema=LEDGER)
        pq.write_table(ledger, folder / "ledger.parquet", compression="zstd")
        manifest = self._manifest(inputs, train, validation)
        write_json(folder / "manifest.json", manifest)
        if self.masked:
            write_json(folder / "personal.json", {"rows": self.masked})
        if self.questions:
            asked_in = Counter(question.benchmark for question in self.questions)
            facts = {"benchmarks": dict(asked_in), "contaminated": self.contamination}
            write_json(folder / "contamination.json", facts)
        foreign = [row.detail for row in self.dropped if row.reason == "not_english"]
        languages = Counter("other script" if d[0].isdigit() else d[:2] for d in foreign)
        lengths = [row.length for _, _, row in train]
        found = Findings(self.samples, self.lengths_before, lengths, self.contamination, languages)
        write_report(folder / "report.html", manifest, found)
        return manifest

    def _manifest(
        self,
        inputs: dict[str, Any],
        train: list[tuple[str, str, Tokenised]],
        validation: list[tuple[str, str, Tokenised]],
    ) -> dict[str, Any]:
        by_source: dict[str, Counter[str]] = {name: Counter() for name in self.scanned.read}
        for row in self.dropped:
            by_source[row.source][row.reason] += 1
        for part, _, kept in (*train, *validation):
            by_source[kept.example.source][part] += 1
        read = sum(self.scanned.read.values())
        dropped = Counter(row.reason for row in self.dropped)
        shortened = [row.shortened for _, _, row in (*train, *validation)]
        if read != len(train) + len(validation) + dropped.total():
            raise AssertionError(f"{read} rows read, {len(train)} + {len(validation)} + {dropped}")
        return {
            "rows": {
                "read": read,
                "train": len(train),
                "validation": len(validation),
                "dropped": dict(sorted(dropped.items())),
            },
            "parts": {name: len(rows) for name, rows in self.kept.items()},
            "sources": {
                source.name: {
                    "identity": source.identity,
                    "licence": source.config.licence,
                    "read": self.scanned.read[source.name],
                    **dict(sorted(by_source.get(source.name, Counter()).items())),
                }
                for source in self.sources
            },
            "related": self._related(train, validation),
            "max_length": self.max_length,
            "lengths": {
                "before": distribution(self.lengths_before),
                "train": distribution([row.length for _, _, row in train]),
                "validation": distribution([row.length for _, _, row in validation]),
            },
            "shortened": {"rows": sum(cut > 0 for cut in shortened), "tokens": sum(shortened)},
            "personal_data": dict(sorted(self.personal.items())),
            "contamination": dict(
                sorted(Counter(str(hit["benchmark"]) for hit in self.contamination).items())
            ),
            "repairs": dict(sorted(self.scanned.repairs.items())),
            "inputs": inputs,
            "inputs_sha256": sha256_json(inputs),
        }

    @staticmethod
    def _related(*parts: list[tuple[str, str, Tokenised]]) -> dict[str, int]:
        """Groups of related rows, and those with rows on both sides of the split."""
        train, held_out = ({group for _, group, _ in rows} for rows in parts)
        both = train & held_out
        return {
            "groups": len(train | held_out),
            "groups_on_both_sides": len(both),
            "held_out_rows_of_those": sum(group in both for _, group, _ in parts[1]),
        }


def _check_columns(sources: list[Source]) -> None:
    """Refuse columns that no row has: the system texts would be missing, and nothing said."""
    for config in {id(source.config): source.config for source in sources}.values():
        lacking, found = set((config.columns or {}).values()), set[str]()
        own = [source for source in sources if source.config is config and lacking]
        for batch in (batch for source in own for batch in source.batches()):
            found.update(*(row for _, row in parse_block(batch) if isinstance(row, dict)))
            if lacking <= found:
                break
        if lacking - found:
            raise DataError(
                f"no row of {config.path} has the column {', '.join(sorted(lacking - found))}",
                fix=f"its columns are: {', '.join(sorted(found))[:300]}",
            )


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


COLUMNS: tuple[tuple[str, pa.DataType, Callable[[str, str, Tokenised], Any]], ...] = (
    ("example_id", TEXT, lambda _, __, row: row.example.example_id),
    ("source", TEXT, lambda _, __, row: row.example.source),
    ("line", pa.int64(), lambda _, __, row: row.example.line),
    ("group", TEXT, lambda _, group, __: group),
    ("messages", MESSAGES, lambda _, __, row: [asdict(turn) for turn in row.example.messages]),
    ("input_ids", pa.list_(pa.int32()), lambda _, __, row: row.input_ids),
    ("labels", pa.list_(pa.int32()), lambda _, __, row: row.labels),
    ("length", pa.int32(), lambda _, __, row: row.length),
    ("part", TEXT, lambda part, _, __: part),
)
"""Columns of prepared rows; `part` only where there are several."""


def _write_rows(path: Path, rows: list[tuple[str, str, Tokenised]], *, parts: bool) -> None:
    columns = COLUMNS if parts else COLUMNS[:-1]
    schema = pa.schema([(name, kind) for name, kind, _ in columns])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(rows), ROW_GROUP):
            chunk = rows[start : start + ROW_GROUP]
            arrays = [pa.array([read(*row) for row in chunk], kind) for _, kind, read in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
