"""The stage itself: read prepared data, build the run, train or continue, leave a sealed folder."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from fintune import attention, batches, seal
from fintune.chat import ChatFormat
from fintune.collate import CPU_PAD_MULTIPLE, Collator
from fintune.config import Config
from fintune.console import heading, meter, say, warn
from fintune.errors import DataError, Stopped
from fintune.files import SMALL_FILES, read_json, require_free_space, space_for, write_json
from fintune.kernels import pointwise
from fintune.loss import why_full_logits
from fintune.model import (
    Base,
    PrecisionName,
    attach,
    device,
    find_base,
    load_base,
    load_tokenizer,
    precision,
)
from fintune.stop import STOP, StopRequest
from fintune.train import checkpoints, lora, memory, processes
from fintune.train.arguments import arguments_dict, effective, training_arguments
from fintune.train.finish import check_best, environment
from fintune.train.metrics import MetricsCallback, draw_curves, open_metrics
from fintune.train.order import Order, epoch_plan
from fintune.train.rows import Rows, read_train, read_validation
from fintune.train.run_state import RESUME, RunState, run_fingerprint
from fintune.train.trainer import BEST, LoraTrainer


def train(config: Config, *, fresh: bool = False, force_resume: str | None = None) -> Path:
    """Train, or continue an unfinished run of the same inputs, or keep a finished one.

    Args:
        fresh: move an existing run aside first.
        force_resume: continue although inputs differ, for this reason, which is recorded.

    Returns:
        The run's folder: `best/` holds the adapter of the best evaluation.

    Raises:
        OutputError: no prepared data, a run of other inputs in the folder, or one under way.
        NotFinite: a loss or gradient; the last checkpoint is intact.
        NoSpace: the volume is full; nothing is half-written.
        Stopped: SIGTERM, SIGINT or no memory left; the same command continues.
    """
    run = config.run_dir
    with STOP.listening(), space_for(run, SMALL_FILES):
        STOP.guard()  # also where another process holds the lock for this one
        processes.start(config.train.strategy, config.model.quantization)
        # Of several processes the first one writes, and holds the lock for all.
        with seal.lock(run) if processes.is_rank0() else nullcontext("") as dead:
            if dead:
                say(f"taking over from a run that died ({dead})")
            return _train_alone(config, STOP, fresh=fresh, force_resume=force_resume)


def _train_alone(
    config: Config, stop: StopRequest, *, fresh: bool, force_resume: str | None
) -> Path:
    """The stage, by the only process that writes its folder."""
    run = config.run_dir
    base = find_base(config.model)
    tokenizer = load_tokenizer(base)
    fingerprint = run_fingerprint(config, base, ChatFormat(tokenizer, config.chat.date_string))
    state = RunState.open(config, fingerprint, fresh=fresh, force_resume=force_resume)
    if state.finished:
        say(f"train: unchanged, kept {run}")
        return run
    rows = read_train(config.data_dir)
    if len(rows) == 0:
        raise DataError("no training row", fix="see the ledger: fintune inspect")
    heading(f"train: {len(rows):,} rows, {config.train.num_train_epochs} epochs, base {base.id}")
    trainer = _build(config, rows, tokenizer, base, stop, state)
    _train(trainer, config, state)
    processes.from_rank0(lambda: _finish(trainer, rows, state))
    memory.trim_heap()
    best = read_json(run / "best" / BEST)
    say(f"train: best held-out loss {best['eval_loss']:.4f} at step {best['step']}, {run / 'best'}")
    return run


def _finish(trainer: LoraTrainer, rows: Rows, state: RunState) -> None:
    """Check the best adapter, write the last files and `done.json`."""
    run = state.folder
    check_best(run / "best", trainer)
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    write_json(run / "environment.json", environment(trainer, rows, state))
    seal.seal(run, state.fingerprint, accepted=state.accepted)


def _order(
    config: Config,
    rows: Rows,
    world_size: int,
    cap: int | None,
    laid: Callable[[list[int]], int] = sum,
) -> tuple[Order, int]:
    """The batch plan under a cap on tokens, and the micro-batches of one update and process."""
    train = config.train
    each = processes.share(train.gradient_accumulation_steps, world_size)

    def plan(epoch: int) -> batches.EpochPlan:
        batch_size = train.per_device_train_batch_size
        return epoch_plan(config, rows.lengths, epoch, batch_size, each, world_size)

    if cap is None:
        return Order(rows, plan), each
    plans = [plan(epoch) for epoch in range(train.num_train_epochs)]
    least = train.gradient_accumulation_steps
    parts = batches.micro_batches_under(cap, rows.lengths, plans, least, world_size, laid)
    return Order(rows, plan, world_size, parts if parts > least else None), parts // world_size


def _build(
    config: Config,
    rows: Rows,
    tokenizer: Any,
    base: Base,
    stop: StopRequest,
    state: RunState,
) -> LoraTrainer:
    """Everything of a run: base with adapter, order, arguments, Trainer."""
    memory.retain_heap()
    on = device()
    chosen = state.resolve(
        "precision", lambda: processes.from_rank0(lambda: precision(config.train.precision, on))
    )
    name = precision(chosen, on)  # refused where the run began on another kind of device
    peft, reason = _model(config, base, name)
    collator = Collator(
        padding_free=reason is None,
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=CPU_PAD_MULTIPLE if on.type == "cpu" else 1,
    )
    world = processes.world_size()
    cap = state.max_tokens()
    order, accumulation = _order(config, rows, world, cap, collator.padded_tokens)
    largest = _largest(order, rows, collator, config.train.num_train_epochs)
    tokens = collator.padded_tokens(rows.lengths[largest].tolist())

    longest = collator.padded_tokens([int(rows.lengths.max())])
    with state.capping_tokens(lambda: 0, tokens, longest):
        checkpointing = _recomputed(config, state, peft, rows, collator, name, largest)
    keywords = arguments_dict(
        config, precision=name, checkpointing=checkpointing, accumulation=accumulation
    )
    arguments = training_arguments(config.run_dir / "checkpoints", keywords, cpu=on.type == "cpu")
    arguments.ddp_find_unused_parameters = False  # every adapter matrix is in every step
    if processes.is_rank0():
        write_json(config.run_dir / "training_arguments.json", effective(arguments))
    trainer = LoraTrainer(
        model=peft,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        order=order,
        validation=read_validation(config.data_dir, config.train.max_eval_samples),
        eval_tokens=tokens,
        best=config.run_dir / "best",
        stop=stop,
        fingerprint_sha256=state.sha256,
        collator=collator,
    )
    trainer.remove_callback(PrinterCallback)
    if on.type == "cpu" and config.train.optim.startswith("paged"):
        say(f"{config.train.optim}: nothing is paged on a CPU, the arithmetic is the same")
    sampling = config.train.train_sampling_strategy
    say(f"{on.type}, {name}; {order.steps_per_epoch} steps an epoch, {sampling} batches")
    return trainer


def _recomputed(
    config: Config,
    state: RunState,
    peft: Any,
    rows: Rows,
    collator: Collator,
    name: PrecisionName,
    largest: batches.Ints,
) -> bool:
    """Whether gradient checkpointing is on: as set, or as estimated and then tried."""
    choice = config.train.gradient_checkpointing

    def estimate() -> tuple[bool, str]:
        if config.train.strategy == "fsdp" and choice == "auto":
            return True, "gradient checkpointing is on: a sharded base is one that hardly fits"
        tokens = collator.padded_tokens(rows.lengths[largest].tolist())
        found, why = memory.recompute(config.train, peft, collator, name, tokens)
        return processes.any_rank(found), why

    def attempt(recomputed: bool) -> None:
        memory.try_largest(peft, rows, collator, name, largest, recomputed=recomputed)

    on: bool
    on, why = state.resolve("gradient_checkpointing", estimate)
    say(why)
    if on or choice != "auto":
        attempt(on)
    elif processes.any_rank(not memory.fits(lambda: attempt(False))):
        why = "gradient checkpointing is on: the largest micro-batch did not fit without"
        on, _ = state.record("gradient_checkpointing", (True, why))
        say(why)
        attempt(True)
    return on


def _model(config: Config, base: Base, dtype: PrecisionName) -> tuple[Any, str | None]:
    """The base with a fresh adapter, fused and sharded; why its batches are padded, or None."""
    sharded = config.train.strategy == "fsdp"
    model = load_base(
        base, config.model.quantization, dtype, attention=attention.NAME, on_cpu=sharded
    )
    padded = attention.why_padded(model)
    if padded:
        warn(f"batches are padded: {padded}")
    full = why_full_logits(model)
    if full:
        warn(f"the loss builds full logits: {full}")
    peft = attach(model, config.train.lora, config.seed)
    pointwise.fuse(peft)
    left = lora.fuse(peft)
    for reason, layers in left.items():
        warn(f"{layers} LoRA layers keep peft's own arithmetic: {reason}")
    if sharded:
        processes.shard(peft)
    return peft, padded


def _largest(order: Order, rows: Rows, collator: Collator, epochs: int) -> batches.Ints:
    """The micro-batch of the whole plan that takes the most tokens in memory."""
    every = (
        batch for number in range(epochs) for step in order.epoch(number).steps for batch in step
    )
    return max(every, key=lambda batch: collator.padded_tokens(rows.lengths[batch].tolist()))


def _train(trainer: LoraTrainer, config: Config, state: RunState) -> None:
    """Train from the newest whole checkpoint of this run to the end."""
    run = config.run_dir
    folder = run / "checkpoints"
    checkpoint = processes.from_rank0(lambda: checkpoints.newest(folder, state.incompatible))
    done, evaluated = 0, True
    if checkpoint:
        done = checkpoints.step_of(checkpoint)
        state.check_data_order(trainer.order, checkpoint)
        evaluated = not read_json(checkpoint / RESUME)["pending_evaluation"]
        say(f"continuing from {checkpoint}")
    kept = checkpoints.KEEP + 1 - len(checkpoints.checkpoints(folder))
    needed = max(kept, 1) * trainer.checkpoint_bytes()
    processes.from_rank0(lambda: require_free_space(run, needed))
    metrics = (
        open_metrics(run / "metrics.jsonl", resumed_at=done, evaluated=evaluated)
        if processes.is_rank0()
        else None
    )
    total = config.train.max_steps
    if total < 0:
        total = trainer.order.steps_per_epoch * config.train.num_train_epochs
    longest = trainer.data_collator.padded_tokens([int(trainer.train_dataset.lengths.max())])
    try:
        with (
            state.capping_tokens(lambda: trainer.state.global_step, trainer.largest, longest),
            meter("train", total) as bar,
            trainer.stop.at_steps(),
        ):
            bar.advance(done)
            if metrics is not None:
                ids = trainer.order.example_ids
                trainer.add_callback(
                    MetricsCallback(metrics, bar, trainer.losses, trainer.tokens_of_step, ids)
                )
            trainer.resume(checkpoint, total) if checkpoint else trainer.train()
    finally:
        if metrics is not None:
            metrics.close()
    if processes.stop_asked(trainer.stop):
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {total}, saved",
            fix="the same command continues",
        )
