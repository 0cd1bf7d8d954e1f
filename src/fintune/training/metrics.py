"""`metrics.jsonl` (a line a logged step or evaluation), the progress line, the curves, the facts of
a finished run."""

import ctypes
import os
import platform
import re
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from fintune.config import Config
from fintune.errors import ConfigError
from fintune.files import JsonlLog, read_jsonl, write_jsonl
from fintune.model import device
from fintune.training.distributed import world_size
from fintune.training.memory import in_use, peak_in_use
from fintune.training.run_state import PACKAGES, RunState

LINES = 20
"""Lines of steps that a run of at least as many has, though `train.logging_steps` be longer."""
PANELS = ("loss", "learning_rate", "grad_norm", "useful_tokens_per_second")


def open_metrics(path: Path, step: int, again: bool) -> JsonlLog:
    """The file, cut back to a checkpoint; its lines are on disk when it is closed.

    Args:
        step: of the checkpoint; lines after it are dropped and will come again.
        again: and so will an evaluation of this step, which was cut short.
    """
    with JsonlLog(path) as log:
        rows = log.rows()
    write_jsonl(path, (row for row in rows if row["step"] + (again and "eval_loss" in row) <= step))
    return JsonlLog(path)


def check_trackers(config: Config) -> None:
    """Before any work: accelerate leaves out a tracker that is not installed, without a word.

    Raises:
        ConfigError: one of `train.report_to`.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    if absent := sorted({*config.train.report_to} - installed):
        what = f"train.report_to: {', '.join(absent)} not installed"
        raise ConfigError(what, fix=f"pip install {' '.join(absent)}")


def line_of_steps(state: RunState, rate: float, norm: float, spent: Any) -> dict[str, float]:
    """What is logged of the steps since the last line.

    Args:
        rate, norm: learning rate and gradient norm of the last step.
        spent: tokens, tokens with padding, and seconds of these steps, shape (3,).
    """
    at, (tokens, padded, seconds) = state.at, spent.tolist()
    loss, steps = at.loss, at.step - at.logged
    at.loss, at.logged = 0.0, at.step
    return {
        "loss": loss / steps,
        "learning_rate": rate,
        "grad_norm": norm,
        "useful_tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "padding": round(1 - tokens / max(padded, 1), 4),
        "memory_bytes": in_use(device()),
    }


def write_line(state: RunState, values: dict[str, float]) -> None:
    """A line of a step or an evaluation: to `metrics.jsonl`, the progress line, the trackers."""
    step, joules = state.at.step, state.energy.spent()
    if joules is not None:
        state.at.joules = (state.at.joules or 0) + round(joules, 1)
    state.accelerator.log(values, step=step)
    if state.metrics is None:  # another rank than 0
        return
    epoch = round(step / state.order.steps_per_epoch, 4)
    state.metrics.append({"step": step, "epoch": epoch, **values})
    if "eval_loss" in values:
        note = f"validation loss {values['eval_loss']:.3f}"
    else:
        rate = f"{values['useful_tokens_per_second']:,.0f} tokens/s"
        note = f"loss {values['loss']:.3f}  {rate}  {values['memory_bytes'] / 1e9:.1f} GB"
    state.bar.advance(0, note=note)


class EnergyMeter:
    """Joules that the machine counts: of CUDA devices by NVML, else of the processors by RAPL.

    Read at least every few minutes: a counter of RAPL begins again at `max_energy_range_uj`.
    """

    def __init__(self) -> None:
        self._last = self._read()

    def spent(self) -> float | None:
        """Joules of the whole machine since the last call; None where nothing counts them."""
        last, self._last = self._last, self._read()
        if not last:
            return None
        pairs = zip(last, self._last, strict=True)
        return sum((now - before) % most for (before, most), (now, _) in pairs) / 1e6

    def _read(self) -> list[tuple[int, int]]:
        """Each counter in microjoules, and where it begins again."""
        with suppress(OSError):
            if torch.cuda.is_available():
                return [(1_000 * _nvml_energy(n), 2**64) for n in range(torch.cuda.device_count())]
            names = sorted(Path("/sys/class/powercap").glob("intel-rapl:?"))
            return [
                (int((n / "energy_uj").read_text()), int((n / "max_energy_range_uj").read_text()))
                for n in names
            ]
        return []


def _nvml_energy(index: int) -> int:
    """Millijoules that a GPU has taken since its driver was loaded.

    Raises:
        OSError: no NVML, or a GPU older than Volta.
    """
    library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    energy = ctypes.c_ulonglong()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy))
    )
    if failed:
        raise OSError(f"NVML: error {failed}")
    return energy.value


def environment(state: RunState) -> dict[str, Any]:
    """Measured facts of a run that ends, for the card."""
    on, trained = device(), state.model.parameters()
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in (*PACKAGES, "accelerate")},
        "finished": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else platform.machine(),
        "processor": processor(),
        "processes": world_size(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": state.resolved["precision"],
        "seconds": round(state.seconds, 1),
        "peak_memory_bytes": peak_in_use(on),
        "energy_joules": state.at.joules,
        "steps": state.at.step,
        "trained_tokens": state.at.tokens,
        "trainable_parameters": sum(each.numel() for each in trained if each.requires_grad),
        **{k: state.resolved[k] for k in ("out_of_memory", "fallbacks", "without_adapter")},
        "accepted_changes": state.accepted,
    }


def processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    about = Path("/proc/cpuinfo")
    text = about.read_text(errors="replace") if about.is_file() else ""
    named = re.search(r"(?m)^model name\s*: (.+)", text)
    return named[1] if named else platform.processor() or platform.machine()


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
