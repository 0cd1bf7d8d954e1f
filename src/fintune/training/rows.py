"""Prepared rows as a torch data set, and which of them each optimizer step sees.

An optimizer step is a set of examples. How it is divided into micro-batches may change while a run
lives (less memory, another world size); which examples it has may not.
"""

from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fintune.batches import Ints, Steps, plan_epoch, rebalance
from fintune.collate import Collator
from fintune.config import Config
from fintune.errors import ConfigError

Row = dict[str, NDArray[np.int32]]
_TOKENS = ["input_ids", "labels"]
_COLUMNS = ["example_id", *_TOKENS, "length"]


class Rows(Dataset[Row]):
    """Token ids and labels of a split; the arrays stay in arrow's buffers, nothing is copied.

    Attributes:
        ids: example ids, in file order.
        lengths: tokens of every example, int64, shape (examples,).
    """

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[str] = table["example_id"].to_pylist()
        self.lengths: Ints = table["length"].to_numpy().astype(np.int64)
        self._table = table.select(_TOKENS).combine_chunks()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return {name: self._table[name][int(index)].values.to_numpy() for name in _TOKENS}


def read_train(data_dir: Path) -> Rows:
    """The training rows; `prepare` leaves no part empty."""
    return Rows(pq.read_table(data_dir / "train.parquet", columns=_COLUMNS))


def read_validation(data_dir: Path, most: int) -> Rows:
    """The validation rows, which choose the checkpoint: at most `most`, the first by example id.

    Example ids are hashes, so the first ones are a random sample, and the same one each time.
    """
    table = pq.read_table(data_dir / "validation.parquet", columns=_COLUMNS)
    return Rows(table.sort_by("example_id").slice(0, most))


class Order:
    """The batch plan of a whole run; an epoch is planned when it is asked for.

    Args:
        world_size: processes that share a step.
        micro_batches: of an optimizer step, where memory ran out; 0: as configured.

    Raises:
        ConfigError: the micro-batches of an optimizer step do not divide among the processes.

    Attributes:
        rows, collator: what it was made with.
        accumulation: micro-batches of an optimizer step and process.
    """

    def __init__(
        self,
        config: Config,
        rows: Rows,
        collator: Collator,
        world_size: int = 1,
        micro_batches: int = 0,
    ) -> None:
        configured = config.train.gradient_accumulation_steps
        if configured % world_size:
            what = f"{configured} micro-batches do not divide among {world_size} processes"
            fix = (
                "change it and train.per_device_train_batch_size: a step has their product of rows"
            )
            raise ConfigError(f"train.gradient_accumulation_steps: {what}", fix=fix)
        self.rows, self.collator, self._world_size = rows, collator, world_size
        self._plan = partial(plan_epoch, config, rows.lengths, world_size=world_size)
        self._seed = config.seed
        self._epochs, self._micro_batches = config.train.num_train_epochs, micro_batches
        self.accumulation = (micro_batches or configured) // world_size
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.steps_per_epoch = len(self.epoch(0))

    def _epoch(self, number: int) -> Steps:
        steps = self._plan(number)
        if self._micro_batches:
            steps = rebalance(self.rows.lengths, steps, self._micro_batches, self._world_size)
        return steps

    def step(self, number: int) -> list[Ints]:
        """Micro-batches of an optimizer step, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self.epoch(epoch)[within]

    def rank_batches(self, number: int, rank: int) -> list[Ints]:
        """A rank's micro-batches of an optimizer step, in order."""
        return self.step(number)[rank :: self._world_size]

    def seed(self, number: int, batch: Ints) -> int:
        """The seed of torch's generator for a micro-batch of a step: its dropout masks depend on
        nothing that was before it, nor on how many processes there are."""
        parts = np.random.SeedSequence((self._seed, number, int(batch[0])))
        return int(parts.generate_state(1, np.uint64)[0] >> 1)

    def tokens(self, batches: list[Ints]) -> tuple[int, int]:
        """Non-padding tokens of micro-batches, and those with padding."""
        lengths = [self.rows.lengths[batch].tolist() for batch in batches]
        return sum(map(sum, lengths)), sum(map(self.collator.padded_tokens, lengths))

    @cached_property
    def largest(self) -> Ints:
        """The micro-batch of the whole run that takes the most tokens in memory."""
        epochs = map(self.epoch, range(self._epochs))
        every = (batch for steps in epochs for step in steps for batch in step)
        return max(every, key=lambda batch: self.tokens([batch])[1])

    @property
    def most_tokens(self) -> int:
        """Tokens of `largest`, padding included."""
        return self.tokens([self.largest])[1]

    def example_ids(self, step: int) -> list[str]:
        """Ids of the examples of a step, micro-batch by micro-batch."""
        return [self.rows.ids[index] for batch in self.step(step) for index in batch]
