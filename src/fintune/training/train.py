"""The training story, top to bottom: set-up, data, model, optimizer, checkpoint, loop, evaluation.

`train` is the stage, `build` makes everything that a run works with, `fit` is the loop. What is
kept between two starts is in checkpoint.py, the order of rows in rows.py and batches.py, the loss
in loss.py, the arithmetic of LoRA in lora.py.

`evaluate(state)` and `log(state, values)` are the hooks of the loop: whatever else is to be
measured of a run is called from one of them.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, send_to_device
from transformers import Trainer, get_scheduler

from fintune import cpu, files, seal
from fintune.attention import why_padded
from fintune.batches import plan_evaluation
from fintune.collate import CPU_PAD_MULTIPLE, Collator
from fintune.config import Config
from fintune.console import heading, meter, say, warn
from fintune.errors import NotFinite, OutputError, Stopped
from fintune.loss import sum_loss, why_full_logits
from fintune.model import (
    Base,
    attach,
    device,
    find_base,
    load_base,
    load_chat,
    precision,
)
from fintune.stop import STOP
from fintune.targets import find_targets, resolve_targets
from fintune.training import checkpoint, distributed, lora, memory, metrics, pointwise
from fintune.training.arguments import KEEP, training_arguments
from fintune.training.rows import Order, Rows, read_train, read_validation
from fintune.training.run_state import RunState, run_fingerprint
from fintune.untrusted.static import check_weights


def train(config: Config, *, fresh: bool = False, force_resume: str | None = None) -> Path:
    """Train, or continue an unfinished run of the same inputs, or keep a finished one.

    Args:
        fresh: move an existing run aside first.
        force_resume: continue although inputs differ, for this reason, which is recorded.

    Returns:
        The run's folder: `best/` holds the adapter of the best evaluation.

    Raises:
        OutputError: no prepared data, a run of other inputs in the folder, or one under way.
        ModelError: a target module that the base does not have.
        NotFinite: a loss or gradient; the last checkpoint is intact.
        NoSpace: the volume is full; nothing is half-written.
        Stopped: SIGTERM, SIGINT or no memory left; the same command continues.
    """
    run = config.run_dir
    metrics.check_trackers(config)
    with STOP.listening():
        STOP.guard()  # also where another process holds the lock for this one
        distributed.start(config.train.strategy)
        # Rank 0 writes, and holds the lock for all.
        lock = seal.lock(run) if distributed.is_rank0() else nullcontext()
        with lock, distributed.losing_none():
            # The data's commit, unless the run has begun with one.
            kept_in = [config.run_dir] * (not fresh) + [config.data_dir]
            base = distributed.from_rank0(lambda: find_base(config.model, kept_in=kept_in))
            if not distributed.is_rank0():  # on another host it may not be there yet
                there = config.model.model_copy(update={"revision": base.revision})
                base = replace(base, folder=find_base(there).folder)
            chat = load_chat(base, config.chat, config.data_dir)
            config, targets = resolve_targets(base.folder, config)
            fingerprint = run_fingerprint(config, base, chat)
            state = RunState.open(config, fingerprint, fresh=fresh, force_resume=force_resume)
            state.targets = targets
            if state.finished:
                say(f"train: unchanged, kept {run}")
            else:
                _train(base, chat.tokenizer, state)
    return run


def _train(base: Base, tokenizer: Any, state: RunState) -> None:
    """The stage, by the only run that writes its folder."""
    rows, epochs = read_train(state.config.data_dir), state.config.train.num_train_epochs
    passes = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    heading(f"train: {len(rows):,} rows, {passes}, {base.about}")
    build(base, tokenizer, rows, state)
    fit(state)
    distributed.from_rank0(lambda: _finish(state))
    memory.trim_heap()
    best = files.read_json(state.best / checkpoint.BEST)
    loss = f"best validation loss {best['eval_loss']:.4f} at step {best['step']}"
    cost = f"{state.seconds:,.0f} s, {memory.peak_in_use(device()) / 1e9:.1f} GB at most"
    say(f"train: {loss}; {state.at.tokens:,} tokens, {cost}: {state.best}")


def build(base: Base, tokenizer: Any, rows: Rows, state: RunState) -> None:
    """Everything that a run works with: model, data, optimizer. Collective."""
    config, on_cpu = state.config, device().type == "cpu"
    memory.retain_heap()
    if on_cpu and distributed.world_size() == 1:
        # Recorded: sums over another number of parts end in other bits.
        cpu.set_threads(state.resolve("threads", cpu.free_threads))
    model, name, padding_free = _model(base, state)

    multiple = CPU_PAD_MULTIPLE if on_cpu else 1
    by_example = config.train.loss_aggregation == "example"
    collator = Collator(padding_free, tokenizer.pad_token_id, multiple, by_example)
    more = max((each["micro_batches"] for each in state.resolved["out_of_memory"]), default=0)
    state.order = order = Order(config, rows, collator, distributed.world_size(), more)
    state.validation = read_validation(config.data_dir, config.train.max_eval_samples)
    with state.noting_memory():
        checkpointing = memory.decide_checkpointing(state, model, name)

    arguments = training_arguments(config, name, checkpointing, order.accumulation)
    if distributed.is_rank0():
        files.write_json(state.folder / "training_arguments.json", arguments.to_dict())
    state.accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if name == "fp32" else name,
        log_with=list(config.train.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(state.folder / "trackers")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )
    state.accelerator.init_trackers(config.out.name, {"fingerprint_sha256": state.sha256})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    settings["weight_decay"] = config.train.weight_decay
    raw = optimizer(trained, **settings)
    warmup = arguments.get_warmup_steps(state.total)
    state.schedule = get_scheduler(arguments.lr_scheduler_type, raw, warmup, state.total)
    state.model, state.optimizer = state.accelerator.prepare(model, raw)
    sampling = config.train.train_sampling_strategy
    say(f"{device().type}, {name}; {order.steps_per_epoch} steps an epoch, {sampling} batches")


def _model(base: Base, state: RunState) -> tuple[Any, str, bool]:
    """The base with a fresh adapter, fused and sharded; its precision; whether its batches are
    padding-free. Collective."""
    config = state.config
    name, sharded = config.train.precision, config.train.strategy == "fsdp"
    name = state.resolve("precision", lambda: precision(name, device()))
    model = load_base(base, config.model.quantization, name, on_cpu=sharded)
    padded, full = why_padded(model), why_full_logits(model)
    targets = state.targets or find_targets(model, config.train.lora.target_modules)
    say(f"{targets}")
    peft = attach(model, config.train.lora, config.seed, targets)
    pointwise.fuse(peft)
    left = lora.fuse(peft)
    fallbacks = {
        f"batches are padded: {padded}": padded,
        f"the loss builds full logits: {full}": full,
        f"{left} LoRA layers keep peft's arithmetic: quantized, or with a bias": left,
    }
    for fallback in state.record("fallbacks", [said for said in fallbacks if fallbacks[said]]):
        warn(fallback)
    state.record("without_adapter", targets.without)
    if sharded:
        distributed.shard(peft)
    return peft, name, padded is None


def fit(state: RunState) -> None:
    """Train from the newest whole checkpoint of this run to the end. Collective.

    The last step is always evaluated and saved. A stop request is met at the end of a step, or
    between two batches of an evaluation, which then comes first on resuming.
    """
    train, at = state.config.train, checkpoint.resume(state)
    again, begun = at.get("pending_evaluation", False), bool(at)
    needed = state.checkpoint_bytes * (1 if begun else KEEP + 1)
    log_steps = min(train.logging_steps, max(1, state.total // metrics.LINES))
    distributed.from_rank0(lambda: files.require_free_space(state.folder, needed))
    state.energy = metrics.EnergyMeter()
    if distributed.is_rank0():
        state.metrics = metrics.open_metrics(state.folder / "metrics.jsonl", state.at.step, again)
    with (
        state.metrics or nullcontext(),
        state.noting_memory(),
        meter("train", state.total) as state.bar,
        STOP.at_steps(),
    ):
        state.bar.advance(state.at.step)
        state.model.train()
        if again:
            evaluate(state)
        stop, spent = False, np.zeros(3)  # tokens, padded tokens, seconds since the last log line
        while state.at.step < state.total and not stop:
            start = time.monotonic()
            rate, norm = state.schedule.get_last_lr()[0], step(state)
            last, stop = state.at.step == state.total, distributed.stop_asked()
            tokens = state.order.tokens(state.order.step(state.at.step - 1))
            spent += (*tokens, time.monotonic() - start)
            state.at.tokens += tokens[0]
            state.bar.advance()
            if state.at.step == 1 or state.at.step % log_steps == 0:
                log(state, metrics.line_of_steps(state, rate, norm, spent))
                spent[:] = 0
            if last or state.at.step % train.eval_steps == 0:
                evaluate(state)
            if last or stop or state.at.step % train.save_steps == 0:
                checkpoint.save(state)
    for tracker in state.accelerator.trackers:
        tracker.finish()
    if stop:
        what = f"stopped at step {state.at.step} of {state.total}, saved"
        raise Stopped(what, fix="the same command continues")


def step(state: RunState) -> float:
    """One optimizer step: its micro-batches, each with its share of the mean loss over the label
    tokens (or examples) of the whole step. Collective.

    Returns:
        The gradient norm before it was clipped.

    Raises:
        NotFinite: the loss or the norm; the weights are as before.
    """
    at, accelerator, order = state.at, state.accelerator, state.order
    rank, processes = accelerator.process_index, accelerator.num_processes
    indices = order.rank_batches(at.step, rank)
    batches = [order.collator([order.rows[index] for index in batch]) for batch in indices]
    labels = sum(map(order.collator.loss_count, batches))
    count = accelerator.reduce(torch.tensor(labels, device=device()))
    loss = torch.zeros((), device=device())
    for number, batch in enumerate(batches):
        # A dropout mask depends on nothing that was before it, nor on the number of processes.
        torch.manual_seed(order.seed(at.step, indices[number]))
        # DDP averages the gradients over processes in the last backward pass alone.
        last = number == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(state.model):
            with accelerator.autocast():
                total, _ = sum_loss(state.model, send_to_device(batch, device()))
            share = total * processes / count
            accelerator.backward(share)
        loss += share.detach()
    norm = accelerator.clip_grad_norm_(state.model.parameters(), state.config.train.max_grad_norm)
    # The one synchronisation with the device.
    mean, size = torch.stack([accelerator.reduce(loss, "mean").float(), norm.float()]).tolist()
    at.loss += _finite(state, mean, size)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        state.schedule.step()
        at.updates += 1
    state.optimizer.zero_grad(set_to_none=True)
    at.step += 1
    return float(size) if math.isfinite(size) else 0.0


def _finite(state: RunState, loss: float, norm: float) -> float:
    """The loss of a step that can be made."""
    scaler = state.accelerator.scaler
    # fp16: the scaler skips a step without a finite gradient and halves its scale, 2^16 at first.
    skipped = scaler is not None and scaler.get_scale() > 1
    if math.isfinite(loss) and (math.isfinite(norm) or skipped):
        return loss
    ids = state.order.example_ids(state.at.step)
    what = f"step {state.at.step + 1}: the loss is {loss}, the gradient norm {norm}"
    why = f"rows of the step: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}"
    fix = "look at them (fintune inspect), or lower train.learning_rate"
    raise NotFinite(f"{what}; it was not made", why=why, fix=fix)


def log(state: RunState, values: dict[str, float]) -> None:
    """Hook: called for each evaluation, the first step and every `train.logging_steps` or fewer.

    Args:
        values: numbers by name, added to a line of `metrics.jsonl`.
    """
    metrics.write_line(state, values)
    memory.trim_heap()


@torch.no_grad()
def evaluate(state: RunState) -> None:
    """Hook: called every `train.eval_steps` and after the last step. Mean loss over the label
    tokens (or examples) of the validation rows; keeps the best adapter. Collective.

    Raises:
        Stopped: a stop was asked for; a checkpoint that repeats this evaluation is saved.
        NotFinite: the loss is not finite.
    """
    accelerator, order, rows = state.accelerator, state.order, state.validation
    # On a CPU all evaluation batches take one size, see CPU_PAD_MULTIPLE.
    multiple = order.most_tokens if order.collator.pad_to_multiple_of > 1 else 1
    collator = replace(order.collator, pad_to_multiple_of=multiple)
    batches = plan_evaluation(rows.lengths, order.most_tokens)
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    state.model.eval()
    for start in range(0, len(batches), accelerator.num_processes):
        if distributed.stop_asked():
            checkpoint.save(state, pending_evaluation=True)
            raise Stopped("stopped during an evaluation", fix="the same command continues")
        number = start + accelerator.process_index
        # Where batches run out a rank repeats the last: FSDP needs all of them in every pass.
        batch = collator([rows[index] for index in batches[min(number, len(batches) - 1)]])
        with accelerator.autocast():
            total, count = sum_loss(state.model, send_to_device(batch, device()))
        if number < len(batches):
            sums += torch.stack([total.double(), torch.tensor(count).to(total)])
    state.model.train()
    total, count = accelerator.reduce(sums).tolist()
    loss = total / count
    if not math.isfinite(loss):
        fix = "lower train.learning_rate; the same command continues from the checkpoint"
        raise NotFinite(f"step {state.at.step}: the validation loss is {loss}", fix=fix)
    log(state, {"eval_loss": loss})
    if state.at.best_loss is None or loss < state.at.best_loss:
        state.at.best_loss = loss
        distributed.from_rank0(lambda: checkpoint.save_best(state))


def _finish(state: RunState) -> None:
    """Write the last files and `done.json`.

    Raises:
        NotFinite: a weight of the adapter.
        OutputError: the adapter does nothing.
    """
    check = check_weights(state.best)
    if check.status == "failed":
        raised = NotFinite if "NaN" in check.detail else OutputError
        fix = "train more steps (train.warmup_ratio of them warm up): fintune train --fresh"
        raise raised(f"{state.best}: {check.detail}", fix=fix)
    metrics.draw_curves(state.folder / "metrics.jsonl", state.folder / "curves.png")
    files.write_json(state.folder / "environment.json", metrics.environment(state))
    seal.seal(state.folder, state.fingerprint, accepted=state.accepted)
