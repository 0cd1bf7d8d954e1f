"""What a person or a program sees: rich on a terminal, plain lines elsewhere, JSON on request.

Results go to standard output, everything else to standard error, so `--json` stays parseable.
"""

import json
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""C0 (but tab and newline), C1 and bidirectional controls, half characters: they move the cursor,
clear the screen, or show a line in another order than it is read."""
PLAIN_INTERVAL_S, DOWNLOAD_INTERVAL_S = 10.0, 60.0
"""Seconds between plain progress lines where there is no terminal (a log stays readable)."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


PROGRAM = ["fintune"]
"""The program as it was called, for hints."""
GIVEN: list[str] = []
"""Words of the command line, such as `--config mine.yaml`, that every hint to a command repeats."""
_HINT = re.compile(
    r"\bfintune (?:((?:prepare|train|eval|release|inspect|dropped|judge|plan|run)\b(?: --fresh)?)"
    r"|(?=(?:init|runs|show|compare|verify|export|doctor|demo|bases)\b))"
)


def repeating(text: str) -> str:
    """A message whose hints to commands call this program, with the config that it was given."""
    return _HINT.sub(lambda h: " ".join([*PROGRAM, h[1] or "", *GIVEN * bool(h[1])]), text)


def printable(text: str) -> str:
    """Text of others for a terminal or a page: every control character as its escape."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def safe_markup(text: str) -> str:
    """Text of others inside rich markup: shown as it is, no control character, no tag."""
    return escape(printable(text))


def some(names: Collection[str], most: int = 3) -> str:
    """The first names by the alphabet, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + rest


def _print(to: Console, text: str, mark: str = "") -> None:
    """A text whose lines end between words on a terminal, but where a command may be copied: a line
    break within one would run the first half of it."""
    whole = not to.is_terminal or " ".join(PROGRAM) in text
    to.print(mark + safe_markup(text), soft_wrap=whole)


def say(text: str) -> None:
    """One line of progress or notice, to standard error."""
    _print(err, text)


def heading(text: str) -> None:
    """The start of a stage, to standard error."""
    err.print(f"[bold cyan]{safe_markup(text)}[/]", soft_wrap=not err.is_terminal)


def warn(text: str) -> None:
    """Something a user should read but that does not stop the run."""
    _print(err, repeating(text), "[yellow]note:[/] ")


def fail(text: str) -> None:
    """The one message of a failed command."""
    _print(err, repeating(text), "[bold red]error:[/] ")


def result(text: str) -> None:
    """A command's result, to standard output."""
    _print(out, text)


def stream(text: str) -> None:
    """A piece of a running answer, to standard output at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def emit_json(value: Any) -> None:
    """A command's result for programs: one JSON document on standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def emit(value: Any, as_json: bool, text: str = "") -> None:
    """A command's result for programs, where --json was given; else its text, if it has one."""
    if as_json:
        emit_json(value)
    elif text:
        result(text)


def table(title: str, columns: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """A small table; columns after the first are right-aligned, as numbers read best."""
    grid = Table(columns[0], title=safe_markup(title), title_justify="left", header_style="dim")
    for column in columns[1:]:
        grid.add_column(column, justify="right")
    for row in rows:
        grid.add_row(*(safe_markup(str(cell)) for cell in row))
    out.print(grid)


class _Note(bars.TextColumn):
    """The note at the end of a line, as many of its parts as a narrow terminal has space for."""

    def render(self, task: bars.Task) -> Text:
        parts, count = str(task.fields["note"]).split("  "), len(f"{task.total}")
        # Behind the label: bar, share, time left, count, and a space each.
        space = err.width - len(task.description) - _bar_width() - 2 * count - 18
        while err.is_terminal and parts and len("  ".join(parts)) > space:
            parts.pop()
        return Text("  ".join(parts), style="dim", no_wrap=True)


def _bar_width() -> int:
    return max(10, min(40, err.width // 4))


class Meter:
    """Progress of one piece of work: `advance` per item, `note` for the text on the right."""

    def __init__(self, label: str, total: int, progress: bars.Progress, interval: float) -> None:
        self._progress, self._interval, self._printed = progress, interval, time.monotonic()
        self._task = progress.add_task(label, total=total, note="")

    def advance(self, count: int = 1, **fields: Any) -> None:
        """Count `count` more items done; `note` replaces the note."""
        self._progress.update(self._task, advance=count, **fields)
        if self._progress.disable and time.monotonic() - self._printed >= self._interval:
            self._printed = time.monotonic()
            err.print(self._progress.get_renderable())


@contextmanager
def meter(label: str, total: int, *, download: bool = False) -> Iterator[Meter]:
    """A progress bar on a terminal, its line every ten seconds elsewhere.

    Args:
        total: how many items, or bytes of a download (a line a minute, with their rate).
    """
    columns: list[Any] = [*bars.Progress.get_default_columns()]
    columns[1] = bars.BarColumn(_bar_width())
    if download:
        columns += [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    else:
        columns += [bars.MofNCompleteColumn(), _Note("")]
    interval = DOWNLOAD_INTERVAL_S if download else PLAIN_INTERVAL_S
    quiet = not err.is_terminal
    with bars.Progress(*columns, console=err, transient=True, disable=quiet) as progress:
        yield Meter(label, total, progress, interval)
