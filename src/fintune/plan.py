"""What a run takes and where it fits, before a GPU is rented: `fintune plan`, `train --dry-run`.

The base is built on the meta device with its adapter: parameters are exact, and what autograd keeps
is counted (`fintune.memory`). Hours rest on an assumed share of a GPU's peak.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from fintune import attention, console, memory
from fintune.batches import Ints, plan_epoch
from fintune.config import Config
from fintune.errors import ConfigError, ModelError
from fintune.files import read_toml
from fintune.kernels import pointwise
from fintune.memory import ModelSize, step_memory
from fintune.model import device, find_base, peft_config, precision
from fintune.seal import DONE, read_data
from fintune.training import lora
from fintune.training.rows import read_train, read_validation
from fintune.training.trainer import training_arguments
from fintune.untrusted.probe import probe_base, read_architecture

DATA = read_toml(__file__, "plan.toml")
MEMORY_BAND = 0.10
"""Of the peak; assumed: what autograd keeps is counted, what an allocator adds is not."""
USABLE = 0.94
"""Share of a GPU's nominal memory that a process gets: the rest is ECC, driver, other contexts."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA context, cuBLAS workspaces and loaded kernels; assumed."""
PEAK_SHARE = (0.25, 0.40, 0.55)
"""Share of the dense bf16 peak that training is assumed to reach: least, expected, most. The range
covers what trainers publish for 7B-8B models on A100 and H100."""
HELD = ("weights", "activations", "working")
"""Parts of the memory that the table shows; adapter, gradients and optimizer are a few percent."""
EVALUATION_WARNING = 0.10
"""Share of the run spent on evaluation above which it is said."""
SIGMA = 0.9
"""Standard deviation of the logarithm of a length: 11,869 rows of finance instructions, Llama 3
tokens, template included."""
MEAN_TOKENS = 300
"""Their mean length, 291."""
LABEL_SHARE = 0.5
"""Share of tokens that the loss counts, where rows are not prepared; assumed."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every training row and of every row of an evaluation; share of label tokens."""

    train: Ints
    validation: Ints
    label_share: float
    assumed: bool


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
        Facts of a run on any device (`base`, `adapter`, `rows`, `batches`, `flops`, `notes`);
        `settings` (peak memory by quantization and checkpointing); `gpus` (a setting that fits,
        hours, price); `cheapest`.

    Raises:
        ModelError: no configuration of the base, or one whose memory cannot be counted.
    """
    found, size = lengths(config, row_count, mean_tokens), count(config)
    facts = _describe(config, found, size)
    settings = _settings(config, size, found.label_share, facts["batches"]["largest_micro_batch"])
    gpus = [_on_gpu(gpu, settings, facts["flops"], rates or {}) for gpu in DATA["gpu"]]
    priced = [gpu for gpu in gpus if gpu["usd"] is not None]
    cheapest = min(priced, key=lambda gpu: float(gpu["usd"]), default=None)
    if cheapest:
        chosen = " ".join(f"-s {key}={value}" for key, value in cheapest["set"].items())
        facts["notes"].append(f"cheapest: {cheapest['gpu']}, {cheapest['usd']:.2f} USD, {chosen}")
    return {
        **facts,
        "settings": settings,
        "memory_band": MEMORY_BAND,
        "gpus": gpus,
        "cheapest": cheapest and cheapest["gpu"],
    }


def dry_run(config: Config) -> dict[str, Any]:
    """What `train` would do, without loading weights.

    Returns:
        `training_arguments`, `lora_config`, and the facts of a run on any device (see `plan`).

    Raises:
        ModelError: as `plan`.
    """
    facts = _describe(config, lengths(config), count(config))
    on, name = device(), config.train.precision
    if on.type == "cuda":
        name = precision(name, on)
    elif name == "auto":
        name = "bf16"
        facts["notes"].append("no GPU here: settings are those for a GPU with bf16")
    checkpointing = config.train.gradient_checkpointing == "on"
    accumulation = config.train.gradient_accumulation_steps
    arguments = training_arguments(config, name, checkpointing, accumulation)
    return {
        "training_arguments": {**arguments.to_dict(), "use_cpu": False},
        "lora_config": {**config.train.lora.model_dump(mode="json"), "bias": "none"},
        **facts,
    }


def _describe(config: Config, found: Lengths, size: ModelSize) -> dict[str, Any]:
    """Facts of a run on any device."""
    train, mean = config.train, float(found.train.mean())
    epoch = plan_epoch(config, found.train)
    steps = len(epoch) * train.num_train_epochs
    steps = steps if train.max_steps < 0 else min(steps, train.max_steps)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    tokens = round(mean * min(steps * per_step, len(found.train) * train.num_train_epochs))
    evaluations = -(-steps // train.eval_steps)  # the last step is evaluated too
    # 2 a weight and token forward, 2 for the gradient of the activations, 2 for the adapter's
    # own. Attention's scores are left out: 1 % of an 8B base's at 300 tokens.
    block, head = 2 * (size.linear + size.trainable), 2 * size.head * found.label_share
    training = tokens * (2 * block + 2 * size.trainable + 2 * head)
    evaluation = evaluations * int(found.validation.sum()) * (block + head)
    notes = []
    if found.assumed:
        notes.append(f"lengths are assumed, {mean:.0f} tokens on average: prepare for the data's")
    if (share := evaluation / (training + evaluation)) > EVALUATION_WARNING:
        fix = "raise train.eval_steps or lower train.max_eval_samples"
        notes.append(f"{share:.0%} of the run is evaluation: {fix}")
    return {
        "base": {"id": config.model.id, "parameters": size.parameters},
        "adapter": {
            "trainable_parameters": size.trainable,
            "share_of_base": size.trainable / size.parameters,
        },
        "rows": {
            "rows": len(found.train),
            "mean_tokens": round(mean, 1),
            "label_share": round(found.label_share, 3),
            "tokens": tokens,
            "evaluations": evaluations,
            "rows_per_evaluation": len(found.validation),
        },
        "batches": {
            "steps": steps,
            "largest_micro_batch": max(int(found.train[b].sum()) for step in epoch for b in step),
            "estimated": found.assumed,
            "boundaries": list(train.bucket_boundaries or ()),
            "train_sampling_strategy": train.train_sampling_strategy,
            "examples_per_step": per_step,
        },
        "flops": {
            "training_flops": training,
            "recomputation_flops": float(tokens * block),
            "evaluation_flops": evaluation,
        },
        "notes": notes,
    }


def lengths(config: Config, rows: int | None = None, mean_tokens: int | None = None) -> Lengths:
    """Of the prepared data where there is some and nothing else was said, else assumed."""
    if rows is None and mean_tokens is None and (config.data_dir / DONE).is_file():
        read_data(config.data_dir)
        train = read_train(config.data_dir).lengths
        validation = read_validation(config.data_dir, config.train.max_eval_samples).lengths
        labels = pq.read_table(config.data_dir / "train.parquet", columns=["labels"])["labels"]
        counted = pc.sum(pc.greater_equal(pc.list_flatten(labels), 0)).as_py() or 0
        return Lengths(train, validation, counted / max(int(train.sum()), 1), assumed=False)
    mean, draw = mean_tokens or MEAN_TOKENS, np.random.default_rng(config.seed)
    evaluated = min(config.train.max_eval_samples, config.data.max_held_out_rows // 2)
    train, validation = (
        draw.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, count)
        .clip(16, config.data.max_length)
        .astype(np.int64)
        for count in (rows or config.data.max_train_rows, evaluated)
    )
    return Lengths(train, validation, LABEL_SHARE, assumed=True)


def count(config: Config, *, quantized: bool = False) -> ModelSize:
    """Build the base with its adapter on the meta device, and count.

    Args:
        quantized: as for a quantized base, whose LoRA arithmetic is peft's own. Its dropout masks
            count two bytes an element here and take one on CUDA: measured about 18 % too much.

    Raises:
        ModelError: no configuration of the base, or one whose memory cannot be counted.
    """
    name = config.model.id.rsplit("/", 1)[-1].lower()
    shape = DATA["base"].get(name.removeprefix("meta-").removesuffix("-instruct"))
    bundled = shape is not None and config.model.path is None
    folder = None if bundled else find_base(config.model, weights=False).folder
    if folder is not None:
        probe_base(folder, weights=True)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                read_architecture(folder) if folder else AutoConfig.for_model(**shape),
                dtype=torch.bfloat16,
                attn_implementation=attention.NAME,
            ).requires_grad_(False)
            model = get_peft_model(model, peft_config(config.train.lora), low_cpu_mem_usage=True)
            probes = [_batch(memory.PROBE_TOKENS), _batch(2 * memory.PROBE_TOKENS)]
        model.to(torch.bfloat16)  # as autocast computes
        pointwise.fuse(model)
        if not quantized:
            lora.fuse(model)
        return memory.model_size(model, probes, torch.bfloat16.itemsize)
    except (OSError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{config.model.id} cannot be planned: {str(error)[:200]}",
            why="its memory is counted in a forward pass of a model without data",
            fix="check train.lora.target_modules and the base's config.json",
        ) from None


def _batch(tokens: int) -> dict[str, Any]:
    """One flat sequence. The mask is never read (attention.attend has the boundaries); without it
    transformers would look for boundaries in the positions' values, which do not exist here."""
    ids = torch.empty(1, tokens, dtype=torch.long)
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
    ends = torch.empty(2, dtype=torch.int32)
    whole = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
    return {**whole, "cu_seq_lens_q": ends, "max_length_q": tokens}


def _settings(
    config: Config, plain: ModelSize, label_share: float, tokens: int
) -> list[dict[str, Any]]:
    """What may be chosen to make a run fit, the fastest first, and its memory.

    Args:
        tokens: of the largest micro-batch.
    """
    train, settings, sizes = config.train, [], {"none": plain}
    if train.strategy != "fsdp":
        sizes["8bit"] = sizes["4bit"] = count(config, quantized=True)
    configured = (config.model.quantization, train.gradient_checkpointing)
    for (kind, size), choice in itertools.product(sizes.items(), ("off", "on")):
        labels, on = round(tokens * label_share), choice == "on"
        parts = step_memory(size, train.optim, tokens, labels, kind, checkpointing=on)
        parts["process"] = CONTEXT_BYTES
        settings.append(
            {
                "quantization": kind,
                "gradient_checkpointing": choice,
                "configured": configured in ((kind, choice), (kind, "auto")),
                "memory": parts,
                "peak": memory.peak(parts),
            }
        )
    return settings


def _on_gpu(
    gpu: dict[str, Any],
    settings: list[dict[str, Any]],
    flops: dict[str, float],
    rates: dict[str, float],
) -> dict[str, Any]:
    """The first setting that fits a GPU, with its hours."""
    free = gpu["gib"] * 2**30 * USABLE / (1 + MEMORY_BAND)
    best = next((each for each in settings if each["peak"] <= free), None)
    facts = {"gpu": gpu["name"], "gib": gpu["gib"], "fits": best is not None, "usd": None}
    if best is None:
        return facts
    checkpointing = best["gradient_checkpointing"]
    total = flops["training_flops"] + flops["evaluation_flops"]
    total += flops["recomputation_flops"] * (checkpointing == "on")
    most, usual, least = (total / (gpu["tflops"] * 3.6e15 * share) for share in PEAK_SHARE)
    chosen = {"model.quantization": best["quantization"]}
    chosen["train.gradient_checkpointing"] = checkpointing
    facts |= {"set": chosen, "peak": best["peak"], "hours": usual, "hours_range": [least, most]}
    return facts | {"usd": rates[gpu["name"]] * usual if gpu["name"] in rates else None}


def read_rates(given: list[str]) -> dict[str, float]:
    """`GPU=USD` as given on the command line.

    Raises:
        ConfigError: no such GPU, or no number.
    """
    names = {gpu["name"].lower(): gpu["name"] for gpu in DATA["gpu"]}
    rates = {}
    for text in given:
        name, _, usd = text.partition("=")
        if name.strip().lower() not in names or not re.fullmatch(r"\d+(\.\d+)?", usd.strip()):
            fix = f"GPU=USD_PER_HOUR, of {', '.join(names.values())}"
            raise ConfigError(f"--rate {text}", fix=fix)
        rates[names[name.strip().lower()]] = float(usd)
    return rates


def show(found: dict[str, Any]) -> None:
    """The facts of a plan or of a dry run as tables of at most 80 columns."""
    parts = ("base", "adapter", "rows", "batches", "flops")
    facts = [item for part in parts for item in found[part].items()]
    cells = ([key.replace("_", " "), _shown(value)] for key, value in facts)
    console.table("the run", ["what", "value"], cells)
    if "settings" in found:
        title = f"memory in GB, +-{MEMORY_BAND:.0%} (*: configured)"
        columns = ["base", "checkpointing", *HELD, "peak"]
        console.table(title, columns, map(_setting_row, found["settings"]))
        columns = ["GPU", "base", "checkpointing", "peak", "hours", "USD"]
        console.table("one GPU, one process", columns, map(_gpu_row, found["gpus"]))
        share = f"{PEAK_SHARE[0]:.0%} to {PEAK_SHARE[2]:.0%}"
        console.warn(f"hours assume {share} of the bf16 peak; no GPU was measured")
    for note in found["notes"]:
        console.warn(note)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _setting_row(setting: dict[str, Any]) -> list[str]:
    mark = "* " if setting["configured"] else "  "
    sizes = [*(setting["memory"][name] for name in HELD), setting["peak"]]
    chosen = [mark + setting["quantization"], setting["gradient_checkpointing"]]
    return chosen + [f"{size / 1e9:.1f}" for size in sizes]


def _gpu_row(row: dict[str, Any]) -> list[str]:
    if not row["fits"]:
        return [row["gpu"], "does not fit", "", "", "", ""]
    hours = "-".join(f"{hours:.2g}" for hours in row["hours_range"])
    price = "" if row["usd"] is None else f"{row['usd']:.2f}"
    return [row["gpu"], *row["set"].values(), f"{row['peak'] / 1e9:.1f} GB", hours, price]
