"""transformers' Trainer with our order of rows, loss, evaluation and checkpoints; nothing else.

Overridden (tests/test_train.py holds their signatures against the pinned transformers):

get_train_dataloader   the batch plan decides which rows share an optimizer step
compute_loss           padding-free, label tokens only, divided by the whole step's tokens
_clip_grad_norm        stops before an optimizer step that is not finite
evaluate               exact token-weighted loss over the validation rows; keeps the best adapter
_save_checkpoint       whole or not at all (run_state.py)
"""

import math
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fintune import files
from fintune.batches import plan_evaluation
from fintune.config import Config
from fintune.console import say
from fintune.errors import NotFinite, Stopped
from fintune.loss import sum_loss
from fintune.model import device
from fintune.training import distributed, run_state
from fintune.training.rows import Order, RankBatches, Rows
from fintune.training.run_state import KEEP, RESUME, RunState
from fintune.untrusted.checks import ADAPTER

BEST = "best.json"
BEST_ADAPTER = "best_adapter.safetensors"
"""In a checkpoint: the best adapter until then, so that no evaluation after it can replace it."""
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

    Arguments of checkpoints, the best weights and the order of rows only document what happens:
    that code of the Trainer is overridden.

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
        arguments._n_gpu = 1  # else torch's DataParallel would cut a padding-free batch
    return arguments


class LoraTrainer(Trainer):  # type: ignore[misc]
    """See the module's docstring.

    Args:
        order: the batch plan.
        validation: rows of the evaluation that chooses the best adapter.
        run: whose folder gets `best/` and whose fingerprint each checkpoint names.
    """

    def __init__(self, *, order: Order, validation: Rows, run: RunState, **keywords: Any) -> None:
        collator, rows = order.collator, order.rows
        super().__init__(data_collator=collator, train_dataset=rows, eval_dataset=rows, **keywords)
        self.remove_callback(PrinterCallback)
        # Our loss is divided by the whole step's label tokens, and its labels come shifted.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False
        self.order, self.validation, self.run = order, validation, run
        self.best = run.folder / "best"
        self._step_loss = torch.zeros((), device=self.args.device)
        self._start, self._evaluating = time.monotonic(), False
        self._eval_batches = plan_evaluation(validation.lengths, order.most_tokens)
        # On a CPU all evaluation batches take one size, see CPU_PAD_MULTIPLE.
        multiple = order.most_tokens if collator.pad_to_multiple_of > 1 else 1
        self._eval_collator = replace(collator, pad_to_multiple_of=multiple)
        self._resume = dict[str, Any]()
        self.add_callback(_Boundaries(self))
        if self.args.process_index:
            # Other dropout masks; rank 0 keeps those of a run of one process.
            torch.manual_seed(self.args.seed + self.args.process_index)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as planned, this rank's share; the device move is the Trainer's."""
        batches = RankBatches(
            lambda: self.order.rank_batches(self.state.global_step, self.args.process_index)
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss over label tokens."""
        total, _ = sum_loss(model, inputs)
        # DDP averages gradients over processes, so the sum over them needs the factor back.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        self._step_loss += loss.detach()
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; a loss or norm that is not finite stops the run before it reaches the weights.

        Called once an optimizer step, on every rank, after its last backward pass: `p.grad` of
        `self.model.named_parameters()` are the step's gradients, before they are clipped, and
        `self.state.global_step` counts the steps made before it.
        """
        norm = super()._clip_grad_norm(model)
        # Each rank's share was multiplied by their number, as DDP averages.
        mean = self.accelerator.reduce(self._step_loss, "mean")
        loss, value = torch.stack([mean.float(), norm.float()]).tolist()
        self._step_loss.zero_()
        step, scaler = self.state.global_step, self.accelerator.scaler
        if math.isfinite(loss) and math.isfinite(value):
            return norm
        if math.isfinite(loss) and scaler is not None and scaler.get_scale() > 1:
            # fp16: the scaler skips this step and halves its scale, of 2^16 at first.
            return torch.zeros_like(norm)
        ids = self.order.example_ids(step)
        what = f"step {step + 1}: the loss is {loss}, the gradient norm {value}; it was not made"
        why = f"rows of the step: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}"
        fix = "look at them (fintune inspect), or lower train.learning_rate"
        raise NotFinite(what, why=why, fix=fix)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over the label tokens of the validation rows; keeps the best adapter.

        Raises:
            Stopped: a stop was asked for; a checkpoint that repeats this evaluation is saved.
            NotFinite: the loss is not finite.
        """
        self._evaluating = True
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        last = len(self._eval_batches) - 1
        for start in range(0, last + 1, self.args.world_size):
            if distributed.stop_asked():
                self._save_checkpoint(self.model, None)
                raise Stopped("stopped during an evaluation", fix="the same command continues")
            number = start + self.args.process_index
            # Where batches run out a rank repeats the last: FSDP needs all of them in every pass.
            batch = self._eval_batches[min(number, last)]
            inputs = self._prepare_inputs(self._eval_collator([self.validation[i] for i in batch]))
            with self.compute_loss_context_manager():
                total, count = sum_loss(self.model, inputs)
            if number <= last:
                sums += torch.tensor([float(total), count], dtype=sums.dtype, device=sums.device)
        sums = self.accelerator.reduce(sums)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            fix = "lower train.learning_rate; the same command continues from the checkpoint"
            raise NotFinite(
                f"step {self.state.global_step}: the validation loss is {loss}", fix=fix
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control.should_evaluate = False
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric = loss
            distributed.from_rank0(self._write_best)
        self.model.train()
        self._evaluating = False
        return metrics

    def resume(self, resume: dict[str, Any], total: int) -> None:
        """Train on until `total` steps; `resume` is of `RunState.newest_checkpoint`."""
        checkpoint = resume["checkpoint"]
        self._start -= resume["seconds"]
        if (checkpoint / BEST).exists():
            distributed.from_rank0(lambda: self._restore_best(checkpoint))
        if resume["step"] < total:
            self._resume = resume
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        # transformers would make one step more where `max_steps` ends inside an epoch.
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        if resume["pending_evaluation"]:
            self.evaluate()

    def seconds(self) -> float:
        """Wall time of the steps that count: until the checkpoint resumed from, and since."""
        return time.monotonic() - self._start

    def checkpoint_bytes(self) -> int:
        """Upper bound of a checkpoint: adapter and best one, two fp32 moments a parameter."""
        return files.SMALL_FILES + 4 * 4 * int(self.model.num_parameters(only_trainable=True))

    def _new_best(self) -> AbstractContextManager[Path]:
        """Write `best/` anew; after a kill in between, the next start has it from a checkpoint."""
        return files.staged_folder(self.best, free=lambda: shutil.rmtree(self.best, True))

    def _write_best(self) -> None:
        with self._new_best() as staging:
            self._save_adapter(staging)
            facts = {"step": self.state.global_step, "eval_loss": self.state.best_metric}
            facts["sha256"] = files.sha256_file(staging / ADAPTER)
            files.write_json(staging / BEST, facts)

    def _restore_best(self, checkpoint: Path) -> None:
        """`best/` may be of optimizer steps that are undone now."""
        names = {BEST_ADAPTER: ADAPTER, BEST: BEST, "adapter_config.json": "adapter_config.json"}
        with self._new_best() as staging:
            for source, target in names.items():
                files.copy_file(checkpoint / source, staging / target)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save whole (run_state.py). Collective."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        self.store_flos()  # gathers, so every rank has to
        generators = distributed.gather_files(self._save_rng_state)

        def save() -> None:
            files.require_free_space(folder, self.checkpoint_bytes())
            run_state.save_checkpoint(folder, step, lambda to: self._fill(to, generators))
            run_state.rotate(folder, KEEP, step)

        distributed.from_rank0(save)

    def _save_adapter(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)

    def _fill(self, staging: Path, generators: dict[str, bytes]) -> None:
        self._save_adapter(staging)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        for name, state in generators.items():
            files.write_bytes(staging / name, state)
        self.state.save_to_json(str(staging / "trainer_state.json"))
        if self.state.best_metric is not None:
            files.copy_file(self.best / ADAPTER, staging / BEST_ADAPTER)
            files.copy_file(self.best / BEST, staging / BEST)
        logged = (float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged)
        facts = {
            "step": self.state.global_step,
            "pending_evaluation": self._evaluating,
            "logged": logged,
            "seconds": round(self.seconds(), 3),
            "processes": self.args.world_size,
            "fingerprint_sha256": self.run.sha256,
        }
        files.write_json(staging / RESUME, facts)


class _Boundaries(TrainerCallback):  # type: ignore[misc]
    """What happens before the first step of a resumed run, and between steps.

    A stop request becomes a save and an end; where an evaluation is due at this step, it meets the
    request first and saves itself. The last step is always evaluated, else its weights could never
    be the best, and a short run had none.
    """

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is loaded: sums of the log, accepted changes, an evaluation cut short."""
        trainer, resume = self._trainer, self._trainer._resume
        if not resume:
            return
        unlogged, trainer._total_loss_scalar, trainer._globalstep_last_logged = resume["logged"]
        trainer._tr_loss.fill_(unlogged)
        if resume["fingerprint_sha256"] != trainer.run.sha256:
            state.compute_steps(args, state.max_steps)
            _take_new_rates(trainer.optimizer, trainer.lr_scheduler, args.weight_decay)
        if resume["pending_evaluation"]:
            trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if distributed.stop_asked():
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def _take_new_rates(optimizer: Any, schedule: Any, weight_decay: float) -> None:
    """After accepted changes: a restored optimizer and scheduler have their old settings.

    All weights of an adapter decay.
    """
    rate = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group |= {"lr": rate, "initial_lr": rate, "weight_decay": weight_decay}
    rule = getattr(schedule, "scheduler", schedule)  # inside accelerate's wrapper
    rule.base_lrs = [rate] * len(optimizer.param_groups)
    if hasattr(rule, "lr_lambdas"):  # else it is a plateau's, which scales the rate it finds
        rule.last_epoch -= 1
        rule.step()
