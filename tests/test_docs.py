"""README and docs: commands exist with their options, links lead somewhere, figures are today's."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import docs
from fintune.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_group(app).commands


def options(words: list[str]) -> set[str]:
    """Options of a command, or of its subcommand where it has some."""
    command = COMMANDS[words[0]]
    if hasattr(command, "get_command") and not all(w.startswith("-") for w in words[1:]):
        command = command.get_command(None, words[1])
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)}


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
        given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert given <= options(words[1:]) | {"--help", "--offline"}, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_is_made_by_rule_is_on_the_pages() -> None:
    """`make docs` would change nothing: tables from bench/results, commands and keys."""
    stale = [page.name for page, text in docs.pages().items() if page.read_text("utf-8") != text]
    assert stale == [], "make docs"


def test_every_table_of_the_template_is_on_a_page() -> None:
    template = (ROOT / "docs" / "tables.jinja").read_text("utf-8")
    marks = {mark for page in PAGES for mark in docs.MARKED.findall(page.read_text("utf-8"))}
    assert marks == set(re.findall(r"{% block (\w+) %}", template))
