"""A config -> transformers' TrainingArguments. What transformers 5 renamed is translated here.

`group_by_length` became `train_sampling_strategy`, `warmup_ratio` became a `warmup_steps` below 1,
`gradient_checkpointing` became `activation_checkpointing`. Checkpoints, the best weights and the
order of rows are ours (trainer.py), so the words for them only say what happens.
"""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fintune.config import Config, TrainConfig
from fintune.console import say
from fintune.train.checkpoints import KEEP


def arguments_dict(
    config: Config, *, precision: str, checkpointing: bool, accumulation: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments, but for folders and the device.

    Args:
        precision: bf16, fp16 or fp32, resolved.
        checkpointing: gradient checkpointing, resolved.
        accumulation: micro-batches of one update, where the plan needs more than configured.
    """
    train: TrainConfig = config.train
    bucketed = train.train_sampling_strategy == "bucketed"
    return {
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation or train.gradient_accumulation_steps,
        "train_sampling_strategy": "group_by_length" if bucketed else "random",
        "optim": train.optim,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_ratio,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        "save_total_limit": KEEP,
        # transformers refuses this with a save that is no multiple of the evaluation; the best
        # evaluated weights are kept by BestAdapter in any case, and loaded at the end.
        "load_best_model_at_end": train.save_steps % train.eval_steps == 0,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(train.report_to) or "none",
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def training_arguments(output: Path, keywords: dict[str, Any], *, cpu: bool) -> TrainingArguments:
    """The TrainingArguments of a run, for one device a process."""
    arguments = TrainingArguments(output_dir=str(output), use_cpu=cpu, **keywords)
    if arguments.n_gpu > 1:
        say(f"one of {arguments.n_gpu} GPUs is used; torchrun starts a process for each")
        arguments._n_gpu = 1  # else torch's DataParallel would cut a padding-free batch
    return arguments


def effective(arguments: TrainingArguments) -> dict[str, Any]:
    """What transformers made of them, without folders, devices and tokens; JSON-safe."""
    private = {"output_dir", "hub_token", "push_to_hub", "hub_model_id", "run_name", "local_rank"}
    return {
        key: value
        for key, value in arguments.to_dict().items()
        if key not in private and isinstance(value, str | int | float | bool | list | dict | None)
    }
