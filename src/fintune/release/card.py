"""The model card, from measured facts only: what the run's files say, and nothing else.

A fact that is not in them is left out. The metadata block goes through huggingface_hub's
ModelCardData, so the hub reads it; the text below is for a person who has to decide.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fintune.config import Config
from fintune.model import Base

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (its default is 16; a rank above it fails to load)."""

SEED_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
import torch

base = "{base}"
adapter = "{adapter}"

tokenizer = AutoTokenizer.from_pretrained(adapter)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "left"

dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
base_model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="auto")
model = PeftModel.from_pretrained(base_model, adapter)
model.eval()

prompt = "Explain what a yield curve inversion implies for equities."
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
out = model.generate(**inputs, max_new_tokens=256, temperature=0.8, top_p=0.9)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""

CHAT_SNIPPET = """\
messages = [{{"role": "user", "content": prompt}}]
inputs = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    date_string="{date}",
    return_dict=True,
    return_tensors="pt",
).to(model.device)
out = model.generate(**inputs, max_new_tokens=256, do_sample=False)
answer = out[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ENVIRONMENT = {
    "device": "device",
    "processes": "processes",
    "cpu_cores": "CPU cores",
    "precision": "precision",
    "seconds": "seconds of training",
    "steps": "updates",
    "trained_tokens": "tokens trained on",
    "trainable_parameters": "trainable parameters",
    "energy_kwh": "energy (kWh)",
    "python": "python",
}
"""Facts of environment.json that the card prints, with their labels; each may be missing."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card is written from.

    `llama` is the version of a Llama base, whose licence has duties; None for any other base.
    `accepted` is the reason given for publishing without the verdict `better`.
    """

    config: Config
    name: str
    base: Base
    llama: str | None
    manifest: dict[str, Any]
    results: dict[str, Any]
    environment: dict[str, Any]
    judged: list[dict[str, Any]]
    accepted: str | None

    @property
    def title(self) -> str:
        """The name; that of an adapter on Llama starts with Llama, as the base's licence asks."""
        starts = self.name.lower().startswith("llama")
        return f"Llama {self.name}" if self.llama and not starts else self.name


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds an adapter's rank."""
    return next((value for value in VLLM_RANKS if value >= rank), VLLM_RANKS[-1])


def write_card(facts: Facts) -> str:
    """README.md of a release: metadata block and text."""
    config = facts.config
    licence = config.release.license or (f"llama{facts.llama}" if facts.llama else None)
    source = config.data.source
    data = ModelCardData(
        base_model=facts.base.id,
        library_name="peft",
        pipeline_tag="text-generation",
        license=licence,
        datasets=[source] if _HUB_ID.fullmatch(source) and source != facts.base.id else None,
        tags=["lora", "finance", "instruction-tuning", "transformers", "adapter"],
    )
    parts = [f"# {facts.title}", *_opening(facts), *_evidence(facts), *_data(facts)]
    parts += [*_recipe(facts), *_environment(facts), *_loading(facts), *_limits(facts)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _opening(facts: Facts) -> Iterable[str]:
    if facts.llama:
        yield (
            f"**Built with Llama.** The Llama {facts.llama} Community License applies to this"
            " adapter too; its text is in `LICENSE`, its attribution in `NOTICE`."
        )
    lora = facts.config.train.lora
    yield (
        f"A LoRA adapter (rank {lora.r}) for `{facts.base.id}` at revision"
        f" `{facts.base.revision}`, tuned on finance instructions."
        " **Not financial advice**: have a person check what it says before anyone acts on it."
    )


def _evidence(facts: Facts) -> Iterable[str]:
    results = facts.results
    yield "## Against its base"
    yield f"Verdict: **{str(results.get('verdict')).replace('_', ' ')}**."
    if facts.accepted:
        yield f"Published without a verdict of better, for this reason: {facts.accepted}"
    rows = []
    for key, label in (("loss", "held-out loss"), ("accuracy", "accuracy")):
        part = results.get(key) or {}
        if "base" in part and "adapter" in part:
            rows.append([label, _number(part["base"]), _number(part["adapter"])])
    if rows:
        yield _table(["", "base", "adapter"], rows)
    difference = (results.get("accuracy") or {}).get("difference") or {}
    if "value" in difference and "ci95" in difference:
        low, high = (_number(value) for value in difference["ci95"])
        text = f"Accuracy differs by {_number(difference['value'])} (95 % interval {low} to {high}"
        text += f", {difference['n']} questions" if "n" in difference else ""
        text += ")."
        if difference.get("mde80") is not None:
            text += (
                " The smallest difference this test would find with 80 % power is"
                f" {_number(difference['mde80'])}."
            )
        yield text
    yield _judges(facts.judged)


def _judges(judged: list[dict[str, Any]]) -> str:
    """Who judged the judged set, as the file itself says."""
    judges = Counter(
        str((row.get("judge") or {}).get("served_model") or (row.get("judge") or {}).get("model"))
        for row in judged
        if row.get("status") == "scored"
    )
    unscored = Counter(
        str(row.get("unscored_reason")) for row in judged if row.get("status") == "unscored"
    )
    said = [f"{count} verdicts of {name}" for name, count in sorted(judges.items())]
    said += [f"{count} unscored ({reason})" for reason, count in sorted(unscored.items())]
    return "Judged set (`eval_50_gpt_judged_raw.jsonl`): " + ("; ".join(said) or "empty") + "."


def _data(facts: Facts) -> Iterable[str]:
    manifest = facts.manifest
    yield "## Data"
    sources = manifest.get("sources") or {}
    if sources:
        yield _table(
            ["source", "revision or sha256", "licence", "rows read", "rows trained on"],
            [
                [name, row.get("identity", ""), row.get("licence") or "not stated"]
                + [f"{row.get('read', 0):,}", f"{row.get('train', 0):,}"]
                for name, row in sorted(sources.items())
            ],
        )
    rows = manifest.get("rows") or {}
    kept = [[key, f"{rows[key]:,}"] for key in ("read", "train", "validation") if key in rows]
    dropped = sorted((rows.get("dropped") or {}).items(), key=lambda item: (-item[1], item[0]))
    kept += [[f"dropped: {reason}", f"{count:,}"] for reason, count in dropped]
    if kept:
        yield _table(["rows", "count"], kept)


def _recipe(facts: Facts) -> Iterable[str]:
    train, lora = facts.config.train, facts.config.train.lora
    yield "## Recipe"
    yield _table(
        ["setting", "value"],
        [
            ["rank, alpha", f"{lora.r}, {lora.alpha:g}"],
            ["dropout, bias", f"{lora.dropout:g}, {lora.bias}"],
            ["target modules", ", ".join(lora.target_modules)],
            ["epochs", train.epochs if train.max_steps < 0 else f"{train.max_steps} steps"],
            ["batch", f"{train.micro_batch_size} × {train.accumulation}, {train.plan}"],
            ["optimizer", train.optimizer],
            [
                "learning rate",
                f"{train.learning_rate:g}, {train.schedule}, warm-up {train.warmup_ratio:g}",
            ],
            ["weight decay", f"{train.weight_decay:g}"],
            ["gradient clipping", f"{train.max_grad_norm:g}"],
            ["longest example", f"adaptive, at most {facts.config.data.max_length_cap} tokens"],
            ["seed", facts.config.seed],
        ],
    )
    yield "Every setting is in `training_config.json`."


def _environment(facts: Facts) -> Iterable[str]:
    found = facts.environment | (facts.environment.get("packages") or {})
    labels = _ENVIRONMENT | {name: name for name in ("torch", "transformers", "peft")}
    rows = [[labels[key], _number(found[key])] for key in labels if found.get(key) is not None]
    if rows:
        yield "## Machine and time"
        yield _table(["fact", "value"], rows)


def _loading(facts: Facts) -> Iterable[str]:
    rank, name = facts.config.train.lora.r, facts.title.replace(" ", "-")
    date = facts.config.chat.date_string
    yield "## Usage"
    yield "```python\n" + SEED_SNIPPET.format(base=facts.base.id, adapter=name) + "```"
    yield (
        "The snippet continues plain text. Better: ask through the chat template it was trained"
        " on, with the date it was trained with and `do_sample` given, since without it the base's"
        " generation_config decides whether the answer is sampled:"
    )
    yield "```python\n" + CHAT_SNIPPET.format(date=date) + "```"
    yield (
        "vLLM (its default rank limit is 16):\n\n"
        f"```sh\nvllm serve {facts.base.id} --enable-lora --max-lora-rank {vllm_rank(rank)}"
        f" --lora-modules {name}={name}\n```"
    )
    yield (
        "Ollama: `fintune export ollama` writes the merged GGUF and a Modelfile with this"
        " template and its stop token.\n\n```sh\nollama create "
        f"{name.lower()} -f Modelfile\n```"
    )
    yield (
        "`prompt_fixture.json` holds prompts with their exact token ids. `fintune verify .` checks"
        " this folder against them, `fintune verify . --server URL` a running server."
    )


def _limits(facts: Facts) -> Iterable[str]:
    yield "## Limits"
    yield (
        "- It can state wrong figures with confidence; not financial advice.\n"
        "- Tuned on English finance questions; elsewhere expect its base, or less.\n"
        "- The comparison above holds for held-out rows of the same data, not for every use."
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
