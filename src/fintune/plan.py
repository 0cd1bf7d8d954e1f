"""`fintune plan`: what a run takes and where it fits, before anything is rented.

Exact are the counts: trainable parameters, steps, sizes of files. Memory and time are estimates
with bands that come from measured CPU runs (bench/plan.py).
"""

import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fintune import console
from fintune.config import Config
from fintune.errors import ConfigError
from fintune.planning import estimate, rows, shapes
from fintune.planning.estimate import Setting
from fintune.planning.machines import CONTEXT_BYTES, GPUS, PEAK_SHARE, Gpu
from fintune.planning.shapes import Shape

MEMORY_BAND = 0.10
"""Twice the largest error of six CPU runs (bench/plan.py): they also fitted three constants."""
EVALUATION_WARNING = 0.10
"""Share of the run spent on evaluation above which it is said."""
QUANTIZATIONS = ("none", "8bit", "4bit")


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting on a GPU: bytes at the peak, hours at the expected share of its peak."""

    setting: Setting
    accumulation: int
    bytes: int
    hours: float
    hours_range: tuple[float, float]


def plan(
    config: Config,
    *,
    row_count: int | None = None,
    mean_tokens: int | None = None,
    rates: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What the run of a config takes.

    Args:
        row_count, mean_tokens: instead of the prepared data's; assumed where there is none.
        rates: price of an hour in USD, by the name of a GPU.

    Returns:
        `base`, `adapter`, `work`, `settings` (peak memory by quantisation and checkpointing),
        `gpus` (the fastest setting that fits, hours, price), `notes`.
    """
    shape = shapes.find_shape(config.model)
    found = rows.lengths(config, row_count, mean_tokens)
    own = rows.plan_batches(config, found.train, config.train.micro_batch_size)
    whole = rows.work(config, found, own)
    checkpointing = config.train.activation_checkpointing == "on"
    train = estimate.train_flops(shape, config.train.lora, whole, checkpointing=checkpointing)
    evaluation = estimate.eval_flops(shape, config.train.lora, whole)
    share = evaluation / (train + evaluation)
    settings = [
        _described(shape, config, _setting(found, own, quantization, on))
        for quantization in QUANTIZATIONS
        for on in (False, True)
    ]
    smaller = [own]
    while smaller[-1].micro_batch > 1:
        size = smaller[-1].micro_batch // 2
        smaller.append(rows.plan_batches(config, found.train, size))
    gpus = [_on_gpu(gpu, shape, config, found, smaller, rates or {}) for gpu in GPUS]
    priced = [gpu for gpu in gpus if gpu["fits"] and gpu["usd"] is not None]
    cheapest = min(priced, key=lambda gpu: float(gpu["usd"]), default=None)
    return {
        "base": {"id": config.model.id, "parameters": shape.parameters, **asdict(shape)},
        "adapter": files(shape, config),
        "work": {
            "rows": len(found.train),
            "assumed_lengths": found.assumed,
            "mean_tokens": round(float(found.train.mean()), 1),
            "supervised_share": round(found.supervised, 3),
            "examples_an_update": own.micro_batch * own.accumulation,
            "largest_micro_batch": own.largest,
            "updates": own.updates,
            "trained_tokens": round(whole.tokens),
            "evaluations": whole.evaluations,
            "rows_an_evaluation": len(found.select),
            "train_flops": train,
            "evaluation_flops": evaluation,
            "evaluation_share": round(share, 4),
        },
        "settings": settings,
        "memory_band": MEMORY_BAND,
        "gpus": gpus,
        "cheapest": cheapest and cheapest["gpu"],
        "notes": _notes(found, share) + _choice(cheapest),
    }


def files(shape: Shape, config: Config) -> dict[str, Any]:
    """Trainable parameters and sizes of files, exact; an 8-bit optimiser's states about."""
    tensors = shape.adapter_tensors(config.train.lora)
    trained = shape.trainable(config.train.lora)
    adapter = shapes.safetensors_bytes(tensors)
    exact = config.train.optimizer.startswith("adamw_torch")
    states = (
        optimizer_bytes(list(tensors.values())) if exact else round(trained * 2 * (1 + 4 / 256))
    )
    return {
        "trainable_parameters": trained,
        "share_of_base": trained / shape.parameters,
        "adapter_model.safetensors": adapter,
        "optimizer.pt": states,
        "optimizer_exact": exact,
        "checkpoint": adapter + states,
    }


def optimizer_bytes(tensors: list[tuple[int, int]]) -> int:
    """Size of optimizer.pt of AdamW over these tensors: torch writes it, as holes without data."""
    decayed = [torch.nn.Parameter(torch.empty(1)) for _ in tensors]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": []}]  # as the Trainer makes
    optimizer = torch.optim.AdamW(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # as a schedule leaves it
        group["betas"] = (*group["betas"][:1], group["betas"][1])  # a copy each, as accelerate's
    state = optimizer.state_dict()
    state["state"] = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.empty(s), "exp_avg_sq": torch.empty(s)}
        for number, s in enumerate(tensors)
    }
    with tempfile.TemporaryDirectory() as folder, torch.serialization.skip_data():
        path = Path(folder) / "optimizer.pt"  # the name is in the file, and shifts its alignment
        torch.save(state, path)
        return os.path.getsize(path)


def _setting(
    found: rows.Lengths, plan: rows.Batches, quantization: str, checkpointing: bool
) -> Setting:
    counted = round(plan.largest * found.supervised)
    return Setting(quantization, checkpointing, plan.micro_batch, plan.largest, counted)


def _described(shape: Shape, config: Config, setting: Setting) -> dict[str, Any]:
    parts = estimate.memory(shape, config.train.lora, config.train.optimizer, setting)
    return {
        "quantization": setting.quantization,
        "activation_checkpointing": setting.checkpointing,
        "memory": {**parts, "process": CONTEXT_BYTES},
        "peak": estimate.peak(parts) + CONTEXT_BYTES,
        "configured": setting.quantization == config.model.quantization
        and config.train.activation_checkpointing
        in ("auto", "on" if setting.checkpointing else "off"),
    }


def _on_gpu(
    gpu: Gpu,
    shape: Shape,
    config: Config,
    found: rows.Lengths,
    plans: list[rows.Batches],
    rates: dict[str, float],
) -> dict[str, Any]:
    """The fastest setting that fits a GPU, with the largest micro-batch that does."""
    facts: dict[str, Any] = {"gpu": gpu.name, "gib": gpu.gib, "tflops": gpu.tflops}
    if gpu.missing:
        return {**facts, "fits": False, "why": gpu.missing}
    fitting = [
        choice
        for quantization in (QUANTIZATIONS if config.train.strategy != "fsdp" else ("none",))
        for on in (False, True)
        if (choice := _largest_that_fits(gpu, shape, config, found, plans, quantization, on))
    ]
    if not fitting:
        return {**facts, "fits": False, "why": "too little memory for one row at a time"}
    best = min(fitting, key=lambda choice: choice.hours)
    usd = rates.get(gpu.name)
    return {
        **facts,
        "fits": True,
        "set": {
            "model.quantization": best.setting.quantization,
            "train.activation_checkpointing": "on" if best.setting.checkpointing else "off",
            "train.micro_batch_size": best.setting.micro_batch,
            "train.accumulation": best.accumulation,
        },
        "peak": best.bytes,
        "hours": best.hours,
        "hours_range": best.hours_range,
        "usd": None if usd is None else usd * best.hours,
    }


def _largest_that_fits(
    gpu: Gpu,
    shape: Shape,
    config: Config,
    found: rows.Lengths,
    plans: list[rows.Batches],
    quantization: str,
    checkpointing: bool,
) -> Choice | None:
    for plan in plans:
        setting = _setting(found, plan, quantization, checkpointing)
        parts = estimate.memory(shape, config.train.lora, config.train.optimizer, setting)
        total = estimate.peak(parts) + CONTEXT_BYTES
        if total * (1 + MEMORY_BAND) > gpu.usable:
            continue
        work = rows.work(config, found, plan)
        flops = estimate.train_flops(shape, config.train.lora, work, checkpointing=checkpointing)
        flops += estimate.eval_flops(shape, config.train.lora, work)
        unpacking = estimate.unpacking_bytes(shape, setting, work) / (gpu.gb_per_s * 1e9)
        # However few tokens a pass has, it reads all weights.
        reading = plan.passes * (3 if checkpointing else 2) * parts["weights"]
        slow, usual, fast = (
            (max(flops / (gpu.tflops * 1e12 * share), reading / (gpu.gb_per_s * 1e9)) + unpacking)
            / 3600
            for share in PEAK_SHARE
        )
        return Choice(setting, plan.accumulation, total, usual, (fast, slow))
    return None


def _choice(cheapest: dict[str, Any] | None) -> list[str]:
    if cheapest is None:
        return ["give prices for the cheapest: --rate L4=0.80 --rate H100=2.99"]
    settings = " ".join(f"-s {key}={value}" for key, value in cheapest["set"].items())
    return [f"cheapest: {cheapest['gpu']}, {cheapest['usd']:.2f} USD, with {settings}"]


def _notes(found: rows.Lengths, share: float) -> list[str]:
    least, usual, most = PEAK_SHARE
    notes = [
        f"one GPU, one process; memory +-{MEMORY_BAND:.0%}, as measured on CPU runs"
        f" (bench/plan.py): a GPU was never measured, and its time assumes {usual:.0%} of the dense"
        f" bf16 peak, the range {least:.0%} to {most:.0%}"
    ]
    if found.assumed:
        notes.append(
            f"lengths are assumed (log-normal, mean {found.train.mean():.0f} tokens,"
            f" {found.supervised:.0%} of them trained on): prepare the data for its own"
        )
    if share > EVALUATION_WARNING:
        notes.append(
            f"{share:.0%} of the run is evaluation: raise train.eval_steps or lower train.eval_rows"
        )
    return notes


def read_rates(given: list[str]) -> dict[str, float]:
    """`GPU=USD` as given on the command line.

    Raises:
        ConfigError: no such GPU, or no number.
    """
    names = {gpu.name.lower(): gpu.name for gpu in GPUS}
    rates = {}
    for text in given:
        name, _, usd = text.partition("=")
        try:
            rates[names[name.strip().lower()]] = float(usd)
            if not 0 <= float(usd) < math.inf:
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"--rate {text}", fix=f"GPU=USD_PER_HOUR, of {', '.join(names.values())}"
            ) from None
    return rates


def show(found: dict[str, Any]) -> None:
    """The plan as tables of at most 80 columns."""
    base, work, adapter = found["base"], found["work"], found["adapter"]
    about = "" if adapter["optimizer_exact"] else "about "
    scale, unit = (1e9, "B") if base["parameters"] >= 1e9 else (1e6, "M")
    facts = {
        "base": f"{base['id']}, {base['parameters'] / scale:.2f} {unit} parameters",
        "trained": f"{adapter['trainable_parameters']:,} ({adapter['share_of_base']:.2%})",
        "adapter file": f"{adapter['adapter_model.safetensors']:,} bytes",
        "checkpoint": f"{about}{_gb(adapter['checkpoint'])}: adapter and optimizer",
        "rows": f"{work['rows']:,}, {work['mean_tokens']:.0f} tokens on average",
        "updates": f"{work['updates']:,} of {work['examples_an_update']} rows,"
        f" {work['trained_tokens'] / 1e6:,.1f} M tokens",
        "evaluations": f"{work['evaluations']} of {work['rows_an_evaluation']:,} rows,"
        f" {work['evaluation_share']:.0%} of the run",
    }
    console.table(f"plan of {base['id'].rsplit('/')[-1]}", ["what", "value"], facts.items())
    rows = []
    for setting in found["settings"]:
        parts = setting["memory"]
        rows.append(
            (
                ("* " if setting["configured"] else "  ") + setting["quantization"],
                "recomputed" if setting["activation_checkpointing"] else "kept",
                *(_gb(parts[name]) for name in ("weights", "activations", "logits")),
                _gb(parts["adapter"] + parts["gradients"] + parts["optimizer"]),
                _gb(setting["peak"]),
            )
        )
    columns = ["base", "activations", "weights", "kept", "logits", "adapter", "peak"]
    title = f"memory, micro-batches of up to {work['largest_micro_batch']:,} tokens (*: configured)"
    console.table(title, columns, rows)
    console.table(
        "where it fits, on one GPU",
        ["GPU", "fastest setting that fits", "peak", "hours", "USD"],
        map(_gpu_row, found["gpus"]),
    )
    if here := found.get("this_machine"):
        console.result(
            f"{here['device']}, {here['precision']}: {here['hours']:.2f} hours"
            f" +-{here['time_band']:.0%}, peak {_gb(here['peak'])} +-{here['memory_band']:.0%};"
            f" {here['share_of_matrix_rate']:.0%} of its matrix rate"
            f" ({here['matrix_flops'] / 1e12:.2f} TFLOP/s)"
        )
    for note in found["notes"]:
        console.warn(note)


def _gpu_row(row: dict[str, Any]) -> tuple[str, ...]:
    name = f"{row['gpu']} ({row['gib']} GB)" if "GB" not in row["gpu"] else row["gpu"]
    if not row["fits"]:
        return name, f"no: {row['why']}", "", "", ""
    settings = row["set"]
    words = [
        {"none": "bf16"}.get(settings["model.quantization"], settings["model.quantization"]),
        "recomputed" if settings["train.activation_checkpointing"] == "on" else "kept",
        f"{settings['train.micro_batch_size']} x {settings['train.accumulation']}",
    ]
    least, most = row["hours_range"]
    price = "" if row["usd"] is None else f"{row['usd']:.2f}"
    return name, ", ".join(words), _gb(row["peak"]), f"{_hours(least)}-{_hours(most)}", price


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2g}"


def _gb(size: float) -> str:
    if size < 0.95e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB" if size < 99.95e9 else f"{size / 1e9:.0f} GB"
