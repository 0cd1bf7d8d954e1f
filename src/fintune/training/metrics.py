"""`metrics.jsonl` (a line a logged step or evaluation), the progress line, the curves."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from fintune.console import Meter
from fintune.files import JsonlLog, read_jsonl, write_jsonl
from fintune.training.memory import in_use, trim_heap
from fintune.training.rows import Order

PANELS = ("loss", "learning_rate", "grad_norm", "useful_tokens_per_second")


def open_metrics(path: Path, resume: dict[str, Any]) -> JsonlLog:
    """The file, cut back to a checkpoint; its lines are on disk when it is closed.

    Args:
        resume: of `RunState.newest_checkpoint`; lines after it are dropped and will come again, and
            so will an evaluation of its step that was cut short.
    """
    with JsonlLog(path) as log:
        rows = log.rows()
    step, again = resume.get("step", 0), resume.get("pending_evaluation", False)
    write_jsonl(path, (row for row in rows if row["step"] + (again and "eval_loss" in row) <= step))
    return JsonlLog(path)


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's steps and logs into lines of metrics and progress."""

    def __init__(self, metrics: JsonlLog, progress: Meter, order: Order) -> None:
        self._metrics, self._progress, self._order = metrics, progress, order
        # Since the last logged step: tokens, padded tokens, seconds.
        self._totals = np.zeros(3)
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step; evaluation and saving are not part of it."""
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step's tokens and seconds."""
        seconds = time.monotonic() - self._start
        self._totals += (*self._order.tokens(self._order.step(state.global_step - 1)), seconds)
        self._progress.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Write a line; the Trainer's final summary, which is of no step, is left out."""
        if "eval_loss" in logs:
            self._metrics.append({"step": state.global_step, "epoch": state.epoch, **logs})
            self._progress.advance(0, note=f"validation loss {logs['eval_loss']:.3f}")
        elif "loss" in logs:
            tokens, padded, seconds = self._totals.tolist()
            row = {
                "step": state.global_step,
                "epoch": round(state.epoch, 4),
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": float(logs["grad_norm"]),
                "useful_tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
                "padding": round(1 - tokens / max(padded, 1), 4),
                "memory_bytes": in_use(kwargs["model"].device),
            }
            self._metrics.append(row)
            rate = f"{row['useful_tokens_per_second']:,.0f} tokens/s"
            memory = f"{row['memory_bytes'] / 1e9:.1f} GB"
            self._progress.advance(0, note=f"loss {row['loss']:.3f}  {rate}  {memory}")
            self._totals[:] = 0
            trim_heap()


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw train and validation loss, learning rate, gradient norm and tokens/s over steps."""
    from matplotlib.figure import Figure

    rows = list(read_jsonl(metrics))
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, key in zip(axes.flat, PANELS, strict=True):
        for name, style in ((key, "-"), ("eval_loss", "o-"))[: 2 if key == "loss" else 1]:
            points = [(row["step"], row[name]) for row in rows if name in row]
            label = "validation" if name == "eval_loss" else "train"
            axis.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axis.set_title(key.replace("_", " "), loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    # No software name in the file, so that equal metrics give equal bytes.
    figure.savefig(picture, dpi=110, metadata={"Software": None})
