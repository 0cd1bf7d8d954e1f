"""Held-out loss: base and adapter over the same supervised tokens, by source and by length.

Rows are batched within one cell (source and length band), so that sums need no logits per row
and nothing but the running sums stays in memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fintune.attention import takes_flat_batches
from fintune.collate import flat_batch, padded_batch
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
    """Sum of the cross-entropy (nats) and supervised tokens of each forward pass over `rows`.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    flat = takes_flat_batches(causal_model(model)) is None
    for batch in _batches(rows):
        made = flat_batch(batch) if flat else padded_batch(batch, pad_token_id)
        placed = {
            key: value.to(model.device) if torch.is_tensor(value) else value
            for key, value in made.items()
        }
        with torch.inference_mode():
            total, count = sum_loss(model, placed)
        if not math.isfinite(float(total)):
            raise NotFinite(
                "the held-out loss is not finite", fix="or try --set train.precision=fp32"
            )
        yield float(total), count


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and perplexity, overall and by source and length, from the sums of heldout.jsonl."""

    def over(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = sum(cell["tokens"] for cell in chosen)
        base, adapter = (
            sum(cell[who] for cell in chosen) / max(tokens, 1) for who in ("base", "adapter")
        )
        return {
            "base": round(base, 6),
            "adapter": round(adapter, 6),
            "change": round(adapter / base - 1, 6) if base else 0.0,
            "perplexity": {"base": _exp(base), "adapter": _exp(adapter)},
            "rows": sum(cell["rows"] for cell in chosen),
            "tokens": tokens,
        }

    def by(key: str) -> dict[str, Any]:
        names = dict.fromkeys(cell[key] for cell in cells)
        return {name: over([cell for cell in cells if cell[key] == name]) for name in names}

    return {**over(cells), "by_source": by("source"), "by_length": by("length")}


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


def _exp(loss: float) -> float:
    """Perplexity; capped where a float ends, so that the file stays JSON."""
    return round(math.exp(min(loss, 700.0)), 4)
