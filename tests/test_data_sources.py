"""Every format read, every bad row in the ledger with its line, every bad file named."""

import csv
import gzip
import io
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import AS_GIVEN, prepared, read, rows, write

from fintune.errors import DataError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}
PAIR = {"user": "q", "assistant": "a"}


def cells(found: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(found)
    return text.getvalue()


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"system": None, **PAIR}, None),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "value": "a"}]}, None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
        ({"instruction": "q", "input": "", "output": "a", "text": "### q a"}, None),
        ({"prompt": "q", "completion": "a"}, None),
        ({"question": "q", "answer": "a"}, None),
        ({"messages": None, "conversations": None, "prompt": "q", "completion": "a"}, None),
        ({"user": None, "assistant": None, "question": "q", "answer": "a", "context": None}, None),
        ({"prompt": "q", "response": "a", "answer": ["x"]}, None),
        ({"instruction": "q", "response": "a", "category": "open_qa"}, None),
        ({"user": "", "assistant": " ", "instruction": "q", "input": "", "output": "a"}, None),
        ({"conversations": [], **PAIR}, None),
        ({"context": "c", "answer": "x", "prompt": "q", "response": "a"}, None),
        ({"FRAGE": "q", "ANTWORT": "a"}, {"user": "FRAGE", "assistant": "ANTWORT"}),
    ],
)
def test_known_columns_become_turns(tmp_path: Path, row: Any, columns: Any) -> None:
    source = {"columns": columns}
    assert read(write(tmp_path / "rows.jsonl", [row]), source=source).turns() == [["q", "a"]]


def test_context_number_and_inner_turns_become_text(tmp_path: Path) -> None:
    inner = "| a table |\nUser: first?\nAssistant: one\nUser: second?"
    turns = [{"role": "system", "content": "s "}, {"role": "user", "content": "q"}]
    found = [
        {"system": "s", "instruction": "q", "context": "c", "response": "a"},
        {"question": "q", "context": "c", "answer": 42.0},
        {"question": "q", "answer": -0.5},
        {"system": "s", "messages": [*turns, {"role": "assistant", "content": 0}]},
        {"user": inner, "assistant": "two"},
    ]
    assert read(write(tmp_path / "rows.jsonl", found)).turns() == [
        ["s", "c\n\nq", "a"],
        ["c\n\nq", "42"],
        ["q", "-0.5"],
        ["s", "q", "0"],
        ["| a table |\n\nfirst?", "one", "second?", "two"],
    ]


def test_a_row_that_fits_nothing_names_its_reason(tmp_path: Path) -> None:
    twice = '{"user": "q", "assistant": "a", "user": "r"}'
    system = [{"role": "system", "content": each} for each in "st"]
    lines = {
        json.dumps([1]): "not_an_object",
        json.dumps({"a": 1}): "unknown_columns",
        json.dumps({"user": {}, "assistant": "a"}): "not_text",
        json.dumps({"messages": "x"}): "not_text",
        json.dumps({"user": "q", "assistant": True}): "not_text",
        json.dumps({"messages": system}): "turns_out_of_order",
        json.dumps({"messages": [{"role": "critic", "content": "x"}]}): "unknown_role",
        json.dumps({"messages": []}): "no_user",
        json.dumps({"id": 3, "user": None, "assistant": ""}): "no_user",
        json.dumps({**PAIR, "score": math.nan}): "not_json",
        json.dumps({**PAIR, "score": -math.inf}): "not_json",
        twice: "repeated_column",
        json.dumps({"n": 1})[:-1] + f', "o": {twice}}}': "repeated_column",
        "not json": "not_json",
        "[" * 50_000: "not_json",
        '{"user": "caf\udce9"}': "not_utf8",
        "\udcff": "not_utf8",
    }
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert read(path).dropped() == dict(enumerate(lines.values(), 1))
    array = tmp_path / "array" / "rows.json"
    array.parent.mkdir()
    array.write_text(f"[{twice}, {json.dumps({**PAIR, 'n': math.nan})}, [1]]")
    dropped = read(array).dropped()
    assert dropped == {1: "repeated_column", 2: "not_json", 3: "not_an_object"}


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_column_that_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    names = ["question", "answer", "answer"]
    if name == "rows.csv":
        (tmp_path / name).write_text(cells([names, ["q", "a", "b"]]))
    else:
        table = pa.Table.from_arrays([pa.array(["x"])] * 3, names=names)
        pq.write_table(table, tmp_path / name)
    with pytest.raises(DataError, match=f'{name}: the column "answer" stands twice'):
        read(tmp_path / name)


def test_a_wrong_name_in_columns_is_one_error_that_names_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"FRAGE": "q"}, {"ANTWORT": "a"}])
    with pytest.raises(DataError, match="has no column FRAGEN\n.*ANTWORT, FRAGE;"):
        read(path, source={"columns": {"user": "FRAGEN", "assistant": "ANTWORT"}})


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("form", ["rows.jsonl", "rows.json", "rows.csv"])
def test_every_row_is_counted_once(tmp_path: Path, form: str, packing: str) -> None:
    rng, kinds, expected = random.Random(0), ["good", "odd", "bad"], list[str]()
    written: list[Any] = []
    for number in range(40):
        expected.append(rng.choice(kinds))
        user = f"Is it {number}, or {{?\n] " + ("caf\udce9" if expected[-1] == "bad" else "")
        written.append([user, '} "no", [it] is not', *["x"] * (expected[-1] == "odd")])
    if form == "rows.csv":
        text = cells([["user", "assistant"], *written])
    else:
        objects = [row if len(row) > 2 else dict(zip(PAIR, row, strict=True)) for row in written]
        lines = [json.dumps(row, ensure_ascii=False) for row in objects]
        text = "\n".join(lines) if form == "rows.jsonl" else f"[\n{', '.join(lines)}\n]\n"
    raw = b"\xef\xbb\xbf" + text.encode("utf-8", "surrogateescape")
    (tmp_path / f"{form}{packing}").write_bytes(PACKERS[packing](raw))
    found = read(tmp_path / f"{form}{packing}")
    assert len(found.turns()) == expected.count("good")
    odd = "wrong_cells" if form == "rows.csv" else "not_an_object"
    reasons = [{"odd": odd, "bad": "not_utf8"}[kind] for kind in expected if kind != "good"]
    assert list(found.dropped().values()) == reasons


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.zst", "rows.csv.gz", "rows.csv.zst"])
def test_rows_before_a_break_are_rows(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    found = [[rng.randbytes(40).hex(), str(number)] for number in range(3_000)]
    lines = [json.dumps(dict(zip(PAIR, row, strict=True))) for row in found]
    text = "\n".join(lines)
    if ".json." in name:
        text = "[" + ",\n".join(lines) + "]"
    elif ".csv" in name:
        text = cells([[*PAIR], *found])
    packed = PACKERS[name[-3:].replace("zst", ".zst")[-4:]](text.encode())
    (tmp_path / name).write_bytes(packed[:-1_000])
    broken = read(tmp_path / name)
    kept = broken.turns()
    assert kept == found[: len(kept)] and len(kept) > 1_500
    assert list(broken.dropped().values()) == ["truncated_file"]


@pytest.mark.parametrize(
    ("name", "text", "kept", "reasons"),
    [
        ("rows.json", '[{"user": "q", "assistant": "a"}]\n[1]', 1, ["truncated_file"]),
        ("rows.json", '[{"user": "q", "assistant": "a"}, ', 1, ["truncated_file"]),
        ("rows.json", '[[1],\n{"a": "x",\n{"a": 1}\n]', 0, ["not_an_object", "truncated_file"]),
        ("rows.csv", "\n\nuser\tassistant\nq;r\ts,t\n", 1, []),
        ("rows.csv", 'user;assistant\n1,5;"q;\n"\nr\n', 1, ["wrong_cells"]),
        ("rows.csv", 'user,assistant\nq,a\nr,"open\ns,t\n', 1, ["wrong_cells"]),
    ],
)  # fmt: skip
def test_odd_files(tmp_path: Path, name: str, text: str, kept: int, reasons: list[str]) -> None:
    (tmp_path / name).write_text(text)
    found = read(tmp_path / name)
    assert (len(found.turns()), list(found.dropped().values())) == (kept, reasons)


def test_a_cell_that_is_no_utf8_costs_its_own_row(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"user": text, "assistant": ["x"] * 3}), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert (len(found.turns()), found.dropped()) == (2, {2: "not_text"})


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
        ("rows.csv.gz", b"user,assistant", "what its name says"),
        ("rows.json.zst", PACKERS[".zst"](b"x" * 99)[:6], "what its name says"),
        ("rows.parquet", b"PAR1", "what its name says"),
        ("rows.json", b'[{"user": nope}]', "what its name says"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    place = path.parent if name.startswith("folder/") else path
    with pytest.raises(DataError, match=says):
        prepared(tmp_path / "out", source=place)


def test_files_of_a_folder_or_glob_are_named_by_their_path_below_it(tmp_path: Path) -> None:
    names = ("b/x.jsonl", "a/x.jsonl", "a/deep/y.jsonl", "p.parquet/.hidden.jsonl")
    for at, name in enumerate(names):
        write(tmp_path / "all" / name, rows(90, at))
    (tmp_path / "all" / "_SUCCESS").touch()
    globs = {
        "": ["a/deep/y.jsonl", "a/x.jsonl", "b/x.jsonl"],
        "*/x.jsonl": ["a/x.jsonl", "b/x.jsonl"],
        "a/**/*.jsonl": ["deep/y.jsonl", "x.jsonl"],
    }
    for number, (pattern, found) in enumerate(globs.items()):
        done = prepared(tmp_path / str(number), source=tmp_path / "all" / pattern)
        assert list(done.manifest["sources"]) == found
    both = [str(tmp_path / "all" / name) for name in names[:2]]
    assert list(prepared(tmp_path / "b", sources=both).manifest["sources"]) == [
        "x.jsonl",
        "x.jsonl#2",
    ]


REPAIRS = [
    ("R&amp;D is &#39;up&#39;", "R&D is 'up'"),
    ("<a>R&amp;D</a>", "<a>R&amp;D</a>"),
    ("AT&T; &nothing;", "AT&T; &nothing;"),
    ("the company 2019s notes", "the company\u2019s notes"),
    ("a 201cmake-whole 201d price", "a \u201cmake-whole\u201d price"),
    ("in 2019 shares rose", "in 2019 shares rose"),
    ("5\u00a0%\u200b of it", "5 % of it"),
    ("a\x00b\ud800c", "ab\ufffdc"),
    ("caf e\u0301", "caf \u00e9"),
    ("( the 201c2025 notes 201d )", "( the \u201c2025 notes\u201d )"),
    (
        "410 , 201c asset retirement and other duties , 201d and",
        "410 , \u201casset retirement and other duties ,\u201d and",
    ),
    ("sections 201a, 201b, 201c and 201d", "sections 201a, 201b, 201c and 201d"),
    (
        "see section 201d; section 201c of the act and 201d",
        "see section 201d; section 201c of the act and 201d",
    ),
    ("caf\\u00e9, \\\\u2014 \\ud83d\\ude00", "caf\u00e9, \u2014 \U0001f600"),
    ('{"a": "\\u0022\\u000a\\ud83d"}', '{"a": "\\u0022\\u000a\\ud83d"}'),
    ("[\\u00a0\\u200b]+ `\\u00e9`", "[\\u00a0\\u200b]+ `\\u00e9`"),
    ("([[(\\u00a0[x{]+) [\\u00e9", "([[(\\u00a0[x{]+) [\u00e9"),
    (
        '\\u00e9\n```json\n"\\u00e9 &amp;lt;"\n```\n\\u00e9',
        '\u00e9\n```json\n"\\u00e9 &amp;lt;"\n```\n\u00e9',
    ),
    ("R&amp;amp;D &amp;lt; &amp;nothing;", "R&D < &nothing;"),
]


def test_texts_are_repaired_and_repairs_counted(tmp_path: Path) -> None:
    found = [{"user": broken, "assistant": "Yes."} for broken, _ in REPAIRS]
    done = read(write(tmp_path / "rows.jsonl", found))
    assert [turns[0] for turns in done.turns()] == [whole for _, whole in REPAIRS]
    assert done.manifest["repairs"] == {
        "control_character": 1, "html_entity": 2, "lone_surrogate": 1, "lost_escape": 4,
        "no_break_space": 1, "unicode_escape": 3, "unicode_nfc": 1, "zero_width": 1,
    }  # fmt: skip


def test_a_text_of_marks_takes_no_longer_than_another(tmp_path: Path) -> None:
    """Where a step is quadratic, 100 kB of one of these marks take half a minute."""
    units = ["[", "`", "[\\u", "\\u", "[a`", "201c ", "&", "User:\n", "4111 ", "@a."]
    texts = ["\\u00e9 &amp; " + unit * (100_000 // len(unit)) for unit in units]
    path = write(tmp_path / "rows.jsonl", [{"user": "q", "assistant": text} for text in texts])
    start = time.perf_counter()
    read(path, over_length="truncate")
    assert time.perf_counter() - start < 60


VALUES = [
    "me:\n4111 1111 1111 1111", "4111\u00a01111\u00a01111\u00a01111", "it's\t536-90-4399",
    "it's\nDE89370400440532013000", "x\rjane.doe@acme.com", "\u200b(212) 555-0143",
    "\nABA 021000021",
]  # fmt: skip
OF_VALUES = ("4111", "4399", "370400", "jane", "acme", "555", "021000021")


def test_no_value_of_a_row_that_is_out_is_shown(tmp_path: Path) -> None:
    """Behind escapes of JSON and repr, blanks that are none, in names of columns, beside marks."""
    told: list[Any] = []
    for text in (*VALUES, *(json.dumps({"a": json.dumps([text])}) for text in VALUES)):
        turn = {"role": f"{'long role ' * 3}{text}", "content": text}
        told += [text, {f"{text} \ud800": text}, {"user": {"x": [text]}}, {"messages": [turn]}]
        told += [{"user": "q", "assistant": f"I cannot provide {text}"}]
    told.append({"phone": 2125550143, "routing number": "021000021", "card": 4111111111111111})
    lines = [json.dumps(row).encode() for row in told]
    lines += [line[:-1] + b"\xa0" * odd for line in lines for odd in (0, 1)]
    lines += [b"Doe,4111111111111111,2025", b'{"a": "jane\\u002edoe\\u0040acme.com"']
    # The report shows three rows of a reason, so each file holds a few.
    for number in range(0, len(lines), 24):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        (tmp_path / "in" / str(number) / "rows.jsonl").write_bytes(
            b"\n".join(lines[number : number + 24])
        )
    filler = write(tmp_path / "filler.jsonl", rows(60))
    for number in range(0, len(lines), 24):
        source = tmp_path / "in" / str(number)
        out = tmp_path / "out" / str(number)
        done = prepared(out, sources=[str(source), str(filler)], **AS_GIVEN)
        assert len(done.dropped()) == len(lines[number : number + 24])
        page = (done.folder / "report.html").read_text(encoding="utf-8").split("<h2>Sources")[0]
        ledger = str(pq.read_table(done.folder / "ledger.parquet")["detail"].to_pylist())
        shown = page.split("<h2>Dropped rows")[1] + ledger
        assert [value for value in OF_VALUES if value in shown] == [], source
