"""The stage itself: read prepared data, build the run, train or continue, leave a sealed folder."""

import os
import platform
import re
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fintune import files, seal
from fintune.attention import why_padded
from fintune.collate import CPU_PAD_MULTIPLE, Collator
from fintune.config import Config
from fintune.console import heading, meter, say, warn
from fintune.errors import NotFinite, OutputError, Stopped
from fintune.loss import why_full_logits
from fintune.model import (
    Base,
    attach,
    device,
    find_base,
    free_threads,
    load_base,
    load_chat,
    precision,
    set_threads,
)
from fintune.stop import STOP
from fintune.targets import find_targets, resolve_targets
from fintune.training import distributed, lora, memory, pointwise
from fintune.training.metrics import MetricsCallback, draw_curves, open_metrics
from fintune.training.rows import Order, Rows, read_train, read_validation
from fintune.training.run_state import KEEP, PACKAGES, RunState, run_fingerprint
from fintune.training.trainer import BEST, LoraTrainer, training_arguments
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
    with STOP.listening():
        STOP.guard()  # also where another process holds the lock for this one
        distributed.start(config.train.strategy)
        # Rank 0 writes, and holds the lock for all.
        with seal.lock(run) if distributed.is_rank0() else nullcontext():
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
                _train(config, base, chat.tokenizer, state)
    return run


def _train(config: Config, base: Base, tokenizer: Any, state: RunState) -> None:
    """The stage, by the only run that writes its folder."""
    rows, epochs = read_train(config.data_dir), config.train.num_train_epochs
    heading(f"train: {len(rows):,} rows, {epochs} epochs, {base.about}")
    trainer = build(config, base, tokenizer, rows, state)
    _fit(trainer, config, state)
    distributed.from_rank0(lambda: _finish(trainer, rows, state))
    memory.trim_heap()
    best = files.read_json(trainer.best / BEST)
    loss = f"best validation loss {best['eval_loss']:.4f} at step {best['step']}"
    say(f"train: {loss}, {trainer.best}")


def build(config: Config, base: Base, tokenizer: Any, rows: Rows, state: RunState) -> LoraTrainer:
    """Everything of a run: base with adapter, order, arguments, Trainer. Collective."""
    memory.retain_heap()
    if device().type == "cpu" and distributed.world_size() == 1:
        # Recorded: sums over another number of parts end in other bits.
        set_threads(state.resolve("threads", free_threads))
    model, name, padding_free = _model(config, base, state)
    multiple = CPU_PAD_MULTIPLE if device().type == "cpu" else 1
    collator = Collator(padding_free, tokenizer.pad_token_id, multiple)
    more = max((each["micro_batches"] for each in state.resolved["out_of_memory"]), default=0)
    order = Order(config, rows, collator, distributed.world_size(), more)
    with state.noting_memory(order):
        checkpointing = _checkpointing(config, state, model, order, name)
    arguments = training_arguments(config, name, checkpointing, order.accumulation)
    if distributed.is_rank0():
        files.write_json(state.folder / "training_arguments.json", arguments.to_dict())
    sampling = config.train.train_sampling_strategy
    say(f"{device().type}, {name}; {order.steps_per_epoch} steps an epoch, {sampling} batches")
    validation = read_validation(config.data_dir, config.train.max_eval_samples)
    return LoraTrainer(model=model, args=arguments, order=order, validation=validation, run=state)


def _model(config: Config, base: Base, state: RunState) -> tuple[Any, str, bool]:
    """The base with a fresh adapter, fused and sharded; its precision; whether its batches are
    padding-free. Collective."""
    name, sharded = config.train.precision, config.train.strategy == "fsdp"
    name = state.resolve("precision", lambda: precision(name, device()))
    packed = config.model.quantization
    model = load_base(base, packed, name, on_cpu=sharded)
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


def _checkpointing(config: Config, state: RunState, model: Any, order: Order, name: str) -> bool:
    """Whether gradient checkpointing is on: as set, or as estimated; then tried. Collective."""
    train, key, fits = config.train, "gradient_checkpointing", True
    auto, on = train.gradient_checkpointing == "auto", train.gradient_checkpointing == "on"
    if auto:
        on = state.resolve(key, lambda: memory.needs_checkpointing(model, order, name, train))
    try:
        memory.try_largest(model, order, name, checkpointing=on)
    except (RuntimeError, MemoryError) as error:
        if on or not auto or not memory.is_out_of_memory(error):
            raise
        fits = False
    if distributed.any_rank(not fits):
        say("gradient checkpointing is on: the largest micro-batch did not fit without")
        on = state.record(key, True)
        memory.try_largest(model, order, name, checkpointing=True)
    return on


def _fit(trainer: LoraTrainer, config: Config, state: RunState) -> None:
    """Train from the newest whole checkpoint of this run to the end. Collective."""
    order, resume = trainer.order, state.newest_checkpoint()
    needed = trainer.checkpoint_bytes() * (1 if resume else KEEP + 1)
    distributed.from_rank0(lambda: files.require_free_space(state.folder, needed))
    total = config.train.max_steps
    if total < 0:
        total = order.steps_per_epoch * config.train.num_train_epochs
    log = None
    if distributed.is_rank0():
        log = open_metrics(state.folder / "metrics.jsonl", resume)
    with (
        log or nullcontext(),
        state.noting_memory(order, lambda: trainer.state.global_step),
        meter("train", total) as bar,
        STOP.at_steps(),
    ):
        bar.advance(resume.get("step", 0))
        if log:
            trainer.add_callback(MetricsCallback(log, bar, order))
        trainer.resume(resume, total) if resume else trainer.train()
    if distributed.stop_asked():
        what = f"stopped at step {trainer.state.global_step} of {total}, saved"
        raise Stopped(what, fix="the same command continues")


def _finish(trainer: LoraTrainer, rows: Rows, state: RunState) -> None:
    """Write the last files and `done.json`.

    Raises:
        NotFinite: a weight of the adapter.
        OutputError: the adapter does nothing.
    """
    check = check_weights(trainer.best)
    if check.status == "failed":
        raised = NotFinite if "NaN" in check.detail else OutputError
        fix = "train more steps (train.warmup_ratio of them warm up): fintune train --fresh"
        raise raised(f"{trainer.best}: {check.detail}", fix=fix)
    draw_curves(state.folder / "metrics.jsonl", state.folder / "curves.png")
    files.write_json(state.folder / "environment.json", _environment(trainer, rows, state))
    seal.seal(state.folder, state.fingerprint, accepted=state.accepted)


def _environment(trainer: LoraTrainer, rows: Rows, state: RunState) -> dict[str, Any]:
    """Measured facts of the run, for the card."""
    on, arguments = device(), trainer.args
    epochs = trainer.state.epoch or 0.0
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in (*PACKAGES, "accelerate")},
        "finished": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else platform.machine(),
        "processor": _processor(),
        "processes": arguments.world_size,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "seconds": round(trainer.seconds(), 1),
        "steps": trainer.state.global_step,
        "trained_tokens": int(np.sum(rows.lengths) * epochs),
        "trainable_parameters": trainer.model.num_parameters(only_trainable=True),
        **{k: state.resolved[k] for k in ("out_of_memory", "fallbacks", "without_adapter")},
        "accepted_changes": state.accepted,
    }


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    about = Path("/proc/cpuinfo")
    text = about.read_text(errors="replace") if about.is_file() else ""
    named = re.search(r"(?m)^model name\s*: (.+)", text)
    return named[1] if named else platform.processor() or platform.machine()
