"""The model card, from measured facts only: what the run's files say, and nothing else.

A fact that is not in them is left out. The metadata block goes through huggingface_hub's
ModelCardData, so the hub reads it; the text below is for a person who has to decide.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fintune.config import Config
from fintune.files import read_toml
from fintune.release.gate import Inputs
from fintune.untrusted.provenance import CONFIG, JUDGED

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (its default is 16; a rank above it fails to load)."""

TEXT = read_toml(__file__, "card.toml")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WHO = ("base", "adapter")


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
    data = ModelCardData(
        base_model=base.id,
        library_name="peft",
        pipeline_tag="text-generation",
        license=inputs.config.release.license or (f"llama{llama}" if llama else None),
        datasets=[source] if _HUB_ID.fullmatch(source) and source != base.id else None,
        tags=["lora", "finance", "instruction-tuning", "transformers", "adapter"],
    )
    parts = [f"# {name}"]
    if llama:
        parts.append(TEXT["llama"].format(version=llama))
    parts.append(TEXT["lead"].format(rank=config.train.lora.r, base=base))
    parts += ["## Against its base", *_evidence(inputs.results, accepted), _judges(judged)]
    parts += ["## Data", *_data(inputs.manifest)]
    parts += ["## Recipe", _recipe(config)]
    parts.append(f"Every setting is in `{CONFIG}` (sha256 `{settings_sha256}`).")
    parts += [
        f"Changed during training, for this reason: {change['reason']}"
        f" ({'; '.join(change['differs'])})."
        for change in inputs.environment.get("accepted_changes", ())
    ]
    parts += [
        f"Memory ran out at update {cap['step']}: since then micro-batches of at most"
        f" {cap['max_tokens']:,} tokens, the same examples an update."
        for cap in inputs.environment.get("token_caps", ())
    ]
    found = inputs.environment | (inputs.environment.get("packages") or {})
    facts = [
        [text, _number(found[key])] for key, text in TEXT["environment"].items() if key in found
    ]
    parts += ["## Machine and time", _table(["fact", "value"], facts)] if facts else []
    parts += ["## Usage", _usage(config, base.id, name.replace(" ", "-"))]
    parts += ["## Limits", TEXT["limits"]]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _evidence(results: dict[str, Any], accepted: str | None) -> Iterator[str]:
    yield f"Verdict: **{str(results.get('verdict')).replace('_', ' ')}**."
    if accepted:
        yield f"Published without a verdict of better, for this reason: {accepted}"
    loss, accuracy = results.get("loss") or {}, results.get("accuracy") or {}
    rows = []
    for label, part, write in (("held-out loss", loss, _number), ("accuracy", accuracy, _percent)):
        if "base" in part and "adapter" in part:
            ranges = part.get("ci95") or {}
            rows.append([label] + [_ranged(part[k], ranges.get(k), write) for k in WHO])
    if rows:
        yield _table(["", *WHO], rows)
    difference = accuracy.get("difference") or {}
    if "value" in difference and "ci95" in difference:
        text = f"Accuracy differs by {_ranged(difference['value'], difference['ci95'], _percent)}"
        text += f", over {difference['n']} paired questions." if "n" in difference else "."
        if difference.get("mde80") is not None:
            text += " The smallest difference that this comparison would find with 80 % power is"
            text += f" {_percent(difference['mde80'])}."
        yield text + " In brackets: 95 % intervals."


def _judges(judged: list[dict[str, Any]]) -> str:
    """Who judged the judged set, as the file itself says."""
    said: Counter[str] = Counter()
    for row in judged:
        if row.get("status") == "scored":
            said[f"verdicts of {row.get('served_model') or row.get('model')}"] += 1
        else:
            said[f"unscored ({row.get('unscored_reason')})"] += 1
    found = "; ".join(f"{count} {what}" for what, count in sorted(said.items()))
    return f"Judged set (`{JUDGED}`): {found or 'empty'}."


def _data(manifest: dict[str, Any]) -> Iterator[str]:
    if sources := manifest.get("sources"):
        columns = ["source", "revision or sha256", "licence", "rows read", "rows trained on"]
        rows = [
            [name, row.get("identity", ""), row.get("licence") or "not stated"]
            + [f"{row.get(key, 0):,}" for key in ("read", "train")]
            for name, row in sorted(sources.items())
        ]
        yield _table(columns, rows)
    counts = manifest.get("rows") or {}
    kept = [[key, f"{counts[key]:,}"] for key in ("read", "train", "validation") if key in counts]
    dropped = sorted((counts.get("dropped") or {}).items(), key=lambda item: (-item[1], item[0]))
    kept += [[f"dropped: {reason}", f"{count:,}"] for reason, count in dropped]
    if kept:
        yield _table(["rows", "count"], kept)


def _recipe(config: Config) -> str:
    train, lora = config.train, config.train.lora
    length = f"adaptive, at most {config.data.max_length_cap} tokens"
    rate = f"{train.learning_rate:g}, {train.schedule}, warm-up {train.warmup_ratio:g}"
    rows = {
        "rank, alpha": f"{lora.r}, {lora.alpha:g}",
        "dropout, bias": f"{lora.dropout:g}, {lora.bias}",
        "target modules": ", ".join(lora.target_modules),
        "epochs": train.epochs if train.max_steps < 0 else f"{train.max_steps} steps",
        "batch": f"{train.micro_batch_size} × {train.accumulation}, {train.plan}",
        "optimizer": train.optimizer,
        "learning rate": rate,
        "weight decay": f"{train.weight_decay:g}",
        "gradient clipping": f"{train.max_grad_norm:g}",
        "longest example": length,
        "seed": config.seed,
    }
    return _table(["setting", "value"], rows.items())


def _usage(config: Config, base: str, name: str) -> str:
    return str(TEXT["usage"]).format(
        seed_snippet=TEXT["seed_snippet"].format(base=base, adapter=name),
        chat_snippet=TEXT["chat_snippet"].format(date=config.chat.date_string),
        base=base,
        rank=vllm_rank(config.train.lora.r),
        name=name,
        model=name.lower(),
    )


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(columns)
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def _ranged(value: float, interval: list[float] | None, write: Callable[[Any], str]) -> str:
    return write(value) + (f" ({' to '.join(map(write, interval))})" if interval else "")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
