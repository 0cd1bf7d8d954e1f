"""What `train` would do and take, and where it fits, before a GPU is rented: `fintune plan`.

The base is built on the meta device with its adapter: parameters are exact, and what autograd keeps
is counted (`training/memory.py`). Hours rest on an assumed share of a GPU's peak.
"""

import itertools
import math
import time
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, TrainingArguments

from fintune import attention, console, cpu
from fintune.batches import Ints, plan_epoch
from fintune.config import Config
from fintune.data.split import share_of_test
from fintune.errors import failing
from fintune.evals.outlook import outlook, tell
from fintune.files import read_toml
from fintune.model import DTYPES, attach, find_base, precision
from fintune.model import device as here
from fintune.seal import DONE, read_data
from fintune.sources import rows_on_disk
from fintune.targets import Targets, find_targets
from fintune.training import lora, memory, pointwise
from fintune.training.arguments import training_arguments
from fintune.training.memory import ModelSize, step_memory
from fintune.training.rows import read_train, read_validation
from fintune.untrusted.probe import model_class, probe_base, read_architecture

Facts = dict[str, Any]
DATA = read_toml(__file__, "plan.toml")
MEMORY_BAND = 0.10
"""Of the peak; assumed: what autograd keeps is counted, what an allocator adds is not."""
USABLE = 0.94
"""Share of a GPU's nominal memory that a process gets: the rest is ECC, driver, other contexts."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA context, cuBLAS workspaces and loaded kernels; assumed."""
PEAK_SHARE = (0.25, 0.55)
"""Share of the dense bf16 peak that training is assumed to reach: least and most. The range covers
what trainers publish for 7B-8B models on A100 and H100."""
HERE_SHARE = (0.4, 0.9)
"""Share that training reaches of the rate of a product timed on this machine: 63 % in bf16 and 83 %
in fp32, SmolLM2-135M on two cores of an AMD EPYC."""
TIMED = 1024
"""Rows and columns of that product."""
UNITS = (("h", 1), ("min", 60), ("s", 3600))
HELD = ("weights", "activations", "working")
"""Parts of the memory that the table shows; adapter, gradients and optimizer are a few percent."""
EVALUATION_WARNING = 0.10
"""Share of the run spent on evaluation above which it is said."""
MEAN_TOKENS, SIGMA, LABEL_SHARE = 300, 0.9, 0.5
"""Assumed where no rows are prepared: mean of the lengths and standard deviation of their logarithm
(11,869 rows of finance instructions, Llama 3 tokens, template included: 291, 0.9); share of tokens
that the loss counts."""


def plan(config: Config) -> Facts:
    """What the run of a config does and takes; loads no weights.

    Returns:
        `training_arguments` (on a GPU with bf16) and `lora_config`; facts of a run on any device
        (`base`, `adapter`, `rows`, `batches`, `flops`, `notes`); `settings` (peak memory by
        quantization and checkpointing); `gpus` (a setting that fits, hours); `machine` (hours here,
        from a product of matrices that is timed).

    Raises:
        ModelError: no configuration of the base, or one whose memory cannot be counted.
    """
    train, (sizes, targets) = config.train, count(config)
    arguments = training_arguments(
        config,
        "bf16" if train.precision == "auto" else train.precision,
        train.gradient_checkpointing == "on",
        train.gradient_accumulation_steps,
    )
    facts = _describe(config, sizes["none"])
    settings = _settings(config, sizes, facts)
    return {
        "training_arguments": {**arguments.to_dict(), "use_cpu": False},
        "lora_config": {
            **train.lora.model_dump(mode="json"),
            "target_modules": list(targets.modules),
            "without_adapter": targets.without,
            "bias": "none",
        },
        **facts,
        "settings": settings,
        "memory_band": MEMORY_BAND,
        "gpus": [_on_gpu(gpu, settings) for gpu in DATA["gpu"]],
        "machine": _here(config, settings),
    }


def _describe(config: Config, size: ModelSize) -> Facts:
    """Facts of a run on any device."""
    train, assumed = config.train, not (config.data_dir / DONE).is_file()
    lengths, validation, label_share = _assumed(config) if assumed else _prepared(config)
    mean = float(lengths.mean())
    epoch = plan_epoch(config, lengths)
    steps = len(epoch) * train.num_train_epochs
    steps = steps if train.max_steps < 0 else min(steps, train.max_steps)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    tokens = round(mean * min(steps * per_step, len(lengths) * train.num_train_epochs))
    evaluations = -(-steps // train.eval_steps)  # the last step is evaluated too
    # 2 a weight and token forward, 2 for the gradient of the activations, 2 for the gradient of
    # the adapter. Attention's scores are left out: 1 % of an 8B base's at 300 tokens.
    block, head = 2 * (size.linear + size.trainable), 2 * size.head * label_share
    training = tokens * (2 * block + 2 * size.trainable + 2 * head)
    evaluation = evaluations * int(validation.sum()) * (block + head)
    notes = []
    if assumed:
        rows = f"{len(lengths):,} training rows ({_rows(config)[2]}) of {mean:.0f} tokens"
        notes.append(f"{rows} are assumed: run fintune prepare")
    if (share := evaluation / (training + evaluation)) > EVALUATION_WARNING:
        fix = "raise train.eval_steps or lower train.max_eval_samples"
        notes.append(f"{share:.0%} of the run is evaluation: {fix}")
    return {
        "base": {"id": config.model.id, "parameters": size.parameters},
        "adapter": {"trainable_parameters": size.trainable},
        "rows": {
            "rows": len(lengths),
            "mean_tokens": round(mean, 1),
            "label_share": round(label_share, 3),
            "tokens": tokens,
            "evaluations": evaluations,
            "rows_per_evaluation": len(validation),
        },
        "batches": {
            "steps": steps,
            "largest_micro_batch": max(int(lengths[b].sum()) for step in epoch for b in step),
            "estimated": assumed,
            "examples_per_step": per_step,
        },
        "flops": {
            "training_flops": training,
            "recomputation_flops": float(tokens * block),
            "evaluation_flops": evaluation,
        },
        "verdict": None if assumed else outlook(config),
        "notes": notes,
    }


def _prepared(config: Config) -> tuple[Ints, Ints, float]:
    """Tokens of every training row and of every row of an evaluation; share of label tokens."""
    read_data(config.data_dir)
    train = read_train(config.data_dir).lengths
    validation = read_validation(config.data_dir, config.train.max_eval_samples).lengths
    labels = pq.read_table(config.data_dir / "train.parquet", columns=["labels"])["labels"]
    counted = pc.sum(pc.greater_equal(pc.list_flatten(labels), 0)).as_py() or 0
    return train, validation, counted / max(int(train.sum()), 1)


def _assumed(config: Config) -> tuple[Ints, Ints, float]:
    """As `_prepared`, where nothing is prepared."""
    draw = np.random.default_rng(config.seed)
    train, validation = (
        draw.lognormal(math.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, rows)
        .clip(16, config.data.max_length)
        .astype(np.int64)
        for rows in _rows(config)[:2]
    )
    return train, validation, LABEL_SHARE


def _rows(config: Config) -> tuple[int, int, str]:
    """Rows to train on and of an evaluation, as many as there may be; where the first is from."""
    data = config.data
    train, held_out, said = data.max_train_rows, data.max_held_out_rows // 2, "the cap"
    if there := rows_on_disk(data):
        test_share = data.test_share or share_of_test(there)
        held_out = min(held_out, math.ceil(there * data.validation_share))
        shares = data.validation_share + test_share + data.final_share
        train = min(train, math.ceil(there * (1 - shares)))
        said = f"of {there:,} on disk"
    return train, min(config.train.max_eval_samples, held_out), said


def count(config: Config) -> tuple[dict[str, ModelSize], Targets]:
    """Build the base with its adapter on the meta device, and count.

    A quantized base keeps peft's LoRA arithmetic. Its dropout masks count two bytes an element
    here and take one on CUDA: measured about 18 % too much.

    Returns:
        The counts by quantization, and which layers have an adapter.

    Raises:
        ModelError: no configuration of the base, or one whose memory cannot be counted.
    """
    name = config.model.id.rsplit("/", 1)[-1].lower()
    shape = DATA["base"].get(name.removeprefix("meta-").removesuffix("-instruct"))
    bundled = shape is not None and config.model.path is None
    places = (config.run_dir, config.data_dir)
    folder = None if bundled else find_base(config.model, weights=False, kept_in=places).folder
    if folder is not None:
        probe_base(folder, weights=True)
    errors = (OSError, RuntimeError, TypeError, ValueError, AttributeError, LookupError)
    fix = "check the base's config.json"
    with failing(f"{config.model.id} cannot be planned", *errors, fix=fix):
        with torch.device("meta"):
            architecture = read_architecture(folder) if folder else AutoConfig.for_model(**shape)
            model = model_class(architecture).from_config(architecture, dtype=torch.bfloat16)
            attention.traits(model.requires_grad_(False))
            targets = find_targets(model, config.train.lora.target_modules)
            model = attach(model, config.train.lora, config.seed, targets)
            probes = [_batch(memory.PROBE_TOKENS), _batch(2 * memory.PROBE_TOKENS)]
        model.to(torch.bfloat16)  # as autocast computes
        pointwise.fuse(model)
        peft = memory.model_size(model, probes, torch.bfloat16.itemsize)
        lora.fuse(model)
        fused = memory.model_size(model, probes, torch.bfloat16.itemsize)
    sharded = config.train.strategy == "fsdp"  # it is not quantized then
    packed = {} if sharded else {"8bit": peft, "4bit": peft}
    return {"none": fused} | packed, targets


def _batch(tokens: int) -> Facts:
    """One flat sequence. The mask is never read (attention.attend has the boundaries); without it
    transformers would look for boundaries in the positions' values, which do not exist here."""
    ids = torch.empty(1, tokens, dtype=torch.long)
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
    ends = torch.empty(2, dtype=torch.int32)
    whole = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
    return {**whole, "cu_seq_lens_q": ends, "max_length_q": tokens}


def _settings(config: Config, sizes: dict[str, ModelSize], facts: Facts) -> list[Facts]:
    """What may be chosen to make a run fit, the fastest first: its memory and operations."""
    train, settings = config.train, []
    configured = (config.model.quantization, train.gradient_checkpointing)
    tokens, flops = facts["batches"]["largest_micro_batch"], facts["flops"]
    labels = round(tokens * facts["rows"]["label_share"])
    for (kind, size), choice in itertools.product(sizes.items(), ("off", "on")):
        on = choice == "on"
        parts = step_memory(size, train.optim, tokens, labels, kind, checkpointing=on)
        parts["process"] = CONTEXT_BYTES
        settings.append(
            {
                "quantization": kind,
                "gradient_checkpointing": choice,
                "configured": configured in ((kind, choice), (kind, "auto")),
                "memory": parts,
                "peak": memory.peak(parts),
                "flops": sum(flops.values()) - flops["recomputation_flops"] * (not on),
            }
        )
    return settings


def _on_gpu(gpu: Facts, settings: list[Facts]) -> Facts:
    """The first setting that fits a GPU, with its hours, least and most."""
    usable = gpu["gib"] * 2**30 * USABLE / (1 + MEMORY_BAND)
    best = next((setting for setting in settings if setting["peak"] <= usable), None)
    facts = {"gpu": gpu["name"], "gib": gpu["gib"], "fits": best is not None}
    if best is None:
        return facts
    chosen = {"model.quantization": best["quantization"]}
    chosen["train.gradient_checkpointing"] = best["gradient_checkpointing"]
    hours = [best["flops"] / (gpu["tflops"] * 3.6e15 * share) for share in reversed(PEAK_SHARE)]
    return facts | {"set": chosen, "peak": best["peak"], "hours": hours}


def _here(config: Config, settings: list[Facts]) -> Facts:
    """The rate of a product of matrices on this machine, and the hours that follow from it."""
    device = here()
    name = precision(config.train.precision, device)
    cpu.set_threads(threads := cpu.free_threads())
    left = torch.ones(TIMED, TIMED, dtype=DTYPES[name], device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        float((left @ left)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    rate = 2 * TIMED**3 / min(seconds)
    chosen = [each for each in settings if each["configured"]] or settings
    hours = [chosen[0]["flops"] / (3600 * rate * share) for share in reversed(HERE_SHARE)]
    facts = {"device": str(device), "threads": threads, "precision": name}
    return facts | {"gflops": round(rate / 1e9), "hours": hours}


def show(planned: Facts) -> None:
    """A plan as tables of at most 80 columns."""
    parts = ("lora_config", "base", "adapter", "rows", "batches", "flops")
    told = [item for part in parts for item in planned[part].items()]
    facts = [(key, value) for key, value in told if value not in (None, {}, [])]
    defaults = TrainingArguments().to_dict().items()
    changed = [item for item in planned["training_arguments"].items() if item not in defaults]
    console.table("training arguments other than transformers' defaults", ["key", "value"], changed)
    cells = ([key.replace("_", " "), _shown(value)] for key, value in facts)
    console.table("the run", ["what", "value"], cells)
    title = f"memory in GB, +-{MEMORY_BAND:.0%} (*: configured)"
    columns = ["base", "checkpointing", *HELD, "peak"]
    console.table(title, columns, map(_setting_row, planned["settings"]))
    columns = ["GPU", "base", "checkpointing", "peak", "time"]
    console.table("one GPU, one process", columns, map(_gpu_row, planned["gpus"]))
    share = f"{PEAK_SHARE[0]:.0%} to {PEAK_SHARE[1]:.0%}"
    console.warn(f"times assume {share} of the bf16 peak; no GPU was measured")
    machine = planned["machine"]
    rate = f"{machine['gflops']:,} GFLOP/s in {machine['precision']}, a product timed now"
    console.result(f"this machine ({machine['device']}, {rate}): {_time(machine['hours'])}")
    for note in planned["notes"]:
        console.warn(note)
    if planned["verdict"]:
        tell(planned["verdict"])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _setting_row(setting: Facts) -> list[str]:
    mark = "* " if setting["configured"] else "  "
    sizes = [*(setting["memory"][name] for name in HELD), setting["peak"]]
    chosen = [mark + setting["quantization"], setting["gradient_checkpointing"]]
    return chosen + [f"{size / 1e9:.1f}" for size in sizes]


def _gpu_row(row: Facts) -> list[str]:
    if not row["fits"]:
        return [row["gpu"], "does not fit"]
    return [row["gpu"], *row["set"].values(), f"{row['peak'] / 1e9:.1f} GB", _time(row["hours"])]


def _time(hours: list[float]) -> str:
    """A span of time in the largest unit of which the longer end has one."""
    unit, factor = next((u for u in UNITS if max(hours) * u[1] >= 1), UNITS[-1])
    return "-".join(f"{each * factor:.2g}" for each in hours) + f" {unit}"
