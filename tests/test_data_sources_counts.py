"""Every row of a source comes out once, as itself or as an `Unreadable`."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_sources import read

from fintune.config import SourceConfig
from fintune.data.readers import Unreadable
from fintune.data.sources import locate
from fintune.errors import DataError

GOOD = [
    json.dumps({"user": f"Is it {n}, or {{?", "assistant": '} "no", [it] is not'}) for n in range(3)
]
NESTED = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "value": "]"}]})
ODD = ["[]", "[[1], {}]", "{}", "null", "12", "-1.5e9", '"text, {"', "true", '[{"user": 1}, 2]']
UNREADABLE = [
    '{"user": "caf\udce9", "assistant": [{"deep": "\udcff"}]}',
]
"""Elements that cost themselves, as their end is known."""
BROKEN = [
    '{"user": "a", "assistant": nope}',
    '{"user": "a", "assistant": "b",}',
    "{'user': 'a'}",
    '{"user": "he said "no" to it", "assistant": "x"}',
    '{"user": "tab\tin", "assistant": "\\d"}',
    '{"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "value": None}]}',
    '{"user": "no end}',
    "nonsense",
]
"""Elements that end the reading of an array; in JSON Lines they cost themselves too."""
ELEMENTS = st.lists(st.sampled_from([*GOOD, NESTED, *ODD, *UNREADABLE, *BROKEN]), max_size=12)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}


def written(form: str, elements: list[str]) -> str:
    """A file of these elements."""
    if form == "lines.jsonl":
        return "\n".join(elements)
    if form == "array.json":
        return "[" + ", ".join(elements) + "]"
    return "[\n  " + ",\n  ".join(elements) + "\n]\n"


def expected(form: str, elements: list[str]) -> list[Any]:
    found = [None if each in UNREADABLE + BROKEN else json.loads(each) for each in elements]
    broken = [each in BROKEN for each in elements]
    return found[: broken.index(True) + 1] if any(broken) and form != "lines.jsonl" else found


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(elements=ELEMENTS)
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("form", ["lines.jsonl", "array.json", "lined.json"])
def test_every_element_is_counted_once(
    tmp_path: Path, form: str, packing: str, elements: list[str]
) -> None:
    path = tmp_path / f"{form}{packing}"
    raw = written(form, elements).encode("utf-8", "surrogateescape")
    path.write_bytes(PACKERS[packing](raw or b"\n"))
    found = read(path)
    rows = expected(form, elements)
    assert [None if isinstance(row, Unreadable) else row for _, row in found] == rows
    assert [line for line, _ in found] == list(range(1, len(rows) + 1))


CELLS = [["q", "a"], ['q, "x"\ny', "a"], ["caf\udce9", "a"], ["a\x00", "b"], ["1", "2", "3"], ["1"]]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.sampled_from(CELLS), max_size=12))
@pytest.mark.parametrize("packing", PACKERS)
def test_every_row_of_cells_is_counted_once(
    tmp_path: Path, packing: str, rows: list[list[str]]
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["user", "assistant"], *rows])
    raw = text.getvalue().encode("utf-8", "surrogateescape")
    (tmp_path / f"rows.csv{packing}").write_bytes(PACKERS[packing](raw))
    found = [row for _, row in read(tmp_path / f"rows.csv{packing}")]
    good = [len(row) == 2 and row[0] != "caf\udce9" for row in rows]
    assert [None if isinstance(row, Unreadable) else [*row.values()] for row in found] == [
        row if whole else None for row, whole in zip(rows, good, strict=True)
    ]


def reasons(path: Path) -> list[Any]:
    return [row.reason if isinstance(row, Unreadable) else row for _, row in read(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_rows_before_a_break_are_rows(tmp_path: Path, name: str, packing: str) -> None:
    rng = random.Random(0)
    rows = [{"user": rng.randbytes(40).hex(), "assistant": str(n)} for n in range(20_000)]
    text = "\n".join(map(json.dumps, rows))
    if name == "rows.json":
        text = "[" + text.replace("\n", ",\n") + "]"
    if name == "rows.csv":
        text = "user,assistant\n" + "".join(f"{r['user']},{r['assistant']}\n" for r in rows)
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKERS[packing](text.encode())[:-2000])
    found = reasons(path)
    assert found[:-1] == rows[: len(found) - 1] and found[-1] == "truncated_file"
    stream, size = (
        pa.input_stream(
            str(path), compression=packing[1:].replace("gz", "gzip").replace("zst", "zstd")
        ),
        0,
    )
    with pytest.raises(OSError, match="Truncated"):
        while stream.read(1):
            size += 1
    assert len(found) - 1 == text.encode()[:size].count(b"\n") - (name == "rows.csv")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("cut", [None, 6])
def test_a_packed_file_without_data_is_one_message(
    tmp_path: Path, name: str, packing: str, cut: int | None
) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACKERS[packing](b"x" * 99)[:cut] if cut else b"[1, 2] is not packed")
    with pytest.raises(DataError, match="what its name says"):
        read(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', [{"a": 1}, "truncated_file"]),
        ('[{"a": 1}, {"a": 2}', [{"a": 1}, {"a": 2}, "truncated_file"]),
        ('[{"a": 1}{"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('[[{"a": 1}], []]', [[{"a": 1}], []]),
        ('{"user": ' + "[" * 5000 + '\n{"a": 1}\n{"a": 2}', ["not_json", {"a": 1}, {"a": 2}]),
        ('{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n', [{"data": [{"a": n}]} for n in (1, 2)]),
        ('{"messages": [{"a": 1}]}', [{"messages": [{"a": 1}]}]),
        ('[{"a": 0},\n{"a": "x",\n{"a": 1}\n]', [{"a": 0}, "truncated_file"]),
    ],
)  # fmt: skip
def test_odd_json_files(tmp_path: Path, text: str, found: list[Any]) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert reasons(tmp_path / "rows.json") == found


def test_an_element_longer_than_what_is_read_ahead_is_one(tmp_path: Path) -> None:
    rows = [{"user": "q" * 700_000}, {"user": "r" * 100_000, "n": list(range(100_000))}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert reasons(tmp_path / "rows.json") == rows


def test_a_folder_named_as_a_file_is_its_files(tmp_path: Path) -> None:
    for name in ("rows.parquet/part-0.parquet", "rows.parquet/.hidden.parquet", ".git/x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"user": ["q"]}), tmp_path / name)
    (tmp_path / "rows.parquet" / "_SUCCESS").touch()
    for given_path in ("", "rows.parquet", "**/*.parquet"):
        found = locate(SourceConfig(path=str(tmp_path / given_path)))
        assert [Path(source.name).name for source in found] == ["part-0.parquet"]


def test_a_cell_that_is_no_utf8_costs_its_own_row(tmp_path: Path) -> None:
    cells = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"user": cells}), tmp_path / "rows.parquet")
    assert reasons(tmp_path / "rows.parquet") == [{"user": "a"}, "not_utf8", {"user": "c"}]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n\nuser\nq\n", [{"user": "q"}]),
        ("user;b\n1,5;\"q;\n\"\nr\n", [{"user": "1,5", "b": "q;\n"}, "wrong_cells"]),
        ("\nuser\tb\nq;r\ts,t\n", [{"user": "q;r", "b": "s,t"}]),
        ("user,b\nq,a\nr,\"open\ns,t\n", [{"user": "q", "b": "a"}, "wrong_cells"]),
        ("user\n\"" + "x\n" * 2_500_000 + "q", ["wrong_cells"]),
    ],
)  # fmt: skip
def test_odd_csv_files(tmp_path: Path, text: str, found: list[Any]) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert reasons(tmp_path / "rows.csv")[: len(found)] == found
