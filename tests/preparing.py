"""`prepare` on rows of a test, through the public functions and the files alone."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import tiny_made

from fintune import load_config, prepare

PARTS = ("train", "validation", "test")
TERMS = ["revenue", "net income", "free cash flow", "gross margin", "working capital", "equity"]
TABLE = "| year | {0} |\n| --- | --- |\n| 2020 | {1} |\n| 2021 | {2} |"
AS_GIVEN = {"filter_english_only": False, "near_duplicates": 1, "min_tokens": 0}
"""What only reads rows: nothing that their text decides."""


class Prepared(NamedTuple):
    """A prepared folder: its place, its manifest, and what stands in its files."""

    folder: Path
    config: Any
    manifest: dict[str, Any]

    def rows(self, *parts: str) -> list[dict[str, Any]]:
        """Rows of the parts (all by default) by source and line, each with its part."""
        found = [
            row | {"part": part}
            for part in parts or PARTS
            for row in pq.read_table(self.folder / f"{part}.parquet").to_pylist()
        ]
        return sorted(found, key=lambda row: (row["source"], row["line"]))

    def turns(self, source: str = "rows") -> list[list[str]]:
        """The contents of all turns of a source's rows, in order of their lines."""
        kept = [row for row in self.rows() if row["source"].startswith(source)]
        return [[turn["content"] for turn in row["messages"]] for row in kept]

    def dropped(self, source: str = "rows") -> dict[int, str]:
        """Line -> reason."""
        ledger = pq.read_table(self.folder / "ledger.parquet").to_pylist()
        return {row["line"]: row["reason"] for row in ledger if row["source"].startswith(source)}


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up rows: documents with several questions, a few bad ones."""
    rng, found = random.Random(seed), []
    for number in range(count // 3):
        term, before, after = rng.choice(TERMS), rng.randrange(10**6), rng.randrange(10**6)
        text = TABLE.format(term, before, after)
        text += f"\nThe {term} of company number {rng.randrange(10**9)} moved as the table shows."
        for ask, reply in (("2020", before), ("2021", after), ("the change", after - before)):
            question = f"Read the table.\n{text}\nWhat is the {term} in {ask}, taken as reported?"
            answer = f"Looking at the table, the {term} asked for comes to {reply}."
            found.append({"system": "\n", "user": question, "assistant": answer})
        if number % 10 == 0:
            found.append({"user": "no answer", "assistant": None})
    return found


def write(path: Path, found: list[Any]) -> Path:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def settings(out: Path, **data: Any) -> Any:
    """The preset demo with personal data masked and other keys of `data`."""
    changes = {"pii": "mask", "source": "", **data}
    given = [f"data.{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
    return load_config("demo", [f"out={out}", f"model.path={tiny_made.base()}", *given])


def prepared(out: Path, **data: Any) -> Prepared:
    """The folder that `prepare` made."""
    config = settings(out, **data)
    return Prepared(config.data_dir, config, prepare(config))


def read(path: Path, **data: Any) -> Prepared:
    """What becomes of a source's rows, between sixty others that fill all parts."""
    root = path.parent / "with"
    filler = write(root / "filler.jsonl", rows(60))
    source = {"path": str(path), **data.pop("source", {})}
    return prepared(root / "out", sources=[source, str(filler)], **{**AS_GIVEN, **data})
