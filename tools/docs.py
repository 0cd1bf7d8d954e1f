"""Write what the pages say by rule: `make docs`.

The tables of figures in README.md and docs/*.md, by docs/tables.jinja from bench/results/*.json;
docs/reference.md, every command and every config key, from the code. The same input gives the same
bytes, so that a test can hold the pages against it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import typer.main
from pydantic import BaseModel

from fintune.cli import app
from fintune.config import Config, dotted_keys
from fintune.data.split import share_of_test
from fintune.evals.outlook import gain_found
from fintune.evals.verdict import FEWEST_CHECKABLE

ROOT = Path(__file__).resolve().parents[1]
ROWS = (200, 300, 500, 1_000, 2_000, 4_000, 10_000, 20_000)
"""Of the table in docs/own-data.md."""
MARKED = re.compile(r"<!-- table: (\w+) -->.*?<!-- end -->", re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page that is made in whole or in part, with the text it should have."""
    known = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    made = {page: filled(page) for page in known if "<!-- table:" in page.read_text("utf-8")}
    return made | {ROOT / "docs" / "reference.md": reference()}


def filled(page: Path) -> str:
    """A page with its tables of today's results.

    Raises:
        KeyError: a table that docs/tables.jinja does not have.
        jinja2.UndefinedError: a figure that the results do not have.
    """
    loader = jinja2.FileSystemLoader(ROOT / "docs")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, autoescape=False, **settings)
    environment.filters["f"] = format
    files = (ROOT / "bench" / "results").glob("*.json")
    results = {path.stem.replace("-", "_"): json.loads(path.read_text("utf-8")) for path in files}
    results |= {"rows": [_found(rows) for rows in ROWS], "fewest": FEWEST_CHECKABLE}
    template = environment.get_template("tables.jinja")

    def table(mark: re.Match[str]) -> str:
        rows = "".join(template.blocks[mark[1]](template.new_context(results))).splitlines()
        if page.name == "README.md" and any(row.startswith("*") for row in rows):
            rows = [row for row in rows if row.startswith("*")]
        text = "\n".join(row.removeprefix("*").rstrip() for row in rows if row)
        around = "\n" if len(rows) > 1 else ""
        return f"<!-- table: {mark[1]} -->{around}{text}{around}<!-- end -->"

    return MARKED.sub(table, page.read_text("utf-8"))


def _found(rows: int) -> dict[str, Any]:
    """Of so many rows the test share and questions, and the gain that these find."""
    share = share_of_test(rows)
    questions = round(rows * share)
    gain = gain_found([1] * questions)
    return {"rows": rows, "share": share, "questions": questions, "gain": gain}


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its name; those of a group one by one."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def reference() -> str:
    """Every command and every key, with what it is."""
    commands = list(_commands(typer.main.get_group(app)))
    lines = ["# Reference", "", "Made by `make docs`; do not edit.", "", "## Commands", ""]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [
        f"| `fintune {name}` | {command.help.splitlines()[0]} |" for name, command in commands
    ]
    lines += ["", "`fintune COMMAND --help` shows a command's options.", "", "## Config keys", ""]
    lines += ["| key | default | what it is |", "|---|---|---|"]
    for key, text in dotted_keys().items():
        value: object = Config()
        for part in key.split("."):
            value = getattr(value, part)
        empty = value in (None, (), {}) or isinstance(value, BaseModel)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"| `{key}` | {'' if empty else f'`{shown}`'} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
