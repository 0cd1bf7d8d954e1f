"""JSON that is one array or document of rows: its elements streamed, each counted once.

A row costs itself alone where it is broken: reading goes on behind it, wherever that is.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fintune.data.raw import LONE, Bad, parse, pieces
from fintune.data.rows import FORMATS

WINDOW = 1 << 17
"""Characters of JSON read ahead; a broken element is sought to end within them."""
LONGEST = 1 << 26
"""Characters after which an element that does not end is given up."""
DEEPEST = 16
"""Brackets within brackets in which the end of a broken element is still sought."""

_COLUMNS = {f'"{name}"' for asked, answer in FORMATS for name in (*asked, answer)}
_COLUMNS |= {'"messages"', '"conversations"'}
_SPACE = re.compile(r"[\s,]*")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MEMBER = re.compile(rf"[\s,{{]*({_STRING})\s*:\s*(\[?)", re.DOTALL)
# A quotation mark that opens nothing a comma, colon or bracket follows is not taken for a string.
_BRACKETS = re.compile(rf"{_STRING}(?=\s*[],:}}])|\\.|[][{{}},]", re.DOTALL)
_NEXT = re.compile(r",\s*(?=\{)")


class _Reader:
    """Text read ahead of a place that moves over it, element by element."""

    def __init__(self, path: Path) -> None:
        self.text = codecs.iterdecode(pieces(path, WINDOW), "utf-8-sig", "surrogateescape")
        # The first element begins a line as those behind it do.
        self.buffer, self.at = "\n", 0
        self.more, self.error = True, ""
        self.constants: list[str] = []  # NaN is the fault of one element, whose end is known
        self.decoder = json.JSONDecoder(parse_constant=self.constants.append)

    def fill(self, wanted: int) -> int:
        """Read until `wanted` characters stand behind the place, or all; where the next begins."""
        if self.more and len(self.buffer) - self.at < wanted:
            parts = [self.buffer[self.at :]]
            try:
                parts += islice(self.text, wanted // WINDOW)
            except OSError as error:  # what came before it stands in `parts`
                self.error = str(error)[:200]
            self.more = len(parts) > wanted // WINDOW and not self.error
            self.buffer, self.at = "".join(parts), 0
        return _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]

    def element(self) -> Any:
        """The element at the place, which moves behind it; a broken one as `Bad`.

        Raises:
            EOFError: it is broken, and the file ends before the element does.
        """
        start, wanted, cut = 0, WINDOW, True
        while cut:
            start = self.fill(wanted)
            self.constants.clear()
            try:
                row, end = self.decoder.raw_decode(self.buffer, start)
                cut = end == len(self.buffer)
            except (ValueError, RecursionError) as error:
                row, end, length = None, -1, len(self.buffer)
                cut = getattr(error, "pos", 0) > length - 16 or "Unterminated" in str(error)
            if not self.more or len(self.buffer) >= LONGEST:
                break
            wanted = max(2 * len(self.buffer), WINDOW)  # a piece at least, or nothing would end
        whole = end > 0 and not self.constants
        if end < 0 and not (cut and self.more):
            end = _behind(self.buffer, self.at, start)
        if end < 0 and not self.more:
            raise EOFError
        end = end if end > 0 else len(self.buffer)
        written = self.buffer[start:end].encode("utf-8", "surrogateescape")
        if whole and (written.isascii() or not LONE.search(self.buffer, start, end)):
            self.at = end
            return row
        self.buffer, self.at = self.buffer[end:], 0  # the next error counts the lines before it
        return parse(written)


def elements(path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of arrays and of documents' lists, and what stands beside them.

    The line is the element's number, from 1. What cannot be read is one `Bad`, see `_behind`.
    """
    reader = _Reader(path)
    number, inside, document = 0, False, False
    while True:
        start = reader.fill(WINDOW)
        sign = reader.buffer[start : start + 1]
        if not sign:
            reader.at = start
            if not reader.more:
                break
            continue
        if sign == "]" or (not inside and (sign == "[" or (document and sign == "}"))):
            inside, reader.at = sign == "[", start + 1
            continue
        if not inside and (document or (sign == "{" and not number)):
            end, inside = members(reader.buffer, start)
            if inside or (sign == '"' and end > start):
                document, reader.at = True, end
                continue
        try:
            yield number + 1, reader.element()
        except EOFError:
            break
        number += 1
    rest = reader.buffer[reader.at :]
    if inside or reader.error or rest.strip():
        bad = reader.error or f"what follows {number} elements cannot be read to the end"
        yield number + 1, Bad("truncated_file", bad, rest[:1000].encode("utf-8", "surrogateescape"))


def members(buffer: str, at: int) -> tuple[int, bool]:
    """Place behind the `[` of a document's next list, and True; behind its last member, and False.

    An object with a column of a row before any list is that row: its list may be its messages.
    """
    while found := _MEMBER.match(buffer, at):
        if found[1] in _COLUMNS:
            break
        if found[2]:
            return found.end(), True
        try:
            _, at = json.JSONDecoder().raw_decode(buffer, found.end())
        except (ValueError, RecursionError):
            break
    return at, False


def _behind(buffer: str, at: int, start: int) -> int:
    """Where a broken element ends that begins at `start`, behind white space from `at`, or -1.

    That is where its brackets close (outside strings), or at the comma where it has none; where
    they do not close, before the next line that begins as the element's own did, with `{` behind
    the same indentation; without such a line, before the next object that follows a comma. At most
    `WINDOW` characters are looked at, so that rubbish costs time in proportion to its length.
    """
    lead, stop = buffer[at:start], min(len(buffer), start + WINDOW)
    line = buffer.find(lead[lead.rindex("\n") :] + "{", start, stop) if "\n" in lead else -1
    awaited: list[str] = []
    for token in _BRACKETS.finditer(buffer, start, stop if line < 0 else line):
        sign = token[0]
        if sign in "{[":
            if not awaited and token.start() > start:
                return token.start()
            awaited.append("}" if sign == "{" else "]")
            if len(awaited) > DEEPEST:
                break
        elif sign in "}]" and awaited:
            if awaited.pop() != sign:
                break
            if not awaited:
                return token.end()
        elif sign in ",]" and not awaited:
            return max(token.start(), start + 1)
    if line < 0 and (found := _NEXT.search(buffer, start + 1, stop)):
        return found.start()
    return line
