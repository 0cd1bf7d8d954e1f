"""Every format read, every bad row in the ledger with its line, every bad file named."""

import csv
import gzip
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fintune.config import DataConfig, SourceConfig
from fintune.data import ledger as ledger_module
from fintune.data.clean import repair
from fintune.data.readers import Unreadable
from fintune.data.scan import scan
from fintune.data.schema import Rejected, to_messages
from fintune.data.sources import find_sources, locate
from fintune.errors import ConfigError, DataError, FintuneError

ROWS = [
    {"system": "\n", "user": f"What is ratio {n}?", "assistant": f"It is {n}."} for n in range(5)
]


def read(path: Path) -> list[tuple[int, Any]]:
    """All rows of one source with their lines."""
    found = locate(SourceConfig(path=str(path)))
    return [row for source in found for row in source.rows()]


def write(folder: Path, name: str) -> Path:
    """`ROWS` in the format that a file name says."""
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["system", "user", "assistant"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl.zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    elif name == "array.json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "lines.json", "array.json",
     "rows.csv", "rows.parquet"],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read(write(tmp_path, name))] == ROWS


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"system": None, "user": "q", "assistant": "a"}, None),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            None,
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
        ({"instruction": "q", "input": "", "output": "a"}, None),
        ({"prompt": "q", "completion": "a"}, None),
        ({"question": "q", "answer": "a"}, None),
        ({"messages": None, "conversations": None, "prompt": "q", "completion": "a"}, None),
        ({"user": None, "assistant": None, "question": "q", "answer": "a", "context": None}, None),
        ({"prompt": "q", "response": "a", "answer": ["x"]}, None),
        ({"instruction": "q", "response": "a", "category": "open_qa"}, None),
        ({"question": "q", "response": "a"}, None),
        ({"instruction": "q", "input": "", "output": "a", "text": "### q a"}, None),
        ({"user": "", "assistant": " ", "instruction": "q", "input": "", "output": "a"}, None),
        ({"messages": "", "user": "", "prompt": "q", "completion": "a"}, None),
        ({"conversations": [], "user": "q", "assistant": "a"}, None),
        ({"user": "someone", "assistant": math.nan, "question": "q", "answer": "a"}, None),
        ({"context": "c", "answer": "x", "prompt": "q", "response": "a"}, None),
        (
            {
                "conversations": [
                    {"role": None, "from": "human", "content": None, "value": "q"},
                    {"role": None, "from": "gpt", "content": None, "value": "a"},
                ]
            },
            None,
        ),
        ({"FRAGE": "q", "ANTWORT": "a"}, {"user": "FRAGE", "assistant": "ANTWORT"}),
    ],
)
def test_known_columns_become_turns(row: dict[str, Any], columns: dict[str, str] | None) -> None:
    found = to_messages(row, columns)
    assert [(m.role, m.content) for m in found] == [("user", "q"), ("assistant", "a")]


def test_the_context_stands_before_its_question() -> None:
    for ask, reply in (
        ("instruction", "response"),
        ("question", "response"),
        ("question", "answer"),
    ):
        row = {"system": "s", ask: "q", "context": "c", reply: "a", "category": "closed_qa"}
        found = to_messages(row, None)
        assert [m.content for m in found] == ["s", "c\n\nq", "a"]


@pytest.mark.parametrize(
    ("number", "text"), [(42, "42"), (42.0, "42"), (-0.5, "-0.5"), (0, "0"), ("2.0", "2.0")]
)
def test_a_number_is_read_as_its_text(number: Any, text: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": number}]
    for row in ({"question": "q", "answer": number}, {"messages": turns}):
        assert to_messages(row, None)[-1].content == text


def test_a_row_of_nulls_keeps_its_format() -> None:
    for empty in (None, "", math.nan):
        found = to_messages({"id": 3, "user": empty, "assistant": empty}, None)
        assert [m.content for m in found] == ["", ""]  # no_user to the filters
    assert to_messages({"messages": [], "id": 3}, None) == ()


def test_a_system_text_told_twice_is_one() -> None:
    turns = [{"role": "system", "content": "s "}, {"role": "user", "content": "q"}]
    found = to_messages({"system": "s", "messages": turns}, None)
    assert [m.content for m in found] == ["s", "q", ""]


def test_turns_inside_a_text_become_turns() -> None:
    user = "| a table |\nUser: first?\nAssistant: one\nUser: second?"
    found = to_messages({"user": user, "assistant": "two"}, None)
    assert [m.role for m in found] == ["user", "assistant", "user", "assistant"]
    assert found[0].content == "| a table |\n\nfirst?" and found[2].content == "second?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not_an_object"),
        ({"a": 1}, "unknown_columns"),
        ({"user": {}, "assistant": "a"}, "not_text"),
        ({"messages": "x"}, "not_text"),
        ({"user": "q", "assistant": True}, "not_text"),
        ({"user": math.inf, "assistant": "a"}, "not_text"),
        ({"messages": [{"role": "system", "content": x} for x in "st"]}, "turns_out_of_order"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "turns_out_of_order"),
    ],
)
def test_rows_that_fit_nothing_are_rejected_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(Rejected) as out:
        to_messages(row, None)
    assert out.value.reason == reason


@pytest.mark.parametrize(
    ("broken", "whole", "kind"),
    [
        ("R&amp;D is &#39;up&#39;", "R&D is 'up'", "html_entity"),
        ("<a>R&amp;D</a>", "<a>R&amp;D</a>", ""),
        ("AT&T; &nothing;", "AT&T; &nothing;", ""),
        ("the company 2019s notes", "the company\u2019s notes", "lost_escape"),
        ("a 201cmake-whole 201d price", "a \u201cmake-whole\u201d price", "lost_escape"),
        ("in 2019 shares rose", "in 2019 shares rose", ""),
        ("5\u00a0%\u200b", "5 %", "no_break_space"),
        ("a\x00b\ud800", "ab\ufffd", "control_character"),
        ("e\u0301", "\u00e9", "unicode_nfc"),
        ("( the 201c2025 notes 201d )", "( the \u201c2025 notes\u201d )", "lost_escape"),
        (
            "410 , 201c asset retirement and other duties , 201d and",
            "410 , \u201casset retirement and other duties ,\u201d and",
            "lost_escape",
        ),
        ("sections 201a, 201b, 201c and 201d", "sections 201a, 201b, 201c and 201d", ""),
        (
            "see section 201d; section 201c of the act and 201d",
            "see section 201d; section 201c of the act and 201d",
            "",
        ),
        ("caf\\u00e9, \\\\u2014 \\ud83d\\ude00", "caf\u00e9, \u2014 \U0001f600", "unicode_escape"),
        ('{"a": "\\u0022\\u000a\\ud83d"}', '{"a": "\\u0022\\u000a\\ud83d"}', ""),
        ("[\\u00a0\\u200b]+ `\\u00e9`", "[\\u00a0\\u200b]+ `\\u00e9`", ""),
        ("([[(\\u00a0[x{]+) [\\u00e9", "([[(\\u00a0[x{]+) [\u00e9", "unicode_escape"),
        (
            '\\u00e9\n```json\n"\\u00e9 &amp;lt;"\n```\n\\u00e9',
            '\u00e9\n```json\n"\\u00e9 &amp;lt;"\n```\n\u00e9',
            "unicode_escape",
        ),
        ("R&amp;amp;D &amp;lt; &amp;nothing;", "R&D < &nothing;", "html_entity"),
    ],
)
def test_repairs(broken: str, whole: str, kind: str) -> None:
    counts: Counter[str] = Counter()
    assert repair(broken, counts) == whole
    assert counts[kind] == (1 if kind else 0)


@pytest.mark.parametrize("unit", ["[", "`", "[\\u", "\\u", "[a`", "201c ", "&", " ", "User:\n"])
def test_a_text_of_marks_takes_no_longer_than_another(unit: str) -> None:
    text = "\\u00e9 &amp; " + unit * (100_000 // len(unit))
    start = time.perf_counter()
    to_messages({"user": repair(text, Counter()), "assistant": "a"}, None)
    assert time.perf_counter() - start < 5  # squared, 100 kB would take half a minute


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no file or folder"),
        ("empty.jsonl", b"", "is empty"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("rows.jsonl", b"\x1f\x8b\x08", "packed with gzip"),
        ("rows.csv", b"PK\x03\x04", "a spreadsheet"),
        ("rows.jsonl", '{"user": "q"}'.encode("utf-16"), "UTF-16"),
        ("rows.txt", b"x", "no known data format"),
        ("folder/readme.md", b"x", "holds no data file"),
        ("*.jsonl", None, "holds no data file"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    place = path.parent if name.startswith("folder/") else path
    with pytest.raises(DataError, match=says):
        find_sources(DataConfig(source=str(place)))


def test_files_of_a_glob_are_named_by_their_path_below_it(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/x.jsonl", "a/deep/y.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name)
    globs = {"*/x.jsonl": ["a/x.jsonl", "b/x.jsonl"], "a/**/*.jsonl": ["deep/y.jsonl", "x.jsonl"],
             "[ab]/*.jsonl": ["a/x.jsonl", "b/x.jsonl"]}  # fmt: skip
    for pattern, names in globs.items():
        found = find_sources(DataConfig(source=str(tmp_path / pattern)))
        assert [source.name for source in found] == names


def test_no_source_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        find_sources(DataConfig())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "HF_TOKEN"),
        ("RepositoryNotFoundError", "HF_TOKEN"),
        ("RevisionNotFoundError", "no revision"),
        ("OfflineModeIsEnabled", "check the network"),
    ],
)
def test_hub_problems_are_named(monkeypatch: pytest.MonkeyPatch, error: str, says: str) -> None:
    import httpx2 as httpx
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
    raised = kind("x") if error == "OfflineModeIsEnabled" else kind("x", response=response)

    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "dataset_info", refuse)
    with pytest.raises(FintuneError) as out:
        locate(SourceConfig(path="someone/finance-rows"))
    assert says in str(out.value) and "hub.invalid" not in str(out.value)


def malformed(rng: random.Random) -> bytes:
    """One line of a JSON Lines file that is broken in one of many ways, or is not."""
    good = {"user": "What is the current ratio?", "assistant": "Assets over liabilities."}
    kinds: list[bytes] = [
        json.dumps(good).encode(),
        b'{"user": "caf\xe9", "assistant": "x"}',
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b'{"user": "a\x00b", "assistant": "c"}',
        b'{"user": "\\ud800 lone", "assistant": "\\udfff"}',
        '{"user": "line\u2028separator", "assistant": "p\u2029s"}'.encode(),
        b'{"user": ' + b"[" * 3000 + b"]" * 3000 + b', "assistant": "x"}',
        b"[" * 50_000,
        b'{"user": 12, "assistant": true}',
        b'{"user": NaN, "assistant": "x"}',
        b'{"user": 1e999, "assistant": "x"}',
        b'{"user": "cut',
        b'"only text"',
        b"null",
        b"{}",
        b'=HYPERLINK("http://x","y"),1,2',
        b'{"messages": [{"role": "user"}, 3]}',
        b'{"conversations": {"from": "human"}}',
        b'{"user": "' + b"9" * 5000 + b'", "assistant": ' + b"1" * 5000 + b"}",
        bytes(rng.randrange(11, 256) for _ in range(40)),
    ]
    return rng.choice(kinds).replace(b"\n", b" ")


def test_ten_thousand_malformed_rows_are_all_accounted_for(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [malformed(rng) for _ in range(10_000)]
    lines[5000] = b'{"user": "' + b"long " * 2_000_000 + b'", "assistant": "x"}'
    whole = b"\n".join(lines)
    (tmp_path / "rows.jsonl").write_bytes(whole)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(whole[:200_000])[:-40])
    (tmp_path / "cells.csv").write_bytes(
        b'user,assistant\n=cmd|x,y\n"open,\n1,2,3\n\xff,\xfe\n' + b"\x00,\x00\n"
    )
    (tmp_path / "cut.json").write_bytes(json.dumps(ROWS).encode()[:-20])
    (tmp_path / "cut.parquet").write_bytes(write(tmp_path, "rows.parquet").read_bytes()[:-9])
    settings = DataConfig(source=str(tmp_path), language_identifier="none")
    found = scan(find_sources(settings), settings, 0, 20_000)
    assert found.read["rows.jsonl"] == sum(bool(line.strip()) for line in lines)
    total = len(found.candidates) + len(found.ledger.rows)
    assert total == found.read.total()
    assert all(row.line >= 1 and row.reason for row in found.ledger.rows)
    by_source: dict[str, list[int]] = {}
    for row in (*found.ledger.rows, *found.candidates):
        by_source.setdefault(row.source, []).append(row.line)
    assert sorted(by_source["rows.jsonl"]) == [n for n, line in enumerate(lines, 1) if line.strip()]
    reasons = {row.source: row.reason for row in found.ledger.rows}
    assert reasons["cut.parquet"] == "truncated_file"
    assert any(
        r.source == "cut.jsonl.gz" and r.reason == "truncated_file" for r in found.ledger.rows
    )
    assert any(r.source == "cut.json" and r.reason == "truncated_file" for r in found.ledger.rows)


VALUES = [
    "me:\n4111 1111 1111 1111", "4111\u00a01111\u00a01111\u00a01111", "it's\t536-90-4399",
    "it's\nDE89370400440532013000", "x\rjane.doe@acme.com", "\u200b(212) 555-0143",
    "\nABA 021000021",
]  # fmt: skip
OF_VALUES = ("4111", "4399", "370400", "jane", "acme", "555", "021000021")


def test_no_value_of_a_row_that_is_out_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind escapes of JSON and repr, blanks that are none, in names of columns, beside marks."""
    monkeypatch.setattr(ledger_module, "SAMPLES", 1_000)
    rows: list[Any] = []
    for text in (*VALUES, *(json.dumps({"a": json.dumps([text])}) for text in VALUES)):
        turn = {"role": f"{'long role ' * 3}{text}", "content": text}
        rows += [text, {f"{text} \ud800": text}, {"user": {"x": [text]}}, {"messages": [turn]}]
        rows += [{"user": "q", "assistant": f"I cannot provide {text}"}]
    rows.append({"phone": 2125550143, "routing number": "021000021", "card": 4111111111111111})
    lines = [json.dumps(row).encode() for row in rows]
    lines += [line[:-1] + b"\xa0" * odd for line in lines for odd in (0, 1)]
    lines += [b"Doe,4111111111111111,2025", b'{"a": "jane\\u002edoe\\u0040acme.com"']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    with (tmp_path / "cells.csv").open("w", encoding="latin-1", newline="") as file:
        cells = [[text.replace("\u200b", ""), *more] for text in VALUES for more in ([], ["\xa0"])]
        csv.writer(file).writerows([["a", "b"], *cells])
    settings = DataConfig(source=str(tmp_path))
    found = scan(find_sources(settings), settings, 0, 100)
    assert len(found.ledger.rows) == len(lines) + len(cells) and not found.candidates
    shown = [text for samples in found.ledger.samples.values() for text in samples]
    shown += [row.detail for row in found.ledger.rows]
    assert len(shown) == 2 * len(found.ledger.rows)
    assert [text for text in shown if any(value in text for value in OF_VALUES)] == []
    off = DataConfig(source=str(tmp_path), pii="off")
    assert "4111" in str(scan(find_sources(off), off, 0, 100).ledger.samples)


def test_a_number_that_is_none_is_no_reason_to_drop_a_row(tmp_path: Path) -> None:
    row = {"user": "q", "assistant": "a", "score": math.nan}  # as json.dumps writes it
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    settings = DataConfig(source=str(tmp_path), language_identifier="none")
    found = scan(find_sources(settings), settings, 0, 100)
    assert (len(found.candidates), found.ledger.counts()) == (1, {"duplicate": 1})


def test_a_bad_line_names_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"user": "a"}\n\nnot json\n\xff\n')
    rows = dict(read(path))
    assert rows[1] == {"user": "a"}
    assert isinstance(rows[3], Unreadable) and rows[3].reason == "not_json"
    assert isinstance(rows[4], Unreadable) and rows[4].reason == "not_utf8"
