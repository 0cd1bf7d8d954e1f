"""Write docs/reference.md: every verb and every config key, from the code itself."""

from pathlib import Path

import typer.main
from pydantic import BaseModel

from fintune.cli import app
from fintune.config import Config, dotted_keys


def main() -> None:
    group = typer.main.get_group(app)
    lines = ["# Reference", "", "Made by `make reference`; do not edit.", "", "## Verbs", ""]
    lines += ["| verb | what it does |", "|---|---|"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        lines.append(f"| `fintune {name}` | {(command.help or '').splitlines()[0]} |")
    lines += ["", "`fintune VERB --help` shows a verb's options.", "", "## Config keys", ""]
    lines += ["| key | default | what it is |", "|---|---|---|"]
    for key, text in dotted_keys().items():
        lines.append(f"| `{key}` | {shown(default_of(key))} | {text} |")
    path = Path(__file__).parents[1] / "docs" / "reference.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def default_of(key: str) -> object:
    value: object = Config()
    for part in key.split("."):
        value = getattr(value, part)
    return value


def shown(value: object) -> str:
    if value is None or value == () or value == {}:
        return ""
    if isinstance(value, BaseModel):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    main()
