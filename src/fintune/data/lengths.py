"""Tokens of every candidate row, the adaptive maximum length, and rows that are longer."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fintune.chat import ChatFormat
from fintune.config import DataConfig
from fintune.console import meter
from fintune.errors import DataError
from fintune.example import Dropped, Example, Message

STEP = 64
"""The maximum length is a multiple of this, as attention kernels and padding like it."""

ROWS_A_CALL = 512
SHORTEN_TRIES = 6
ELLIPSIS = "\n[...]\n"
Int32 = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A row with its token ids and labels, int32 of the same length."""

    example: Example
    input_ids: Int32
    labels: Int32
    shortened: int = 0
    """Tokens taken out of the context."""

    @property
    def length(self) -> int:
        """Tokens of the conversation."""
        return len(self.input_ids)


def tokenise(
    examples: list[Example], chat: ChatFormat, min_tokens: int
) -> tuple[list[Tokenised], list[Dropped]]:
    """Encode rows; those with fewer than `min_tokens` of text, the template apart, are out."""
    rows: list[Tokenised] = []
    dropped: list[Dropped] = []
    with meter("tokenise", len(examples)) as progress:
        for start in range(0, len(examples), ROWS_A_CALL):
            chunk = examples[start : start + ROWS_A_CALL]
            for example, encoded in zip(
                chunk, chat.encode_many([example.messages for example in chunk]), strict=True
            ):
                tokens = chat.text_tokens(example.messages, encoded)
                if tokens < min_tokens:
                    dropped.append(drop(example, "too_short", f"{tokens} tokens"))
                    continue
                ids = np.array(encoded.input_ids, np.int32)
                rows.append(Tokenised(example, ids, np.array(encoded.labels, np.int32)))
            progress.advance(len(chunk))
    return rows, dropped


def drop(example: Example, reason: str, detail: str = "") -> Dropped:
    """The ledger's line of a row that is out."""
    return Dropped(example.source, example.line, example.row_sha256, reason, detail)


def adaptive_max_length(lengths: list[int], keep: float, cap: int) -> int:
    """The smallest multiple of 64 that at least `keep` of the lengths fit in, at most `cap`."""
    if not lengths:
        return cap
    needed = sorted(lengths)[math.ceil(keep * len(lengths)) - 1]
    return min(cap, math.ceil(needed / STEP) * STEP)


def fit(
    rows: list[Tokenised], max_length: int, config: DataConfig, chat: ChatFormat
) -> tuple[list[Tokenised], list[Dropped]]:
    """Apply the policy for rows over the maximum length; an answer is never cut.

    Raises:
        DataError: too many such rows, or any under the policy `fail`.
    """
    long = [row for row in rows if row.length > max_length]
    share = len(long) / max(1, len(rows))
    if long and (config.over_length == "fail" or share > config.max_over_length_share):
        worst = max(long, key=lambda row: row.length)
        raise DataError(
            f"{len(long)} of {len(rows)} rows ({share:.1%}) are longer than {max_length} tokens;"
            f" the longest, {worst.example.source}:{worst.example.line}, has {worst.length}",
            fix="raise data.max_length_keep (1 keeps all that data.max_length_cap allows), or, but"
            " not under `fail`, data.max_over_length_share; or set data.over_length=shorten",
        )
    kept: list[Tokenised] = []
    dropped: list[Dropped] = []
    for row in rows:
        fitted: Tokenised | None = row
        if row.length > max_length:
            fitted = _shorten(row, max_length, chat) if config.over_length == "shorten" else None
        if fitted is None:
            dropped.append(drop(row.example, "too_long", f"{row.length} tokens"))
        else:
            kept.append(fitted)
    return kept, dropped


def _shorten(row: Tokenised, max_length: int, chat: ChatFormat) -> Tokenised | None:
    """Take the middle out of the longest user text: instruction and question stand at its ends.

    None where the other turns leave no room for a quarter of it, or for a word at each end.
    """
    messages = list(row.example.messages)
    users = [at for at, message in enumerate(messages) if message.role == "user"]
    at = max(users, key=lambda index: len(messages[index].content))
    text = messages[at].content
    keep = len(text)
    length = row.length
    for _ in range(SHORTEN_TRIES):
        keep = int(keep - (length - max_length + 8) * len(text) / row.length)
        if keep < len(text) / 4:
            return None
        head = text[: keep // 2].rsplit(None, 1)
        tail = text[len(text) - keep // 2 :].split(None, 1)
        if not head or not tail:
            return None
        messages[at] = Message("user", head[0] + ELLIPSIS + tail[-1])
        encoded = chat.encode(messages)
        length = len(encoded.input_ids)
        if length <= max_length:
            example = replace(row.example, messages=tuple(messages))
            ids = np.array(encoded.input_ids, np.int32)
            labels = np.array(encoded.labels, np.int32)
            return Tokenised(example, ids, labels, row.length - length)
    return None
