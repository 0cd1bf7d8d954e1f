"""Held-out loss: base and adapter over the same label tokens, by source and by length.

Rows are batched within one cell (source and length band), so that sums need no logits per row
and nothing but the running sums stays in memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device

from fintune.attention import why_padded
from fintune.collate import padded_batch, padding_free_batch
from fintune.errors import NotFinite
from fintune.loss import causal_model, sum_loss

BANDS = (128, 256, 512, 1024, 2048)
"""Upper ends, in tokens, of the length bands; longer conversations share the last."""
BATCH_TOKENS = 4096
"""Most tokens of one forward pass, unless one row alone is longer."""


def cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (source, length band), both in order, longest row first inside a cell."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["source"], -len(row["input_ids"]))):
        length = len(row["input_ids"])
        end = next((end for end in BANDS if length <= end), None)
        band = f"<= {end}" if end else f"> {BANDS[-1]}"
        found.setdefault((row["source"], band), []).append(row)
    return found


def sums(
    model: Any, rows: Sequence[dict[str, Any]], pad_token_id: int
) -> Iterator[tuple[float, int]]:
    """Sum of the cross-entropy (nats) and label tokens of each forward pass over `rows`.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    padding_free = why_padded(causal_model(model)) is None
    for batch in _batches(rows):
        made = padding_free_batch(batch) if padding_free else padded_batch(batch, pad_token_id)
        with torch.inference_mode():
            total, count = sum_loss(model, send_to_device(made, model.device))
        if not math.isfinite(float(total)):
            raise NotFinite(
                "the held-out loss is not finite", fix="or try --set train.precision=fp32"
            )
        yield float(total), count


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        if batch and tokens + len(row["input_ids"]) > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(row["input_ids"])
    if batch:
        yield batch
