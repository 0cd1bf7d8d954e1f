"""The model card, from measured facts only: what the run's files say, and nothing else.

The text is `templates/card.md.jinja`; a fact that is not in the files is left out. The metadata
block goes through huggingface_hub's ModelCardData, so that the hub reads it.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from fintune.config import Config
from fintune.console import printable
from fintune.release.gate import Inputs

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (its default is 16; a rank above it fails to load)."""
MACHINE = {
    "device": "device",
    "processes": "processes",
    "cpu_cores": "CPU cores",
    "precision": "precision",
    "seconds": "seconds of training",
    "steps": "optimizer steps",
    "trained_tokens": "tokens trained on",
    "trainable_parameters": "trainable parameters",
    "energy_kwh": "energy (kWh)",
    "python": "python",
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
}
"""Facts of environment.json with their labels; each may be missing."""
TEMPLATES = Path(__file__).parents[1] / "templates"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds an adapter's rank."""
    return next((value for value in VLLM_RANKS if value >= rank), VLLM_RANKS[-1])


def write_card(
    inputs: Inputs,
    judged: list[dict[str, Any]],
    settings_sha256: str,
    *,
    llama: str | None,
    accepted: str | None,
) -> str:
    """README.md of a release: metadata block and text.

    Args:
        judged: rows of the judged set.
        settings_sha256: of training_config.json, which names the hashes of the other files.
        llama: version of a Llama base, whose licence has duties; None for any other base.
        accepted: the reason given for publishing without the verdict `better`.
    """
    config, base = inputs.recipe, inputs.base
    source, name = config.data.source, inputs.config.release.name or inputs.config.name
    if llama and not name.lower().startswith("llama"):
        name = f"Llama {name}"  # as the base's licence asks
    metadata = ModelCardData(
        base_model=base.id,
        library_name="peft",
        pipeline_tag="text-generation",
        license=inputs.config.release.license or (f"llama{llama}" if llama else None),
        datasets=[source] if _HUB_ID.fullmatch(source) and source != base.id else None,
        tags=["lora", "finance", "instruction-tuning", "transformers", "adapter"],
    )
    found = inputs.environment | (inputs.environment.get("packages") or {})
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: printable(str(value)),
    ).get_template("card.md.jinja")
    return template.render(
        metadata=metadata.to_yaml(),
        name=name,
        adapter=name.replace(" ", "-"),
        base=base,
        llama=llama,
        accepted=accepted,
        rank=config.train.lora.r,
        vllm_rank=vllm_rank(config.train.lora.r),
        date_string=config.chat.date_string,
        verdict=str(inputs.results.get("verdict")).replace("_", " "),
        **_evidence(inputs.results),
        judges=_judges(judged),
        **_data(inputs.manifest),
        recipe=_recipe(config).items(),
        settings_sha256=settings_sha256,
        environment=inputs.environment,
        machine=[(text, _number(found[key])) for key, text in MACHINE.items() if key in found],
    )


def _evidence(results: dict[str, Any]) -> dict[str, Any]:
    """Rows of loss and accuracy, and the difference of the accuracies."""
    loss, accuracy = results.get("loss") or {}, results.get("accuracy") or {}
    rows = []
    for label, part, write in (("held-out loss", loss, _number), ("accuracy", accuracy, _percent)):
        if "base" in part and "adapter" in part:
            ranges = part.get("ci95") or {}
            values = [_ranged(part[key], ranges.get(key), write) for key in ("base", "adapter")]
            rows.append([label, *values])
    difference = accuracy.get("difference") or {}
    if "value" not in difference or "ci95" not in difference:
        return {"evidence": rows, "difference": None}
    value = _ranged(difference["value"], difference["ci95"], _percent)
    smallest = difference.get("mde80")
    smallest = None if smallest is None else _percent(smallest)
    return {"evidence": rows, "difference": difference | {"value": value, "mde80": smallest}}


def _judges(judged: list[dict[str, Any]]) -> str:
    """Who judged the judged set, as the file itself says."""
    counts: Counter[str] = Counter()
    for row in judged:
        if row.get("status") == "scored":
            counts[f"verdicts of {row.get('served_model') or row.get('model')}"] += 1
        else:
            counts[f"unscored ({row.get('unscored_reason')})"] += 1
    return "; ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "empty"


def _data(manifest: dict[str, Any]) -> dict[str, Any]:
    """Rows of the sources, and of what became of them."""
    counts = manifest.get("rows") or {}
    dropped = sorted((counts.get("dropped") or {}).items(), key=lambda item: (-item[1], item[0]))
    rows = [(key, counts[key]) for key in ("read", "train", "validation", "test") if key in counts]
    rows += [(f"dropped: {reason}", count) for reason, count in dropped]
    sources = [
        [name, row.get("identity", ""), row.get("licence") or "not stated"]
        + [_number(row.get(key, 0)) for key in ("read", "train")]
        for name, row in sorted((manifest.get("sources") or {}).items())
    ]
    return {"sources": sources, "counts": [(key, _number(count)) for key, count in rows]}


def _recipe(config: Config) -> dict[str, Any]:
    train, lora = config.train, config.train.lora
    warmup = f"warm-up {train.warmup_ratio:g}"
    return {
        "rank, alpha": f"{lora.r}, {lora.lora_alpha:g}",
        "dropout, bias": f"{lora.lora_dropout:g}, none",
        "target modules": ", ".join(lora.target_modules),
        "epochs": train.num_train_epochs if train.max_steps < 0 else f"{train.max_steps} steps",
        "batch": f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps}",
        "sampling": train.train_sampling_strategy,
        "optimizer": train.optim,
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}, {warmup}",
        "weight decay": f"{train.weight_decay:g}",
        "gradient clipping": f"{train.max_grad_norm:g}",
        "longest example": f"adaptive, at most {config.data.max_length} tokens",
        "seed": config.seed,
    }


def _ranged(value: float, interval: list[float] | None, write: Callable[[Any], str]) -> str:
    return write(value) + (f" ({' to '.join(map(write, interval))})" if interval else "")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
