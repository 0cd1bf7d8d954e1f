"""The made-up rows: their bytes, and whether they can carry a verdict."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import tiny

from fintune.evals.grading import HeldOutItems
from fintune.sample import rows_path
from sample_rows.rows import sample_rows, write_rows

COMPANY = re.compile(r"\b[A-Z][a-z]{3,} [A-Z][a-z]{3,}\b")


def test_rows_come_out_byte_for_byte(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == rows_path().read_bytes()
    assert rows_path().stat().st_size <= 1_000_000


def test_enough_questions_of_enough_documents_that_no_training_row_knows(tmp_path: Path) -> None:
    words = ("-s", f"model.path={tiny.base()}", "-s", f"out={tmp_path}")
    tiny.done("prepare", "-c", "demo", *words)
    train, test = (
        pq.read_table(tmp_path / "data" / f"{part}.parquet").to_pylist()
        for part in ("train", "test")
    )
    reader = HeldOutItems(train)
    items = [item for row in test if (item := reader.item(row)).kind != "text"]
    assert len(items) >= 200 and len({item.group for item in items}) >= 50
    amounts = [item for item in items if item.kind == "number"]
    assert len(amounts) >= 80
    labels = {item.reference for item in items if item.kind == "label"}
    assert labels == {"rose", "fell", "positive", "negative", "neutral", "not stated"}
    known = {
        name
        for row in train
        for turn in row["messages"]
        for name in COMPANY.findall(turn["content"])
    }
    asked = [{*COMPANY.findall(item.messages[-1].content)} for item in items]
    assert sum(bool(names & known) for names in asked) <= 0.05 * len(items)


def test_every_way_to_spoil_a_row_is_there() -> None:
    dirt = {row.dirt for row in sample_rows()}
    assert {"foreign", "duplicate", "placeholder", "html", "long"} < dirt
