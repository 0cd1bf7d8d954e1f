"""The TrainingArguments of a config: what `plan` prints and the published recipe's file holds, and
what names the optimizer and the schedule of a run."""

from transformers import TrainingArguments

from fintune.config import Config
from fintune.console import say
from fintune.model import device

KEEP = 2
"""Newest checkpoints kept; the best adapter is kept besides."""
_SAME_NAME = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "optim", "learning_rate"),
    *("lr_scheduler_type", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"),
    "logging_steps",
}
"""Keys of our config that TrainingArguments has under the same name."""


def training_arguments(
    config: Config, precision: str, checkpointing: bool, accumulation: int
) -> TrainingArguments:
    """The TrainingArguments of a run, for one device a process.

    Args:
        precision: bf16, fp16 or fp32, resolved.
        checkpointing: gradient checkpointing, resolved.
        accumulation: micro-batches of an optimizer step and process.
    """
    train = config.train
    bucketed = train.train_sampling_strategy == "bucketed"
    arguments = TrainingArguments(
        output_dir=str(config.run_dir / "checkpoints"),
        use_cpu=device().type == "cpu",
        **train.model_dump(include=_SAME_NAME),
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="group_by_length" if bucketed else "random",
        warmup_steps=train.warmup_ratio,  # transformers 5: below 1 it is a share
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps",
        save_total_limit=KEEP,
        # transformers refuses this with a save that is no multiple of the evaluation; the best
        # evaluated weights are kept in any case.
        load_best_model_at_end=train.save_steps % train.eval_steps == 0,
        metric_for_best_model="loss",
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(train.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=config.seed,
    )
    arguments.ddp_find_unused_parameters = False  # every adapter matrix is in every step
    if arguments.n_gpu > 1:
        say(f"one of {arguments.n_gpu} GPUs is used; torchrun starts a process for each")
    return arguments
