"""transformers' Trainer with our order of rows, loss, evaluation and checkpoints; nothing else.

Overridden (tests/test_train_trainer.py holds their signatures against the pinned transformers):

get_train_dataloader   the batch plan decides which rows share a step
compute_loss           padding-free, supervised positions only, divided by the whole step's tokens
_clip_grad_norm        stops before an update that is not finite
evaluate               exact token-weighted loss over the `select` rows; keeps the best adapter
_save_checkpoint       whole or not at all (checkpoints.py)
"""

import hashlib
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback

from fintune.batches import EpochPlan, Ints, plan_evaluation
from fintune.collate import Collator
from fintune.errors import NotFinite, Stopped
from fintune.files import read_json, staged_folder, write_json
from fintune.loss import sum_loss
from fintune.train import checkpoints
from fintune.train.rows import Rows

RESUME = "resume.json"
BEST = "best.json"


class Order:
    """Which examples each update of the run sees; made a whole epoch at a time."""

    def __init__(self, rows: Rows, plan: Callable[[int], EpochPlan]) -> None:
        self._rows, self._plan = rows, plan
        self._epochs: dict[int, EpochPlan] = {}
        self.steps_per_epoch = len(self.epoch(0).steps)

    def epoch(self, number: int) -> EpochPlan:
        """The plan of an epoch; the last two asked for are kept."""
        if number not in self._epochs:
            self._epochs = {key: self._epochs[key] for key in list(self._epochs)[-1:]}
            self._epochs[number] = self._plan(number)
        return self._epochs[number]

    def step(self, number: int) -> list[Ints]:
        """Micro-batches of an update, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self.epoch(epoch).steps[within]

    def example_ids(self, step: int) -> list[str]:
        """Ids of the examples of an update, micro-batch by micro-batch."""
        return [self._rows.ids[index] for batch in self.step(step) for index in batch]

    def consumed_sha256(self, steps: int) -> str:
        """Hash of the ids that the first `steps` updates consumed, in order."""
        digest = hashlib.sha256()
        for step in range(steps):
            digest.update("\n".join(self.example_ids(step)).encode() + b"\n")
        return digest.hexdigest()


class _RankBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch, in order. The Trainer calls `set_epoch`."""

    def __init__(self, order: Order, rank: int, world_size: int) -> None:
        self._order, self._rank, self._world_size = order, rank, world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def _batches(self) -> list[Ints]:
        steps = self._order.epoch(self._epoch).rank(self._rank, self._world_size)
        return [batch for step in steps for batch in step]

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self._batches()])


class _Loader(DataLoader[Any]):
    """A DataLoader that hands the epoch to its batch sampler, as accelerate's own do."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, _RankBatches)
        self.batch_sampler.set_epoch(epoch)


class StopRequest:
    """Whether SIGTERM or SIGINT asked to stop. The first is noted, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped(
                "stopped at once, without saving",
                fix="the same command continues from the last checkpoint",
            )
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listen while the block runs; only the main thread may (signal's own rule)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class LoraTrainer(Trainer):  # type: ignore[misc]
    """See the module's docstring.

    Args:
        order: the batch plan.
        select: rows of the evaluation that chooses the best adapter.
        eval_tokens: most tokens of an evaluation batch.
        best: folder of the best adapter.
        stop: set from outside when the run should end at the next step.
        sealed: facts of the run, written into each checkpoint and compared on resume.
    """

    def __init__(
        self,
        *,
        order: Order,
        select: Rows,
        eval_tokens: int,
        best: Path,
        stop: StopRequest,
        sealed: dict[str, Any],
        collator: Collator,
        **keywords: Any,
    ) -> None:
        super().__init__(data_collator=collator, **keywords)
        # Our loss is divided by the whole step's supervised tokens, and its labels come shifted.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False
        self.order, self.select, self.best, self.stop = order, select, best, stop
        self._sealed = sealed
        self._eval_batches = plan_evaluation(select.lengths, eval_tokens)
        # On a CPU all evaluation batches take one size, see CPU_MULTIPLE.
        fill = eval_tokens if collator.multiple > 1 else 1
        self._eval_collator = replace(collator, multiple=fill)
        self.add_callback(_StopAtStep(stop))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches as planned, this rank's share; the device move is the Trainer's."""
        sampler = _RankBatches(self.order, self.args.process_index, self.args.world_size)
        return _Loader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss over supervised tokens."""
        total, count = sum_loss(model, inputs)
        # DDP averages gradients over processes, so the sum over them needs the factor back.
        loss = total * self.accelerator.num_processes / (num_items_in_batch or count)
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; a norm that is not finite stops the run before it reaches the weights.

        A loss that is not finite has a gradient that is not, so one check a step sees both.
        """
        norm = super()._clip_grad_norm(model)
        value = float(norm)
        # fp16: the scaler skips such an update and lowers its scale; that is its job.
        if not math.isfinite(value) and self.accelerator.scaler is None:
            step = self.state.global_step
            ids = self.order.example_ids(step)
            raise NotFinite(
                f"step {step + 1}: the gradient norm is {value}; the update was not made",
                why=f"rows of the step: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}",
                fix="look at them (fintune inspect); lower train.learning_rate; the last checkpoint"
                " is good and the same command continues from it",
            )
        return norm

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over the supervised tokens of the `select` rows; keeps the best adapter.

        Raises:
            Stopped: a stop was asked for; a checkpoint that repeats this evaluation is saved.
            NotFinite: the loss is not finite.
        """
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for number, batch in enumerate(self._eval_batches):
            if self.stop.asked:
                self._save_whole(pending_evaluation=True)
                raise Stopped("stopped during an evaluation", fix="the same command continues")
            if number % self.args.world_size != self.args.process_index:
                continue
            inputs = self._prepare_inputs(self._eval_collator([self.select[i] for i in batch]))
            with self.compute_loss_context_manager():
                total, count = sum_loss(self.model, inputs)
            sums += torch.tensor([float(total), count], dtype=torch.float64, device=sums.device)
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            raise NotFinite(
                f"step {self.state.global_step}: the held-out loss is {loss}",
                fix="lower train.learning_rate; the same command continues from the checkpoint",
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.best_metric is None or loss < self.state.best_metric:
            self._keep_best(loss)
        self.model.train()
        return metrics

    def resume(self, checkpoint: Path) -> None:
        """Train on from a checkpoint; an evaluation that a stop cut short is made up for first."""
        if read_json(checkpoint / RESUME)["pending_evaluation"]:
            self.add_callback(_EvaluateFirst(self))
        self.train(resume_from_checkpoint=str(checkpoint))

    def _keep_best(self, loss: float) -> None:
        if not self.args.should_save:
            return
        doomed = self.best.with_name(".old-best")
        shutil.rmtree(doomed, ignore_errors=True)
        if self.best.exists():
            self.best.rename(doomed)
        with staged_folder(self.best) as staging:
            self.accelerator.unwrap_model(self.model).save_pretrained(staging)
            (staging / "README.md").unlink(missing_ok=True)
            write_json(staging / BEST, {"step": self.state.global_step, "eval_loss": loss})
        shutil.rmtree(doomed, ignore_errors=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save whole (checkpoints.py)."""
        self._save_whole(pending_evaluation=False)

    def _save_whole(self, *, pending_evaluation: bool) -> None:
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            checkpoints.save(
                folder,
                self.state.global_step,
                lambda staging: self._fill(staging, pending_evaluation),
            )
            checkpoints.rotate(folder, self.args.save_total_limit)
        if self.args.world_size > 1:
            dist.barrier()

    def _fill(self, staging: Path, pending_evaluation: bool) -> None:
        self.store_flos()
        self.accelerator.unwrap_model(self.model).save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        self.state.save_to_json(str(staging / "trainer_state.json"))
        # transformers writes NaN where a number is not finite; that is not JSON.
        json.loads((staging / "trainer_state.json").read_text(), parse_constant=_refuse_constant)
        step = self.state.global_step
        facts = {**self._sealed, "consumed_sha256": self.order.consumed_sha256(step)}
        write_json(staging / RESUME, {"pending_evaluation": pending_evaluation, **facts})


class _StopAtStep(TrainerCallback):  # type: ignore[misc]
    """Turns a stop request into a save and an end at the step's boundary.

    Where an evaluation is due at this step, it meets the request first and saves itself.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.asked:
            control.should_save = control.should_training_stop = True


class _EvaluateFirst(TrainerCallback):  # type: ignore[misc]
    """An evaluation between loading a checkpoint and the first update."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._determine_best_metric(self._trainer.evaluate(), trial=None)


def _refuse_constant(name: str) -> float:
    raise NotFinite(f"the state to be saved holds {name}")
