"""Tokens of every candidate row, the adaptive maximum length, and rows that are longer."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fintune.chat import ChatFormat
from fintune.console import meter
from fintune.data.ledger import Ledger
from fintune.errors import DataError
from fintune.example import IGNORE_INDEX, Example

LENGTH_MULTIPLE = 64
"""The maximum length is a multiple of this, as attention kernels and padding like it."""

KEPT_SHARE = 0.99
"""Share of rows that the adaptive maximum length must keep, as the published recipe's."""

MOST_TOO_LONG = 0.1
"""Share of rows that may be dropped as too long; more are a wrong cap, no outliers."""

ROWS_A_CALL = 512
Int32 = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A row with its token ids and labels, int32 of the same length."""

    example: Example
    input_ids: Int32
    labels: Int32
    truncated: int = 0
    """Tokens cut off its end."""

    @property
    def length(self) -> int:
        """Tokens of the conversation."""
        return len(self.input_ids)


def tokenize(
    examples: list[Example], chat: ChatFormat, min_tokens: int, ledger: Ledger
) -> list[Tokenized]:
    """Encode rows; those with fewer than `min_tokens` of text, the template apart, are dropped."""
    rows: list[Tokenized] = []
    with meter("tokenize", len(examples)) as progress:
        for start in range(0, len(examples), ROWS_A_CALL):
            chunk = examples[start : start + ROWS_A_CALL]
            encoded = chat.encode_many([example.messages for example in chunk])
            for example, row in zip(chunk, encoded, strict=True):
                tokens = chat.text_tokens(example.messages, row)
                if tokens < min_tokens:
                    ledger.drop(example, "too_short", f"{tokens} tokens")
                else:
                    ids, labels = (np.array(each, np.int32) for each in (row.input_ids, row.labels))
                    rows.append(Tokenized(example, ids, labels))
            progress.advance(len(chunk))
    return rows


def adaptive_max_length(lengths: list[int], cap: int, policy: str) -> int:
    """The smallest multiple of 64 that 99 % of the lengths fit in (all, under `fail`), at most
    `cap`."""
    if not lengths:
        return cap
    keep = 1.0 if policy == "fail" else KEPT_SHARE
    needed = sorted(lengths)[math.ceil(keep * len(lengths)) - 1]
    return min(cap, math.ceil(needed / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def fit(rows: list[Tokenized], max_length: int, policy: str, ledger: Ledger) -> list[Tokenized]:
    """Apply `data.over_length` to rows over the maximum length.

    `truncate` cuts the end off; a row without a token left to train is dropped.

    Raises:
        DataError: too many rows would be dropped, or any is longer under `fail`.
    """
    long = [row for row in rows if row.length > max_length]
    most = {"fail": 0.0, "drop": MOST_TOO_LONG * len(rows), "truncate": math.inf}[policy]
    if len(long) > most:
        worst = max(long, key=lambda row: row.length)
        raise DataError(
            f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens;"
            f" the longest, {worst.example.place}, has {worst.length}",
            fix="raise data.max_length, or set data.over_length=truncate",
        )
    kept: list[Tokenized] = []
    for row in rows:
        excess, labels = row.length - max_length, row.labels[:max_length]
        if excess <= 0:
            kept.append(row)
        elif policy == "truncate" and (labels != IGNORE_INDEX).any():
            kept.append(Tokenized(row.example, row.input_ids[:max_length], labels, excess))
        else:
            ledger.drop(row.example, "too_long", f"{row.length} tokens")
    return kept
