"""README and docs: every command exists with its options, every link and picture is there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from fintune.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    name: {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for name, command in typer.main.get_group(app).commands.items()  # type: ignore[attr-defined]
}


def shell_lines(page: Path) -> list[str]:
    """Lines of the page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if not words or not words[0].endswith("fintune"):
            continue
        known = COMMANDS[words[1]]
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= known | {"--help"}, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_states_the_figures_of_the_results() -> None:
    """The control experiment's table is what bench/control.py last wrote."""
    found = json.loads((ROOT / "bench" / "results" / "control.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for who in ("base", "control", "always the commonest", "adapter"):
        assert f"| {who} | {found[who]['accuracy']:.1%} |" in text
