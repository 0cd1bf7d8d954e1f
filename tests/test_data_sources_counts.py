"""Every row of a source comes out once, as itself or as a `Bad`, whatever stands around it."""

import csv
import gzip
import io
import json
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
from fintune.data.sources import Bad, locate
from fintune.errors import DataError

GOOD = [
    json.dumps({"user": f"Is it {n}, or {{?", "assistant": '} "no", [it] is not'}) for n in range(3)
]
NESTED = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "value": "]"}]})
ODD = ["[]", "[[1], {}]", "{}", "null", "12", "-1.5e9", '"text, {"', "true", '[{"user": 1}, 2]']
BROKEN = [
    '{"user": NaN, "assistant": "x"}',
    '{"user": "a", "assistant": nope}',
    '{"user": "a", "assistant": "b",}',
    "{'user': 'a'}",
    '{"user": "he said "no" to it", "assistant": "x"}',
    '{"user": "tab\tin", "assistant": "\\d"}',
    '{"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "value": None}]}',
    '{"user": "caf\udce9", "assistant": [{"deep": "\udcff"}]}',
    '{"user": "no end}',
    "nonsense",
]  # fmt: skip
ELEMENTS = st.lists(st.sampled_from([*GOOD, NESTED, *ODD, *BROKEN]), max_size=12)
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
    if form == "lined.json":
        return "[\n  " + ",\n  ".join(elements) + "\n]\n"
    if form == "line.json":
        return '{"version": 1, "data": [' + ",".join(elements) + '], "split": "train"}'
    return '\ufeff{\n "data": [\n  ' + ",\n  ".join(elements) + "\n ]\n}"


def expected(elements: list[str]) -> list[Any]:
    return [None if element in BROKEN else json.loads(element) for element in elements]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(elements=ELEMENTS)
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(
    "form", ["lines.jsonl", "array.json", "lined.json", "line.json", "document.json"]
)
def test_every_element_is_counted_once(
    tmp_path: Path, form: str, packing: str, elements: list[str]
) -> None:
    path = tmp_path / f"{form}{packing}"
    raw = written(form, elements).encode("utf-8", "surrogateescape")
    path.write_bytes(PACKERS[packing](raw or b"\n"))
    found = read(path)
    assert [None if isinstance(row, Bad) else row for _, row in found] == expected(elements)
    assert [line for line, _ in found] == list(range(1, len(elements) + 1))
