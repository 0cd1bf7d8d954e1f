"""plan_epoch: lengths -> the whole epoch as steps of micro-batches. A pure function; no torch.

Length grouping sorts examples into batches, so neighbouring batches are alike, steps differ
tenfold in tokens, and the longest batch decides the memory. The default here does the reverse:
`stratified` gives every step every length. Sort by length, cut into as many strata as a step has
examples, shuffle inside each stratum, let step k take the k-th of every stratum; then balance
the step's examples over micro-batches of nearly equal tokens (longest-processing-time greedy).
Every example once an epoch, no bias, every step alike.

Order is a function of (lengths, seed, epoch) alone, so a resumed run sees what the killed one
would have seen. Several processes are more micro-batches of the same step: rank r of w takes
every w-th of them, after they were balanced.
"""

import numpy as np
from numpy.typing import NDArray

from fintune.config import Config

Ints = NDArray[np.int64]
Steps = list[list[Ints]]
"""An epoch: `steps[step][micro_batch]` is an array of example indices."""
BUCKETS = 8
"""Length buckets where no boundaries are given."""


def plan_epoch(config: Config, lengths: Ints, epoch: int = 0, world_size: int = 1) -> Steps:
    """Plan one epoch as `config.train` has it.

    Args:
        lengths: tokens of every example, shape (examples,).
        world_size: processes that share each step; rank r takes every `world_size`-th micro-batch
            from its r-th on.

    Returns:
        Every example exactly once. Every step has the same number of micro-batches, but for
        the last of the epoch, which may have fewer when its examples do not suffice.
    """
    train, rng = config.train, np.random.default_rng((config.seed, epoch))
    # Examples of a micro-batch: on average, where their tokens are balanced.
    size, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    step_size, plan = size * accumulation, train.train_sampling_strategy
    if plan == "bucketed":
        steps = _bucketed(config, lengths, rng)
    elif plan == "stratified":
        steps = [[group] for group in _strata_order(lengths, step_size, rng)]
    else:
        steps = [[group] for group in _chunks(rng.permutation(lengths.size), step_size)]
    if len(steps) > 1 and sum(batch.size for batch in steps[-1]) < world_size:
        # Fewer examples than processes: some rank would wait for ever. They join the step before.
        steps[-2:] = [steps[-2] + steps[-1]]
    if plan == "bucketed":
        return [_to_ranks(lengths, step, world_size) for step in steps]
    return rebalance(lengths, steps, accumulation, world_size)


def rebalance(lengths: Ints, steps: Steps, micro_batches: int, world_size: int = 1) -> Steps:
    """The same steps, each as so many micro-batches of nearly equal tokens."""
    dealt = [_balance(lengths, np.concatenate(s), micro_batches, world_size) for s in steps]
    return [_to_ranks(lengths, step, world_size) for step in dealt]


def plan_evaluation(lengths: Ints, max_tokens: int) -> list[list[int]]:
    """Batches for a forward-only pass: longest first, each filled up to `max_tokens` tokens."""
    batches: list[list[int]] = []
    left = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if lengths[index] > left:
            batches.append([])
            left = max_tokens
        batches[-1].append(index)
        left -= int(lengths[index])
    return batches


def choose_boundaries(lengths: Ints) -> tuple[int, ...]:
    """Bucket boundaries at the BUCKETS quantiles of the lengths, rounded up to 16 tokens.

    Returns:
        At most BUCKETS increasing lengths; the last is the longest example, rounded up.
    """
    quantiles = np.quantile(lengths, np.arange(1, BUCKETS + 1) / BUCKETS, method="higher")
    return tuple(np.unique(-(-quantiles.astype(np.int64) // 16) * 16).tolist())


def _strata_order(lengths: Ints, step_size: int, rng: np.random.Generator) -> list[Ints]:
    """Steps that take one example of every stratum.

    Where `step_size` does not divide the examples, the last step lacks those of random strata, so
    that its lengths are no others than those of the rest.
    """
    steps = -(-lengths.size // step_size)
    # Ties are broken at random, else the order of the file would leak into the strata.
    order = np.lexsort((rng.random(lengths.size), lengths))
    missing = steps * step_size - lengths.size
    sizes = np.full(step_size, steps)
    if missing:
        sizes[rng.choice(step_size, size=missing, replace=False)] -= 1
    strata = [rng.permutation(stratum) for stratum in np.split(order, sizes.cumsum()[:-1])]
    return [
        np.array([stratum[step] for stratum in strata if step < stratum.size])
        for step in range(steps)
    ]


def _chunks(order: Ints, size: int) -> list[Ints]:
    return [order[start : start + size] for start in range(0, order.size, size)]


def _balance(lengths: Ints, examples: Ints, micro_batches: int, world_size: int) -> list[Ints]:
    """A step's examples as micro-batches of nearly equal tokens, as many on every rank."""
    count = min(micro_batches, examples.size)
    count = max(count - count % world_size, 1)
    return [examples[chosen] for chosen in _greedy(lengths[examples], count, examples.size)]


def _to_ranks(lengths: Ints, step: list[Ints], world_size: int) -> list[Ints]:
    """Interleave micro-batches for the ranks, each as many and of nearly equal tokens. A step whose
    micro-batches do not divide among the ranks (a bucket's last) is balanced anew."""
    if world_size == 1:
        return step
    if len(step) % world_size:
        step = _balance(lengths, np.concatenate(step), max(len(step), world_size), world_size)
    each, left = divmod(len(step), world_size)
    if left:  # fewer examples than ranks
        return step
    ranks = _greedy(np.array([lengths[batch].sum() for batch in step]), world_size, each)
    return [step[rank[place]] for place in range(each) for rank in ranks]


def _greedy(weights: Ints, bins: int, capacity: int) -> list[list[int]]:
    """Longest processing time first: each weight to the lightest bin of fewer than `capacity`.

    Returns:
        Positions of the weights in each bin.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    totals = [0] * bins
    for position in np.argsort(-weights, kind="stable").tolist():
        free = (number for number in range(bins) if len(members[number]) < capacity)
        lightest = min(free, key=totals.__getitem__)
        members[lightest].append(position)
        totals[lightest] += int(weights[position])
    return members


def _bucketed(config: Config, lengths: Ints, rng: np.random.Generator) -> Steps:
    """Batches of one bucket each, in random order; what buckets leave over is joined by length."""
    train, size = config.train, config.train.per_device_train_batch_size
    edges = np.array(sorted(train.bucket_boundaries or choose_boundaries(lengths)), dtype=np.int64)
    bucket = np.searchsorted(edges, lengths, side="left")
    batches: list[Ints] = []
    left: list[Ints] = []
    for number in np.unique(bucket):
        members = rng.permutation(np.flatnonzero(bucket == number))
        whole = members.size - members.size % size
        batches += _chunks(members[:whole], size)
        left.append(members[whole:])
    batches += _chunks(np.concatenate(left), size)
    order = rng.permutation(len(batches))
    # A ragged batch goes last, so that every step but the last has all its examples.
    order = np.array(sorted(order, key=lambda index: batches[index].size < size))
    micro_batches = _chunks(order, train.gradient_accumulation_steps)
    return [[batches[index] for index in chunk] for chunk in micro_batches]
