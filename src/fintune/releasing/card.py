"""The model card: `templates/card.md.jinja`, filled with what the run's files say.

A fact that is not in the files is left out. The metadata block goes through huggingface_hub's
ModelCardData, so that the hub reads it.
"""

import re
from collections import Counter
from typing import Any

from huggingface_hub import ModelCardData

from fintune import page
from fintune.releasing.gate import Inputs

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (its default is 16; a rank above it fails to load)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds an adapter's rank."""
    return next((value for value in VLLM_RANKS if value >= rank), VLLM_RANKS[-1])


def write_card(
    inputs: Inputs, judged: list[dict[str, Any]], config_sha256: str, *, llama: str | None
) -> str:
    """README.md of a release: metadata block and text.

    Args:
        judged: rows of the judged set.
        config_sha256: of training_config.json, which names the hashes of the other files.
        llama: version of a Llama base, whose licence has duties; None for any other base.
    """
    config, base = inputs.recipe, inputs.base
    source, name = config.data.source, inputs.config.name
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
    counts: Counter[str] = Counter()
    for row in judged:
        if row.get("status") == "scored":
            counts[f"verdicts of {row.get('served_model') or row.get('model')}"] += 1
        else:
            counts[f"unscored ({row.get('unscored_reason')})"] += 1
    text = page.render(
        "card.md.jinja",
        metadata=metadata.to_yaml(),
        name=name,
        adapter=name.replace(" ", "-"),
        base=base,
        llama=llama,
        accepted=inputs.accepted,
        config=config,
        vllm_rank=vllm_rank(config.train.lora.r),
        results=inputs.results,
        judges="; ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "empty",
        manifest=inputs.manifest,
        environment=inputs.environment,
        config_sha256=config_sha256,
    )
    return text + "\n"
