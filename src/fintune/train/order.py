"""Which examples each update sees, how they reach the Trainer, and the account of it.

A step is a set of examples. How it is dealt into micro-batches may change while a run lives (less
memory, other processes); which examples it has may not, so the hash of what was consumed is over
the sorted ids of each step.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from fintune import batches
from fintune.batches import EpochPlan, Ints
from fintune.config import Config
from fintune.files import sha256_bytes
from fintune.train.rows import Rows


def epoch_plan(
    config: Config, lengths: Ints, epoch: int, rows: int, accumulation: int, world_size: int = 1
) -> EpochPlan:
    """An epoch's batches as a config has them, but for the size of a micro-batch (`rows`) and the
    number of them in a step and process (`accumulation`)."""
    return batches.plan_epoch(
        lengths,
        micro_batch_size=rows,
        accumulation=accumulation,
        seed=config.seed,
        epoch=epoch,
        plan=config.train.train_sampling_strategy,
        boundaries=config.train.bucket_boundaries,
        world_size=world_size,
    )


class Order:
    """The batch plan of a whole run; an epoch is made when it is asked for.

    Args:
        plan: the plan of an epoch, by its number from 0.
        world_size: processes that share a step.
        parts: micro-batches that a step is dealt into, where the plan's own are too large.

    Attributes:
        since: the step and hash that `consumed_sha256` starts from; (0, "") unless a changed
            order was accepted in the middle of the run.
    """

    def __init__(
        self,
        rows: Rows,
        plan: Callable[[int], EpochPlan],
        world_size: int = 1,
        parts: int | None = None,
    ) -> None:
        self._rows, self._plan = rows, plan
        self._world_size, self._parts = world_size, parts
        self._epochs: dict[int, EpochPlan] = {}
        self.since = self._consumed = (0, "")
        first = self.epoch(0).steps
        self.steps_per_epoch, self._whole = len(first), sum(batch.size for batch in first[0])

    def epoch(self, number: int) -> EpochPlan:
        """The plan of an epoch; the last two asked for are kept."""
        if number not in self._epochs:
            plan = self._plan(number)
            if self._parts is not None:
                plan = batches.rebalance(self._rows.lengths, plan, self._parts, self._world_size)
            self._epochs = {key: self._epochs[key] for key in list(self._epochs)[-1:]}
            self._epochs[number] = plan
        return self._epochs[number]

    def step(self, number: int) -> list[Ints]:
        """Micro-batches of an update, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self.epoch(epoch).steps[within]

    def share(self, step: int) -> float:
        """Examples of an update over those of the first: the last of an epoch may have fewer."""
        return sum(batch.size for batch in self.step(step)) / self._whole

    def example_ids(self, step: int) -> list[str]:
        """Ids of the examples of an update, micro-batch by micro-batch."""
        return [self._rows.ids[index] for batch in self.step(step) for index in batch]

    def consumed_sha256(self, steps: int) -> str:
        """Running hash of the example ids that the first `steps` updates consumed."""
        done, digest = self._consumed if self._consumed[0] <= steps else self.since
        for step in range(done, steps):
            ids = sorted(self.example_ids(step))
            digest = sha256_bytes("\n".join([digest, *ids]).encode())
        self._consumed = (steps, digest)
        return digest

    def continue_from(self, step: int, digest: str) -> None:
        """Count on from what another order consumed until `step`."""
        self.since = self._consumed = (step, digest)


class RankBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch, in order. The Trainer calls `set_epoch`."""

    def __init__(self, order: Order, rank: int, world_size: int) -> None:
        self._order, self._rank, self._world_size = order, rank, world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def _batches(self) -> list[Ints]:
        steps = self._order.epoch(self._epoch).rank(self._rank, self._world_size)
        return [batch for step in steps for batch in step]

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self._batches()])


class Loader(DataLoader[Any]):
    """A DataLoader that hands the epoch to its batch sampler, as accelerate's own do."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, RankBatches)
        self.batch_sampler.set_epoch(epoch)
