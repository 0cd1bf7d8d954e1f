"""Rebuild the bundled base and sample rows: `python tools/build_nano [--out DIR]`.

Tokenizer, sample rows and base are made from nothing but the seed and the text in this folder. The
tokenizer and the rows come out byte for byte; the weights depend on the machine's arithmetic and
come out equally good. On two cores with bf16 matrix instructions it takes about 15 minutes, nearly
all of it pretraining.
"""

import argparse
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from fintune.console import say
from fintune.nano import base_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_nano.prose import documents
from build_nano.rows import write_rows
from build_nano.tokenizer import (
    BOS,
    END,
    EOM,
    EOT,
    MAX_LENGTH,
    PAD,
    VOCAB_SIZE,
    save_tokenizer,
    train_tokenizer,
)

_TOKENIZER_DOCUMENTS = 60_000  # 27 MB of text; the merges no longer change much beyond that
_REPORT_EVERY = 50  # steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the base is pretrained. The bundled one was made with these values."""

    seed: int = 17
    num_steps: int = 1_600
    batch_tokens: int = 4_096
    # Most look-ups are within 250 tokens, and attention costs half as much there; the last steps
    # see 512.
    short_length: int = 256
    long_length: int = 512
    long_share: float = 0.15
    learning_rate: float = 3e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """A Llama of five million parameters; four heads of 64 run faster here than eight of 32."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        **_token_ids(tokenizer),
    )


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Llama 3.1 stops at any of three tokens, and so does this base."""
    return {
        "bos_token_id": _id(tokenizer, BOS),
        "eos_token_id": [_id(tokenizer, token) for token in (END, EOM, EOT)],
        "pad_token_id": _id(tokenizer, PAD),
    }


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def token_stream(tokenizer: Tokenizer, seed: int) -> Iterator[int]:
    """Documents as ids, each between BOS and the end-of-text token, end to end."""
    bos, end = _id(tokenizer, BOS), _id(tokenizer, END)
    texts = documents(seed)
    while True:
        block = list(itertools.islice(texts, 512))
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False):
            yield bos
            yield from encoding.ids
            yield end


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of the layers only, not on embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def pretrain(
    model: LlamaForCausalLM, tokens: Iterator[int], recipe: Recipe, report: Callable[[str], None]
) -> float:
    """Train on the stream in bf16 autocast; mean loss (nats a token) of the last interval."""

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.view(-1, VOCAB_SIZE).float(), targets.view(-1))

    compiled = torch.compile(loss_of)  # 1.3 times as fast on a CPU
    optimizer = _optimizer(model, recipe)
    first_long = round(recipe.num_steps * (1 - recipe.long_share))
    started, mean, losses = time.monotonic(), math.nan, []
    for step in range(recipe.num_steps):
        length = recipe.long_length if step >= first_long else recipe.short_length
        ids = itertools.islice(tokens, recipe.batch_tokens + recipe.batch_tokens // length)
        batch = torch.tensor(list(ids)).view(-1, length + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == recipe.num_steps:
            mean, losses = sum(losses) / len(losses), []
            rate = (step + 1) * recipe.batch_tokens / (time.monotonic() - started)
            left = (recipe.num_steps - step - 1) * recipe.batch_tokens / rate
            report(
                f"step {step + 1}/{recipe.num_steps}  loss {mean:.3f}  "
                f"{rate:,.0f} tokens/s  {left / 60:.1f} min left"
            )
    return mean


def build_base(folder: Path, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Write tokenizer, weights, configuration and README of the base into an existing folder."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    report("training the tokenizer")
    texts = itertools.islice(documents(recipe.seed), _TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, folder)
    model = LlamaForCausalLM(model_config(tokenizer))
    loss = pretrain(model, token_stream(tokenizer, recipe.seed + 1), recipe, report)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, **_token_ids(tokenizer)
    )
    model.save_pretrained(folder)
    minutes = (time.monotonic() - started) / 60
    (folder / "README.md").write_text(_readme(model, recipe, loss, minutes), encoding="utf-8")


def _readme(model: LlamaForCausalLM, recipe: Recipe, loss: float, minutes: float) -> str:
    config, count = model.config, sum(p.numel() for p in model.parameters())
    tokens = recipe.num_steps * recipe.batch_tokens / 1e6
    template = Path(__file__).with_name("readme.md").read_text(encoding="utf-8")
    return template.format(
        config=config, count=count, recipe=recipe, tokens=tokens, loss=loss, minutes=minutes,
        longest=MAX_LENGTH,
    )  # fmt: skip


def main() -> None:
    """Build into a temporary folder beside the target, then move the finished files into place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=base_dir().parent, help="folder for base/ and rows.jsonl"
    )
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as scratch:
        rows, base = Path(scratch) / "rows.jsonl", Path(scratch) / "base"
        base.mkdir()
        write_rows(rows)
        build_base(base, Recipe(), say)
        rows.replace(out / "rows.jsonl")
        if (out / "base").exists():
            shutil.rmtree(out / "base")
        base.rename(out / "base")


if __name__ == "__main__":
    main()
