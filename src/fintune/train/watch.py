"""What a run shows people: a progress line, the rows of `metrics.jsonl`, `curves.png`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from transformers import TrainerCallback

from fintune.console import Meter
from fintune.files import read_jsonl
from fintune.train.memory import give_back, in_use
from fintune.train.metrics import Metrics

matplotlib.use("Agg")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's logs into metrics, progress and, at the end, curves.

    Args:
        tokens_of_step: useful and laid-out tokens of an update, by its global step from 0.
    """

    def __init__(
        self, metrics: Metrics, meter: Meter, tokens_of_step: Callable[[int], tuple[int, int]]
    ) -> None:
        self._metrics, self._meter, self._tokens_of_step = metrics, meter, tokens_of_step
        self._useful = self._laid = 0
        self._seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of an update; evaluation and saving are not part of it."""
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an update's tokens and seconds."""
        self._seconds += time.monotonic() - self._start
        useful, laid = self._tokens_of_step(state.global_step - 1)
        self._useful, self._laid = self._useful + useful, self._laid + laid
        self._meter.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Write a line; the final summary of the Trainer has no step of its own and is left out."""
        if "eval_loss" in logs:
            self._metrics.append({"step": state.global_step, "epoch": state.epoch, **logs})
            self._meter.advance(0, note=f"held-out loss {logs['eval_loss']:.3f}")
        elif "loss" in logs:
            rate = self._useful / max(self._seconds, 1e-9)
            row = {
                "step": state.global_step,
                "epoch": round(state.epoch, 4),
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": float(logs["grad_norm"]),
                "useful_tokens_per_second": round(rate, 1),
                "padding": round(1 - self._useful / max(self._laid, 1), 4),
                "memory_bytes": in_use(kwargs["model"].device),
            }
            self._metrics.append(row)
            note = (
                f"loss {row['loss']:.3f}  lr {row['learning_rate']:.1e}  {rate:,.0f} tokens/s"
                f"  padding {row['padding']:.1%}  {row['memory_bytes'] / 1e9:.1f} GB"
            )
            self._meter.advance(0, note=note)
            self._useful = self._laid = 0
            self._seconds = 0.0
            give_back()


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw train and held-out loss, learning rate, gradient norm and tokens/s over steps."""
    from matplotlib import pyplot as plt

    rows = list(read_jsonl(metrics))
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    panels = (
        ("loss", "loss (nats a token)"),
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm, before clipping"),
        ("useful_tokens_per_second", "useful tokens / s"),
    )
    for axis, (key, title) in zip(axes.flat, panels, strict=True):
        x, y = [row["step"] for row in steps], [row[key] for row in steps]
        axis.plot(x, y, color="#4269d0", linewidth=1.4, label="train")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    if evaluations:
        x, y = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
        axes[0, 0].plot(x, y, color="#ff725c", marker="o", markersize=3, label="held out")
        best = min(evaluations, key=lambda row: row["eval_loss"])
        axes[0, 0].axvline(best["step"], color="#ff725c", alpha=0.4, linestyle=":", label="best")
        axes[0, 0].legend(frameon=False, fontsize=8)
    # No software name in the file, so that equal metrics give equal bytes.
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    plt.close(figure)
