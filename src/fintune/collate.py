"""Examples -> one batch: laid end to end with their boundaries, or padded where that is needed.

Both give the same keys to the loss: `labels` are already shifted (the label of a position is the
next token of its own sequence, `IGNORE` at every sequence's end), so that no token is ever asked
to predict the first token of a neighbour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fintune.example import IGNORE

Batch = dict[str, Any]
Tokens = Sequence[int] | NDArray[np.int32]


CPU_MULTIPLE = 32
"""Flat batches on a CPU are filled up to a multiple of this many tokens.

oneDNN compiles every bf16 product anew for a number of rows it has not seen (about 7 ms each, 60 a
micro-batch) and keeps the code, so that freely varying batches take twice the time and grow by
50 MB each. Steps of the stratified plan are so alike that a handful of sizes is left.
"""


def flat_batch(rows: Sequence[Mapping[str, Tokens]], multiple: int = 1) -> Batch:
    """Sequences laid end to end, no padding between them.

    Args:
        rows: each with `input_ids` and `labels` of the same length.
        multiple: fill up to a multiple of this many tokens, as one more sequence that nothing
            attends to and no label trains.

    Returns:
        `input_ids`, `position_ids` (restarting in every sequence), `labels`: int64, shape
        (1, tokens); `cu_seq_lens_q`: int32, shape (sequences + 1,), the boundaries;
        `max_length_q`: tokens of the longest sequence.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    fill = -sum(lengths) % multiple
    if fill:
        rows = [*rows, {"input_ids": [0] * fill, "labels": [IGNORE] * fill}]
        lengths.append(fill)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([_long(row["input_ids"]) for row in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.cat([_shift(row["labels"]) for row in rows])[None],
        "cu_seq_lens_q": ends,
        "max_length_q": max(lengths),
    }


def padded_batch(rows: Sequence[Mapping[str, Tokens]], pad_token_id: int) -> Batch:
    """Sequences padded on the right to the longest, for a model that cannot take flat ones.

    Returns:
        `input_ids`, `attention_mask`, `labels`: int64, shape (sequences, longest).
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = _long(row["input_ids"])
        labels[index, :length] = _shift(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True, slots=True)
class Collator:
    """What a DataLoader calls: flat where the model takes it, padded where it does not."""

    flat: bool
    pad_token_id: int
    multiple: int = 1

    def laid_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that a batch of these lengths takes, padding included."""
        if self.flat:
            return -(-sum(lengths) // self.multiple) * self.multiple
        return max(lengths) * len(lengths)

    def __call__(self, rows: Sequence[Mapping[str, Tokens]]) -> Batch:
        return (
            flat_batch(rows, self.multiple) if self.flat else padded_batch(rows, self.pad_token_id)
        )


def _shift(labels: Tokens) -> torch.Tensor:
    shifted = _long(labels).roll(-1)
    shifted[-1] = IGNORE
    return shifted


def _long(values: Tokens) -> torch.Tensor:
    """A copy as int64: the rows are read-only views of a file's buffers."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
