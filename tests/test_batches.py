"""The batch plan: every example once, equal steps, equal ranks, the same order each time."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fintune.batches import (
    Steps,
    choose_boundaries,
    plan_epoch,
    plan_evaluation,
)
from fintune.collate import Collator
from fintune.config import Config, TrainConfig
from fintune.training.rows import Order, Rows

PLANS = ("stratified", "bucketed", "random")


def make(
    lengths: list[int], size: int = 4, accumulation: int = 2, seed: int = 1, epoch: int = 0,
    world_size: int = 1, plan: str = "stratified", boundaries: tuple[int, ...] | None = None,
) -> Steps:  # fmt: skip
    """An epoch; `accumulation` is of each process."""
    train = TrainConfig(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation * world_size,
        train_sampling_strategy=plan,  # type: ignore[arg-type]
        bucket_boundaries=boundaries,
    )
    return plan_epoch(Config(seed=seed, train=train), np.array(lengths), epoch, world_size)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    plan=st.sampled_from(PLANS),
    world_size=st.integers(1, 16),
    micro_batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@example(
    lengths=[1] * 9, plan="bucketed", world_size=2, micro_batch_size=4, accumulation=1, epoch=0
)
def test_every_example_exactly_once(
    lengths: list[int],
    plan: str,
    world_size: int,
    micro_batch_size: int,
    accumulation: int,
    epoch: int,
) -> None:
    planned = make(
        lengths,
        plan=plan,
        world_size=world_size,
        size=micro_batch_size,
        accumulation=accumulation,
        epoch=epoch,
    )
    ranks = [[step[rank::world_size] for step in planned] for rank in range(world_size)]
    seen = [index for rank in ranks for step in rank for batch in step for index in batch.tolist()]
    assert sorted(seen) == list(range(len(lengths)))
    if len(lengths) >= world_size:
        for step in zip(*ranks, strict=True):
            assert len({len(batches) for batches in step}) == 1, "a rank would wait for the others"


@pytest.mark.parametrize("plan", PLANS)
def test_order_is_a_function_of_seed_and_epoch(plan: str) -> None:
    lengths = list(range(20, 220))

    def order(seed: int, epoch: int) -> list[int]:
        steps = make(lengths, plan=plan, seed=seed, epoch=epoch)
        return [int(index) for batch in chain(*steps) for index in batch]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_stratified_steps_are_alike() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 32_000).astype(int), 20, 2048)
    plan = make(lengths.tolist(), size=16, accumulation=4)
    tokens = np.array([sum(lengths[batch].sum() for batch in step) for step in plan[:-1]])
    assert tokens.std() / tokens.mean() <= 0.03
    means = [lengths[np.concatenate(step)].mean() for step in plan]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15  # 500 steps: noise is 0.045
    random = make(lengths.tolist(), size=16, plan="random")
    largest = [max(lengths[b].sum() for s in each for b in s) for each in (plan, random)]
    assert largest[1] > 1.5 * largest[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("plan", "most"), [("stratified", 0.02), ("random", 0.05), ("bucketed", 0.05)]
)
def test_ranks_share_tokens_equally(plan: str, most: float, world: int) -> None:
    """Busiest rank over the mean, on average over steps; a bucket's batches stay whole."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 3_200).astype(int), 20, 2048)
    planned = make(lengths.tolist(), plan=plan, accumulation=16, world_size=world)
    shares = np.array(
        [
            [sum(lengths[batch].sum() for batch in step[rank::world]) for rank in range(world)]
            for step in planned[:-1]
        ]
    )
    assert (shares.max(1) / shares.mean(1) - 1).mean() <= most


def test_more_micro_batches_hold_the_same_examples() -> None:
    lengths = np.array([100] * 60 + [900] * 4)
    ids = [[0] * length for length in lengths]
    columns = {"example_id": list(map(str, range(64))), "input_ids": ids, "labels": ids}
    rows = Rows(pa.table({**columns, "length": lengths}))
    train = TrainConfig(per_device_train_batch_size=16, gradient_accumulation_steps=2)
    planned, more = (
        Order(Config(train=train), rows, Collator(True, 0), micro_batches=count) for count in (0, 8)
    )
    assert (planned.accumulation, more.accumulation) == (2, 8)
    assert {len(step) for step in more.epoch(0)} == {8}
    assert more.most_tokens <= planned.most_tokens / 2
    for before, after in zip(planned.epoch(0), more.epoch(0), strict=True):
        assert sorted(np.concatenate(before)) == sorted(np.concatenate(after)), "the same step"


def test_chosen_boundaries_are_quantiles() -> None:
    assert choose_boundaries(np.arange(1, 801)) == (112, 208, 304, 416, 512, 608, 704, 800)
    assert choose_boundaries(np.array([16] * 100 + [1600])) == (16, 1600)
    assert choose_boundaries(np.array([7])) == (16,)


def test_bucketed_batches_stay_in_their_bucket() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 1_000)
    planned = make(lengths.tolist(), plan="bucketed", boundaries=(100, 200, 300, 400))
    whole = [b for b in chain(*planned) if len({(lengths[i] - 1) // 100 for i in b}) == 1]
    mixed = sum(1 for _ in chain(*planned)) - len(whole)
    assert mixed <= 4, "only what buckets leave over may be mixed"


def test_evaluation_batches_hold_all_within_the_cap() -> None:
    lengths = np.array([5, 900, 30, 30, 400, 700, 1])
    batches = plan_evaluation(lengths, 1000)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(7))
    assert all(lengths[batch].sum() <= 1000 for batch in batches)
