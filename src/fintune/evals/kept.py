"""Answers of the base, kept over evaluations: a second adapter asks none of them again.

One SQLite file in the user's cache folder. An answer counts only for the same weights, prompt ids,
settings, precision, versions and kind of machine; `--fresh` asks anew. Where the file cannot be
read or written, it holds nothing.
"""

import json
import platform
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch

from fintune.console import warn
from fintune.files import cache_dir, sha256_json
from fintune.generation import Request

FILE = "base_answers.sqlite"
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, ids TEXT, finish TEXT)"


class KeptAnswers:
    """The answers of one base under one set of settings.

    Args:
        facts: everything that an answer depends on besides the ids of its prompt.
        read: whether answers are taken from the file; they are written in any case.
    """

    def __init__(self, facts: dict[str, Any], *, read: bool = True) -> None:
        machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        if torch.cuda.is_available():
            machine = [torch.cuda.get_device_name()]
        self._facts, self._read = facts | {"machine": machine}, read
        self.path = cache_dir() / FILE

    def fill(self, requests: Iterable[Request]) -> list[Request]:
        """Give those requests their answer that have one here, and return them."""
        if not self._read or not self.path.is_file():
            return []
        found = []
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as file:
                ask = "SELECT ids, finish FROM answers WHERE key = ?"
                for request in requests:
                    if row := file.execute(ask, [self._key(request)]).fetchone():
                        request.token_ids, request.finish_reason = json.loads(row[0]), row[1]
                        found.append(request)
        except (sqlite3.Error, ValueError) as error:
            warn(f"{self.path} is not read, the base is asked: {error}")
            return []
        return found

    def keep(self, answered: Iterable[Request]) -> None:
        """Keep answers; whatever prevents it, it would only have saved time."""
        rows = [(self._key(r), json.dumps(r.token_ids), r.finish_reason) for r in answered]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as file, file:
                file.execute(_TABLE)
                file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
        except (sqlite3.Error, OSError):
            return

    def _key(self, request: Request) -> str:
        return sha256_json([self._facts, request.prompt_ids, request.max_new_tokens])
