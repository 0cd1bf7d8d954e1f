"""transformers' Trainer with our order of rows, loss, evaluation and checkpoints; nothing else.

Overridden (tests/test_train_trainer.py holds their signatures against the pinned transformers):

get_train_dataloader   the batch plan decides which rows share a step
compute_loss           padding-free, label tokens only, divided by the whole step's tokens
_clip_grad_norm        stops before an update that is not finite
evaluate               exact token-weighted loss over the validation rows; keeps the best adapter
_save_checkpoint       whole or not at all (checkpoints.py)
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState

from fintune.batches import plan_evaluation
from fintune.collate import Collator
from fintune.errors import NotFinite, Stopped
from fintune.files import (
    SMALL_FILES,
    copy_file,
    read_json,
    sha256_file,
    space_for,
    staged_folder,
    write_bytes,
    write_json,
)
from fintune.loss import sum_loss
from fintune.stop import StopRequest
from fintune.train import checkpoints, processes
from fintune.train.metrics import Losses
from fintune.train.order import Loader, Order, RankBatches
from fintune.train.rows import Rows
from fintune.train.run_state import RESUME

BEST = "best.json"
ADAPTER = "adapter_model.safetensors"
BEST_ADAPTER = "best_adapter.safetensors"
"""In a checkpoint: the best adapter until then, so that no evaluation after it can replace it."""
SKIPS = 40
"""Updates in a row that fp16's scaler may skip; its first scale, 2^16, is 1 after 16 halvings."""


class LoraTrainer(Trainer):  # type: ignore[misc]
    """See the module's docstring.

    Args:
        order: the batch plan.
        validation: rows of the evaluation that chooses the best adapter.
        eval_tokens: most tokens of an evaluation batch.
        best: folder of the best adapter.
        stop: set from outside when the run should end at the next step.
        fingerprint_sha256: of the run, written into each checkpoint and compared on resume.
    """

    def __init__(
        self,
        *,
        order: Order,
        validation: Rows,
        eval_tokens: int,
        best: Path,
        stop: StopRequest,
        fingerprint_sha256: str,
        collator: Collator,
        **keywords: Any,
    ) -> None:
        super().__init__(data_collator=collator, **keywords)
        # Our loss is divided by the whole step's label tokens, and its labels come shifted.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False
        self.order, self.validation, self.best, self.stop = order, validation, best, stop
        self.fingerprint_sha256, self.largest = fingerprint_sha256, eval_tokens
        self.losses = Losses()
        self._step_loss = torch.zeros((), device=self.args.device)
        self._earlier_s, self._start, self._skipped = 0.0, time.monotonic(), 0
        self._eval_batches = plan_evaluation(validation.lengths, eval_tokens)
        # On a CPU all evaluation batches take one size, see CPU_PAD_MULTIPLE.
        multiple = eval_tokens if collator.pad_to_multiple_of > 1 else 1
        self._eval_collator = replace(collator, pad_to_multiple_of=multiple)
        self.add_callback(_StopAtStep(stop))
        if self.args.process_index:
            # Dropout masks of its own; the first keeps those of one process.
            torch.manual_seed(self.args.seed + self.args.process_index)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as planned, this rank's share; the device move is the Trainer's."""
        sampler = RankBatches(self.order, self.args.process_index, self.args.world_size)
        return Loader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss over label tokens."""
        total, count = sum_loss(model, inputs)
        # DDP averages gradients over processes, so the sum over them needs the factor back.
        tokens = count if num_items_in_batch is None else num_items_in_batch
        loss = total * self.accelerator.num_processes / tokens
        self._step_loss += loss.detach()
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; a loss or norm that is not finite stops the run before it reaches the weights.

        Both are looked at, once a step: a loss may be infinite where its gradient is not.
        """
        norm = super()._clip_grad_norm(model)
        if self.args.world_size > 1:
            # Each rank's share was multiplied by their number, as DDP averages.
            dist.all_reduce(self._step_loss)
            self._step_loss /= self.args.world_size
        loss, value = torch.stack([self._step_loss.float(), norm.float()]).tolist()
        self._step_loss.zero_()
        if math.isfinite(loss) and math.isfinite(value):
            self._skipped = 0
            self.losses.add(loss, self.order.share(self.state.global_step))
            return norm
        self._skipped += 1
        scaler = self.accelerator.scaler
        if math.isfinite(loss) and scaler is not None and self._skipped < SKIPS:
            # fp16: the scaler skips this update and lowers its scale; that is its job.
            self.losses.limit = None
            return torch.zeros_like(norm)
        step = self.state.global_step
        ids = self.order.example_ids(step)
        raise NotFinite(
            f"step {step + 1}: the loss is {loss}, the gradient norm {value}; the update was not"
            " made",
            why=f"rows of the step: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}",
            fix="look at them (fintune inspect); lower train.learning_rate; the last checkpoint"
            " is good and the same command continues from it",
        )

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
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        last, bad = len(self._eval_batches) - 1, []
        for start in range(0, last + 1, self.args.world_size):
            if processes.stop_asked(self.stop):
                self._save_whole(pending_evaluation=True)
                raise Stopped("stopped during an evaluation", fix="the same command continues")
            number = start + self.args.process_index
            # Where batches run out a rank repeats the last: FSDP needs all of them in every pass.
            batch = self._eval_batches[min(number, last)]
            inputs = self._prepare_inputs(self._eval_collator([self.validation[i] for i in batch]))
            with self.compute_loss_context_manager():
                total, count = sum_loss(self.model, inputs)
            if not math.isfinite(value := float(total)):
                bad += [self.validation.ids[index] for index in batch]
            if number <= last:
                sums += torch.tensor([value, count], dtype=torch.float64, device=sums.device)
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            raise NotFinite(
                f"step {self.state.global_step}: the held-out loss is {loss}",
                why=f"rows of its first such batches: {', '.join(bad[:8]) or 'not of this rank'}",
                fix="lower train.learning_rate; the same command continues from the checkpoint",
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.best_metric is None or loss < self.state.best_metric:
            processes.from_rank0(lambda: self._write_best(loss))
        self.model.train()
        return metrics

    def resume(self, checkpoint: Path, total: int) -> None:
        """Train on from a checkpoint until `total` updates; restores what transformers does not."""
        resume = read_json(checkpoint / RESUME)
        self.losses.last.extend(resume["losses"])
        self._earlier_s = resume["seconds"]
        self._restore_best(checkpoint)
        if checkpoints.step_of(checkpoint) < total:
            self.add_callback(_Resumed(self, resume))
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        # transformers would make one update more where `max_steps` ends inside an epoch.
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        if resume["pending_evaluation"]:
            self.evaluate_late()

    def evaluate_late(self) -> None:
        """Make up for an evaluation that a stop cut short."""
        self._determine_best_metric(self.evaluate(), trial=None)

    def seconds(self) -> float:
        """Wall time of the updates that count: until the checkpoint resumed from, and since."""
        return self._earlier_s + time.monotonic() - self._start

    def checkpoint_bytes(self) -> int:
        """Upper bound of a checkpoint: adapter and best one, two fp32 moments a parameter."""
        moments = sum(2 * 4 * p.numel() for p in self.trainable())
        return 2 * self.adapter_bytes() + moments + SMALL_FILES

    def adapter_bytes(self) -> int:
        """Bytes of the adapter's weights."""
        return sum(p.numel() * p.element_size() for p in self.trainable())

    def tokens_of_step(self, step: int) -> tuple[int, int]:
        """Useful and laid-out tokens of an update, counted from 0 over the whole run."""
        micro = [self.train_dataset.lengths[batch].tolist() for batch in self.order.step(step)]
        laid = sum(self.data_collator.padded_tokens(batch) for batch in micro)
        return sum(map(sum, micro)), laid

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def _write_best(self, loss: float) -> None:
        with (
            space_for(self.best, self.adapter_bytes() + SMALL_FILES),
            self._staged_best() as staging,
        ):
            self._save_adapter(staging)
            facts = {"step": self.state.global_step, "eval_loss": loss}
            write_json(staging / BEST, {**facts, "sha256": sha256_file(staging / ADAPTER)})

    @contextmanager
    def _staged_best(self) -> Iterator[Path]:
        """A new `best/`; only a kill between two renames leaves neither it nor the old one."""
        old = self.best.with_name(f".{self.best.name}.old")
        shutil.rmtree(old, ignore_errors=True)

        def free() -> None:
            if self.best.exists():
                self.best.rename(old)

        with staged_folder(self.best, free=free) as staging:
            yield staging
        shutil.rmtree(old, ignore_errors=True)

    def _restore_best(self, checkpoint: Path) -> None:
        """Take the best adapter back to the checkpoint: `best/` may be of updates now undone."""
        if not (checkpoint / BEST).exists() or not self.args.should_save:
            return
        facts, now = read_json(checkpoint / BEST), self.best / ADAPTER
        if now.exists() and sha256_file(now) == facts["sha256"]:
            return
        with self._staged_best() as staging:
            copy_file(checkpoint / BEST_ADAPTER, staging / ADAPTER)
            for name in (BEST, "adapter_config.json"):
                copy_file(checkpoint / name, staging / name)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save whole (checkpoints.py)."""
        self._save_whole(pending_evaluation=False)

    def _save_whole(self, *, pending_evaluation: bool) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        self.store_flos()  # gathers, so every rank has to
        generators = processes.files_of_all(self._save_rng_state)

        def save() -> None:
            with space_for(folder, self.checkpoint_bytes()):
                checkpoints.save(
                    folder, step, lambda to: self._fill(to, pending_evaluation, generators)
                )
            checkpoints.rotate(folder, self.args.save_total_limit, step)

        processes.from_rank0(save)  # the others wait for it

    def _save_adapter(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)

    def _fill(self, staging: Path, pending_evaluation: bool, generators: dict[str, bytes]) -> None:
        self._save_adapter(staging)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        for name, state in generators.items():
            write_bytes(staging / name, state)
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        self.state.save_to_json(str(staging / "trainer_state.json"))
        # transformers writes NaN where a number is not finite; that is not JSON.
        json.loads((staging / "trainer_state.json").read_text(), parse_constant=_refuse_constant)
        if self.state.best_metric is not None:
            # A second name of the same file where the volume has such; `best/` is never edited.
            _link(self.best / ADAPTER, staging / BEST_ADAPTER)
            copy_file(self.best / BEST, staging / BEST)
        logged = [float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged]
        facts = {
            "pending_evaluation": pending_evaluation,
            "consumed_sha256": self.order.consumed_sha256(self.state.global_step),
            "since": self.order.since,
            "logged": logged,
            "losses": list(self.losses.last),
            "seconds": round(self.seconds(), 3),
            "processes": self.args.world_size,
            "fingerprint_sha256": self.fingerprint_sha256,
        }
        write_json(staging / RESUME, facts)


class _StopAtStep(TrainerCallback):  # type: ignore[misc]
    """Turns a stop request into a save and an end at the step's boundary.

    Where an evaluation is due at this step, it meets the request first and saves itself. The last
    step is always evaluated, else its weights could never be the best, and a short run had none.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if processes.stop_asked(self._stop):
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class _Resumed(TrainerCallback):  # type: ignore[misc]
    """Between loading a checkpoint and the first update: sums of the log, a missed evaluation."""

    def __init__(self, trainer: LoraTrainer, resume: dict[str, Any]) -> None:
        self._trainer, self._resume = trainer, resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        unlogged, logged, step = self._resume["logged"]
        trainer._tr_loss.fill_(unlogged)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = logged, step
        if self._resume["fingerprint_sha256"] != trainer.fingerprint_sha256:
            state.compute_steps(args, state.max_steps)
            _take_new_rates(trainer.optimizer, trainer.lr_scheduler, trainer.args.weight_decay)
        if self._resume["pending_evaluation"]:
            trainer.evaluate_late()


def _take_new_rates(optimizer: Any, schedule: Any, weight_decay: float) -> None:
    """After accepted changes: a restored optimizer and scheduler have their old settings.

    What the optimizer was made with it keeps as `defaults`; its first group is the decayed one.
    """
    rule = getattr(schedule, "scheduler", schedule)  # inside accelerate's wrapper
    rule.base_lrs = [optimizer.defaults["lr"]] * len(optimizer.param_groups)
    shape = [rate(rule.last_epoch) for rate in getattr(rule, "lr_lambdas", ())]  # none: a plateau
    rates = [part * optimizer.defaults["lr"] for part in shape or [1.0] * len(rule.base_lrs)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        kept = {"weight_decay": group["weight_decay"]}
        group |= {key: value for key, value in optimizer.defaults.items() if key in group} | kept
        group |= {"lr": rate, "initial_lr": optimizer.defaults["lr"]}
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    rule._last_lr = rates


def _refuse_constant(name: str) -> float:
    raise NotFinite(f"the state to be saved holds {name}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a volume without links
        copy_file(source, target)
