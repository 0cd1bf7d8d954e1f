"""Lengths of the rows to be trained on, and the work that the batch plan makes of them."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintune import batches
from fintune.batches import Ints
from fintune.config import Config
from fintune.planning.estimate import Work
from fintune.seal import DONE, read_data

SIGMA = 0.9
"""Standard deviation of the logarithm of a length: 11,869 rows of finance instructions, Llama 3
tokens, template included."""
MEAN_TOKENS = 300
"""Their mean length, 291."""
SUPERVISED = 0.5
"""Share of tokens that the loss counts, where rows are not prepared. An assumption."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every row; `supervised` is the share of them that the loss counts."""

    train: Ints
    select: Ints
    supervised: float
    assumed: bool


@dataclass(frozen=True, slots=True)
class Batches:
    """Tokens of the largest micro-batch, lengths in a middling one, all passes and updates."""

    micro_batch: int
    accumulation: int
    largest: int
    middling: Ints
    updates: int
    passes: int


def lengths(config: Config, rows: int | None, mean_tokens: int | None) -> Lengths:
    """Of the prepared data where there is some and nothing else was said, else assumed."""
    if rows is None and mean_tokens is None and (config.data_dir / DONE).is_file():
        read_data(config.data_dir)
        train = _read(config, "train.parquet")
        held = _read(config, "validation.parquet")
        select = held["length"][np.array(held["part"]) == "select"]
        share = float(train["supervised"].sum() / max(train["length"].sum(), 1))
        return Lengths(train["length"], select[: config.train.eval_rows], share, assumed=False)
    count = rows or config.data.max_train_rows
    evaluated = min(config.train.eval_rows, config.data.max_validation_rows // 2)
    mean = mean_tokens or MEAN_TOKENS
    cap = config.data.max_length_cap
    return Lengths(_spread(count, mean, cap), _spread(evaluated, mean, cap), SUPERVISED, True)


def _read(config: Config, name: str) -> dict[str, Any]:
    table = pq.read_table(config.data_dir / name)
    labels = pc.list_flatten(table["labels"])
    counted = pc.sum(pc.greater_equal(labels, 0)).as_py() or 0
    part = table["part"].to_pylist() if "part" in table.column_names else []
    found = table["length"].to_numpy().astype(np.int64)
    return {"length": found, "part": part, "supervised": np.array([counted])}


def _spread(count: int, mean: int, cap: int) -> Ints:
    """`count` lengths at even quantiles of a log-normal with this mean, none over the cap."""
    normal = NormalDist(np.log(mean) - SIGMA**2 / 2, SIGMA)
    points = [normal.inv_cdf((k + 0.5) / count) for k in range(count)]
    return np.clip(np.exp(points), 16, cap).astype(np.int64)


def plan_batches(config: Config, train: Ints, micro_batch: int, *, multiple: int = 1) -> Batches:
    """The run's batch plan with another micro-batch size; examples of an update stay the same."""
    settings = config.train
    accumulation = max(settings.accumulation * settings.micro_batch_size // micro_batch, 1)
    epoch = batches.plan_epoch(
        train,
        micro_batch_size=micro_batch,
        accumulation=accumulation,
        seed=config.seed,
        epoch=0,
        plan=settings.plan,
        boundaries=settings.bucket_boundaries,
        buckets=settings.buckets,
    )
    if settings.max_tokens is not None:
        parts = batches.parts_under(settings.max_tokens, train, [epoch], accumulation)
        epoch = batches.deal_again(train, epoch, parts)
    micro = sorted((train[batch] for step in epoch.steps for batch in step), key=np.sum)
    updates = len(epoch.steps) * settings.epochs
    if settings.max_steps > 0:
        updates = min(updates, settings.max_steps)
    passes = round(len(micro) * updates / len(epoch.steps))
    largest = -(-int(micro[-1].sum()) // multiple) * multiple
    middling = micro[len(micro) // 2]
    return Batches(micro_batch, accumulation, largest, middling, updates, passes)


def work(config: Config, found: Lengths, plan: Batches) -> Work:
    """Sums over the whole run."""
    epochs = plan.updates * plan.micro_batch * plan.accumulation / max(len(found.train), 1)
    epochs = min(epochs, config.train.epochs)
    evaluations = -(-plan.updates // config.train.eval_steps)  # the last update is evaluated too
    tokens, eval_tokens = int(found.train.sum()), int(found.select.sum())
    return Work(
        tokens=tokens * epochs,
        squares=float((found.train.astype(float) ** 2).sum()) * epochs,
        supervised=tokens * epochs * found.supervised,
        updates=plan.updates,
        passes=plan.passes,
        evaluations=evaluations,
        eval_tokens=eval_tokens * evaluations,
        eval_squares=float((found.select.astype(float) ** 2).sum()) * evaluations,
        eval_supervised=eval_tokens * evaluations * found.supervised,
    )
