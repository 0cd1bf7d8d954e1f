"""The stage itself: read prepared data, build the run, train or continue, leave a sealed folder."""

import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import PrinterCallback

from fintune import attention, batches, seal
from fintune.chat import ChatFormat
from fintune.collate import CPU_MULTIPLE, Collator
from fintune.config import Config, dump_yaml
from fintune.console import heading, meter, say, warn
from fintune.errors import DataError, NotFinite, OutputError, Stopped
from fintune.files import read_json, sha256_file, write_json, write_text
from fintune.loss import why_full_logits
from fintune.model import (
    attach,
    device,
    find_base,
    load_base,
    load_tokenizer,
    peft_config,
    precision,
)
from fintune.train import checkpoints, lora, memory
from fintune.train.arguments import arguments_dict, effective, training_arguments
from fintune.train.rows import Rows, read_select, read_train
from fintune.train.trainer import BEST, RESUME, LoraTrainer, Order, StopRequest
from fintune.train.watch import Metrics, Watch, draw_curves

PACKAGES = ("fintune", "torch", "transformers", "peft")
"""Versions that a resumed run must share with the run it continues."""


def train(config: Config, *, fresh: bool = False) -> Path:
    """Train, or continue an unfinished run of the same inputs, or keep a finished one.

    Returns:
        The run's folder: `best/` holds the adapter of the best evaluation.

    Raises:
        OutputError: no prepared data, or the folder holds a run of other inputs.
        NotFinite: a loss or gradient; the last checkpoint is intact.
        Stopped: SIGTERM or SIGINT; the same command continues.
    """
    data = seal.read_seal(config.data_dir, stage="prepared data", make="fintune prepare")
    run = config.run_dir
    base = find_base(config.model)
    tokenizer = load_tokenizer(base)
    chat = ChatFormat(tokenizer, config.chat.date_string)
    inputs = {
        "config": config.section_hash("model", "chat", "train", "seed"),
        "data": {name: fact["sha256"] for name, fact in data["files"].items() if "parquet" in name},
        "base": {"id": base.id, "revision": base.revision},
        "template": chat.template_sha256,
        "versions": {name: version(name) for name in PACKAGES},
    }
    if fresh and (aside := seal.move_aside(run)):
        say(f"moved the old run to {aside}")
    state = seal.state(run, inputs, command="fintune train")
    if state is seal.State.FINISHED:
        say(f"train: unchanged, kept {run}")
        return run
    seal.start(run, inputs)
    write_text(run / "config.yaml", dump_yaml(config))
    rows = read_train(config.data_dir)
    if len(rows) == 0:
        raise DataError("no training row", fix="see the ledger: fintune inspect")
    heading(f"train: {len(rows):,} rows, {config.train.epochs} epochs, base {base.id}")
    with StopRequest().listening() as stop:
        trainer = _build(config, rows, inputs, tokenizer, base, stop)
        seconds = _train(trainer, config, run)
    _check_best(run)
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    write_json(run / "environment.json", _environment(trainer, rows, seconds))
    seal.seal(run, inputs)
    del trainer
    memory.give_back()
    best = read_json(run / "best" / BEST)
    say(f"train: best held-out loss {best['eval_loss']:.4f} at step {best['step']}, {run / 'best'}")
    return run


def dry_run(config: Config) -> dict[str, Any]:
    """What `train` would do, without loading weights.

    Returns:
        `training_arguments`, `lora_config`, `batches`, and `notes` on what was assumed.
    """
    notes = []
    on = device()
    if on.type == "cuda":
        name = precision(config.train.precision, on)
    else:
        name = config.train.precision if config.train.precision != "auto" else "bf16"
        notes.append("no GPU here: settings are those for a GPU with bf16")
    checkpointing = config.train.activation_checkpointing == "on"
    keywords = arguments_dict(config, precision=name, checkpointing=checkpointing)
    arguments = effective(training_arguments(config.run_dir, keywords, cpu=on.type == "cpu"))
    arguments["use_cpu"] = False
    lora = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in peft_config(config.train.lora).to_dict().items()
        if isinstance(value, str | int | float | bool | list | set | None)
    }
    return {
        "training_arguments": arguments,
        "lora_config": lora,
        "batches": _batch_facts(config),
        "notes": notes,
    }


def _batch_facts(config: Config) -> dict[str, Any]:
    train = config.train
    try:
        seal.read_seal(config.data_dir, stage="prepared data", make="fintune prepare")
    except OutputError:
        step = train.micro_batch_size * train.accumulation
        return {
            "estimated": True,
            "plan": train.plan,
            "boundaries": list(train.bucket_boundaries or ()),
            "steps": -(-config.data.max_train_rows // step) * train.epochs,
            "largest_micro_batch": train.micro_batch_size * config.data.max_length_cap,
            "padding": None,
        }
    rows = read_train(config.data_dir)
    order = _order(config, rows, world_size=1)
    facts = batches.facts(rows.lengths, order.epoch(0), padded=False)
    return {
        "estimated": False,
        "plan": train.plan,
        "boundaries": list(_boundaries(config, rows) or ()),
        **asdict(facts),
        "steps": facts.steps * train.epochs,
    }


def _boundaries(config: Config, rows: Rows) -> tuple[int, ...] | None:
    if config.train.plan != "bucketed":
        return None
    given = config.train.bucket_boundaries
    return given or batches.choose_boundaries(rows.lengths, config.train.buckets)


def _order(config: Config, rows: Rows, world_size: int) -> Order:
    train, boundaries = config.train, _boundaries(config, rows)
    return Order(
        rows,
        lambda epoch: batches.plan_epoch(
            rows.lengths,
            micro_batch_size=train.micro_batch_size,
            accumulation=train.accumulation,
            seed=config.seed,
            epoch=epoch,
            plan=train.plan,
            boundaries=boundaries,
            world_size=world_size,
        ),
    )


def _build(
    config: Config, rows: Rows, inputs: dict[str, Any], tokenizer: Any, base: Any, stop: StopRequest
) -> LoraTrainer:
    """Everything of a run: base with adapter, order, arguments, Trainer."""
    on = device()
    name = precision(config.train.precision, on)
    model = load_base(base, config.model.quantization, name, attention=attention.NAME)
    reason = attention.takes_flat_batches(model)
    if reason:
        warn(f"batches are padded: {reason}")
    full = why_full_logits(model)
    if full:
        warn(f"the loss builds full logits: {full}")
    peft = attach(model, config.train.lora, config.seed)
    left = lora.fuse(peft, shared_dropout=config.train.lora.shared_dropout)
    for reason, layers in left.items():
        warn(f"{layers} LoRA layers keep peft's own arithmetic: {reason}")
    collator = Collator(
        flat=reason is None,
        pad_token_id=tokenizer.pad_token_id,
        multiple=CPU_MULTIPLE if on.type == "cpu" else 1,
    )
    order = _order(config, rows, int(os.environ.get("WORLD_SIZE", "1")))
    largest = _largest(order, rows, collator, config.train.epochs)
    tokens = collator.laid_tokens(rows.lengths[largest].tolist())
    checkpointing, why = memory.recompute(
        config.train.activation_checkpointing, peft, rows, collator, name, tokens
    )
    say(why)
    if not checkpointing:
        memory.try_largest(peft, rows, collator, name, largest)
    keywords = arguments_dict(config, precision=name, checkpointing=checkpointing)
    arguments = training_arguments(config.run_dir / "checkpoints", keywords, cpu=on.type == "cpu")
    write_json(config.run_dir / "training_arguments.json", effective(arguments))
    trainer = LoraTrainer(
        model=peft,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        order=order,
        select=read_select(config.data_dir, config.train.eval_rows),
        eval_tokens=tokens,
        best=config.run_dir / "best",
        stop=stop,
        sealed={"inputs": inputs, "order_sha256": rows.fingerprint()},
        collator=collator,
    )
    trainer.remove_callback(PrinterCallback)
    say(f"{on.type}, {name}; {order.steps_per_epoch} steps an epoch, plan {config.train.plan}")
    return trainer


def _largest(order: Order, rows: Rows, collator: Collator, epochs: int) -> batches.Ints:
    """The micro-batch of the whole plan that takes the most tokens in memory."""
    every = (
        batch for number in range(epochs) for step in order.epoch(number).steps for batch in step
    )
    return max(every, key=lambda batch: collator.laid_tokens(rows.lengths[batch].tolist()))


def _train(trainer: LoraTrainer, config: Config, run: Path) -> float:
    """Train from the newest whole checkpoint; returns the seconds of all starts together."""
    checkpoint = checkpoints.newest(run / "checkpoints")
    before, done = 0.0, 0
    if checkpoint is not None:
        resume = read_json(checkpoint / RESUME)
        done = int(checkpoint.name.rpartition("-")[2])
        if resume["consumed_sha256"] != trainer.order.consumed_sha256(done):
            raise OutputError(
                f"{checkpoint} was made with another order of rows",
                fix="start again: fintune train --fresh",
            )
        before = read_json(run / "clock.json")["seconds"] if (run / "clock.json").exists() else 0.0
        say(f"continuing from {checkpoint}")
    start = time.monotonic()
    metrics = Metrics(run / "metrics.jsonl", resumed_at=done)
    total = config.train.max_steps
    if total < 0:
        total = trainer.order.steps_per_epoch * config.train.epochs
    try:
        with meter("train", total) as bar:
            bar.advance(done)
            trainer.add_callback(Watch(metrics, bar, _tokens_of_step(trainer)))
            trainer.resume(checkpoint) if checkpoint else trainer.train()
            if trainer.stop.asked:
                raise Stopped(
                    f"stopped at step {trainer.state.global_step} of {total}, saved",
                    fix="continue with the same command",
                )
    finally:
        metrics.close()
        write_json(run / "clock.json", {"seconds": before + time.monotonic() - start})
    return before + time.monotonic() - start


def _tokens_of_step(trainer: LoraTrainer) -> Any:
    lengths = trainer.train_dataset.lengths

    def tokens(step: int) -> tuple[int, int]:
        micro = [lengths[batch].tolist() for batch in trainer.order.step(step)]
        laid = sum(trainer.data_collator.laid_tokens(batch) for batch in micro)
        return sum(map(sum, micro)), laid

    return tokens


def _check_best(run: Path) -> None:
    """The adapter that leaves training holds finite numbers, and is not the one it started as."""
    weights = load_file(run / "best" / "adapter_model.safetensors")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise NotFinite(f"{run / 'best'} holds weights that are not finite")
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.any()]
    if not moved:
        raise OutputError(
            f"{run / 'best'}: every lora_B is zero, so the adapter does nothing",
            fix="raise train.learning_rate or train longer",
        )


def _environment(trainer: LoraTrainer, rows: Rows, seconds: float) -> dict[str, Any]:
    """Measured facts of the run, for the card."""
    on = device()
    epochs = trainer.state.epoch or 0.0
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in (*PACKAGES, "accelerate")},
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else platform.machine(),
        "device_type": on.type,
        "processes": trainer.args.world_size,
        "cpu_cores": os.cpu_count(),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "epochs": round(epochs, 3),
        "trained_tokens": int(np.sum(rows.lengths) * epochs),
        "trainable_parameters": sum(
            parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
        ),
        "adapter_sha256": sha256_file(Path(trainer.best) / "adapter_model.safetensors"),
    }
