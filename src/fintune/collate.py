"""Examples -> one batch: padding-free with sequence boundaries, or padded where that is needed.

They have the same keys for the loss: `labels` are already shifted (the label of a position is the
next token of the same sequence, `IGNORE_INDEX` at every sequence's end), so that no token predicts
the first token of a neighbour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from fintune.example import IGNORE_INDEX

Batch = dict[str, Any]
Tokens = Sequence[int] | NDArray[np.int32]


CPU_PAD_MULTIPLE = 32
"""Padding-free batches on a CPU are padded to a multiple of this many tokens.

oneDNN compiles every bf16 product anew for a number of rows it has not seen (about 7 ms each, 60 a
micro-batch) and keeps the code: batches of any size take twice the time and 50 MB each. Steps of
the stratified plan are so alike that a handful of sizes is left.
"""


def padding_free_batch(rows: Sequence[Mapping[str, Tokens]], pad_to_multiple_of: int = 1) -> Batch:
    """Sequences concatenated, without padding between them.

    Args:
        rows: each with `input_ids` and `labels` of the same length.
        pad_to_multiple_of: of this many tokens; the padding is one more sequence, without
            label tokens.

    Returns:
        `input_ids`, `position_ids` (restarting in every sequence), `labels`: int64, shape
        (1, tokens); `cu_seq_lens_q`: int32, shape (sequences + 1,), the boundaries;
        `max_length_q`: tokens of the longest sequence.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    padding = -sum(lengths) % pad_to_multiple_of
    if padding:
        rows = [*rows, {"input_ids": [0] * padding, "labels": [IGNORE_INDEX] * padding}]
        lengths.append(padding)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([_long(row["input_ids"]) for row in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.cat([_shift(row["labels"]) for row in rows])[None],
        "cu_seq_lens_q": ends,
        "max_length_q": max(lengths),
    }


def padded_batch(rows: Sequence[Mapping[str, Tokens]], pad_token_id: int) -> Batch:
    """Sequences padded on the right to the longest, for a model that needs it (`why_padded`).

    Returns:
        `input_ids`, `attention_mask`, `labels`: int64, shape (sequences, longest).
    """
    ids = [_long(row["input_ids"]) for row in rows]
    mask, labels = [torch.ones_like(row) for row in ids], [_shift(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, True, pad_token_id),
        "attention_mask": pad_sequence(mask, True),
        "labels": pad_sequence(labels, True, IGNORE_INDEX),
    }


@dataclass(frozen=True, slots=True)
class Collator:
    """What a DataLoader calls: padding-free where the model takes it, padded where it does not.

    Attributes:
        by_example: the loss is the mean of the examples' own means: a batch has `loss_weights`,
            fp32, one for each label token.
    """

    padding_free: bool
    pad_token_id: int
    pad_to_multiple_of: int = 1
    by_example: bool = False

    def padded_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that a batch of these lengths takes, padding included."""
        if self.padding_free:
            return -(-sum(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return max(lengths) * len(lengths)

    def __call__(self, rows: Sequence[Mapping[str, Tokens]]) -> Batch:
        if self.padding_free:
            batch = padding_free_batch(rows, self.pad_to_multiple_of)
        else:
            batch = padded_batch(rows, self.pad_token_id)
        if self.by_example:
            counts = torch.tensor([_count(_shift(row["labels"])) for row in rows])
            batch["loss_weights"] = (1 / counts).repeat_interleave(counts)
        return batch

    def loss_count(self, batch: Batch) -> int:
        """What a batch's loss is the mean over: its label tokens, or its examples."""
        if self.by_example:
            return round(float(batch["loss_weights"].sum()))
        return _count(batch["labels"])


def _count(labels: torch.Tensor) -> int:
    return int((labels != IGNORE_INDEX).sum())


def _shift(labels: Tokens) -> torch.Tensor:
    shifted = _long(labels).roll(-1)
    shifted[-1] = IGNORE_INDEX
    return shifted


def _long(values: Tokens) -> torch.Tensor:
    """A copy as int64: the rows are read-only views of a file's buffers."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
