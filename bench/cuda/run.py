"""Measure the engine on one CUDA device, with what bench/cuda/collect.py brought (see README.md).

python bench/cuda/run.py --unpack PART
python bench/cuda/run.py --out OUT [--only NAME] [--seconds 60] [--tiny]
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT, PLACE = Path(__file__).parents[2], Path("/tmp/fintune-cuda")
SITE = PLACE / "site"
sys.path[:0] = [str(SITE), str(ROOT / "src")]
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from fintune import attention  # noqa: E402
from fintune.collate import padded_batch, padding_free_batch  # noqa: E402
from fintune.loss import sum_loss  # noqa: E402
from fintune.training import lora, pointwise  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
TINY = LLAMA_8B | {"vocab_size": 4_096, "hidden_size": 128, "intermediate_size": 352}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MICRO_TOKENS, ACCUMULATION = 8_192, 4
"""Tokens of a micro-batch of the race: about 28 real rows."""
Rows = list[dict[str, list[int]]]
Row = dict[str, Any]


def rows_of(vocabulary: int, count: int = 4_000) -> Rows:
    """The collected rows, ids folded into a vocabulary; made-up ones of such lengths without."""
    path = PLACE / "rows.jsonl"
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    else:
        draw = torch.Generator().manual_seed(0)
        sizes = torch.randint(40, 560, (count,), generator=draw).tolist()
        ids = [torch.randint(vocabulary, (n,), generator=draw).tolist() for n in sizes]
        rows = [{"input_ids": i, "labels": [-100] * (len(i) // 2) + i[len(i) // 2 :]} for i in ids]
    return [
        {
            "input_ids": [token % vocabulary for token in row["input_ids"]],
            "labels": [label if label < 0 else label % vocabulary for label in row["labels"]],
        }
        for row in rows
    ]


def base(shape: Row, *, four_bit: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random Llama on the device; in 4 bits by way of a saved one, as bitsandbytes reads it."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    if not four_bit:
        return model.requires_grad_(False)
    folder = PLACE / "random"
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    given = {"quantization_config": packed, "device_map": {"": 0}, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(folder, **given).requires_grad_(False)


def adapted(model: Any, rank: int, dropout: float, *, fused: bool) -> Any:
    """A peft model in training mode, with our arithmetic or peft's."""
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS)
    if fused:
        attention.traits(model)
    peft = get_peft_model(model, settings, autocast_adapter_dtype=True)
    if fused:
        pointwise.fuse(peft)
        lora.fuse(peft)
    return peft.train()


def batches(rows: Rows, tokens: int) -> Iterator[Rows]:
    """Rows in their order, again and again, as many as fit into so many tokens."""
    batch: Rows = []
    while True:
        for row in rows:
            if batch and sum(len(r["input_ids"]) for r in batch) + len(row["input_ids"]) > tokens:
                yield batch
                batch = []
            batch.append(row)


def ours(model: Any, batch: Rows) -> tuple[Any, int]:
    """Summed loss of a padding-free batch."""
    return sum_loss(model, send_to_device(padding_free_batch(batch), DEVICE))


def usual(model: Any, batch: Rows) -> tuple[Any, int]:
    """Summed loss of a padded batch by transformers' own forward pass."""
    inputs = send_to_device(padded_batch(batch, 0), DEVICE)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits.float()
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, int((labels != -100).sum())


def fit(
    model: Any,
    loss: Callable[[Any, Rows], tuple[Any, int]],
    stream: Iterator[Rows],
    *,
    steps: int = 10**9,
    seconds: float = 1e9,
    rate: float = 1e-4,
    warm: int = 1,
) -> Row:
    """A plain loop: AdamW, ACCUMULATION micro-batches a step, until steps or seconds end.

    Returns:
        Losses, useful tokens a second after `warm` steps, and the peak of memory.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses, tokens, begun = [], 0, time.perf_counter()
    while len(losses) < steps and (time.perf_counter() - begun < seconds or len(losses) < warm + 1):
        if len(losses) == warm:
            tokens, begun = 0, time.perf_counter()
        micro = [next(stream) for _ in range(ACCUMULATION)]
        labels = sum(sum(label >= 0 for label in row["labels"][1:]) for b in micro for row in b)
        step = torch.zeros((), device=DEVICE)
        for number, batch in enumerate(micro):
            torch.manual_seed(len(losses) * ACCUMULATION + number)
            with torch.autocast(DEVICE, torch.bfloat16):
                total, _ = loss(model, batch)
            (total / labels).backward()
            step += total.detach() / labels
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(step))
        tokens += sum(len(row["input_ids"]) for b in micro for row in b)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    spent = time.perf_counter() - begun
    rounded = [round(value, 5) for value in losses]
    return {"losses": rounded, "useful_tokens_per_second": tokens / spent, "peak_bytes": peak}


def fresh() -> None:
    """Count the peak of memory anew."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tests(options: argparse.Namespace) -> Row:
    """The arithmetic on the device against the CPU's, one function after the other."""
    import test_cuda

    found: Row = {}
    for name in [name for name in vars(test_cuda) if name.startswith("test_")]:
        if DEVICE == "cpu":
            found[name] = "skipped: no CUDA device"
            continue
        try:
            getattr(test_cuda, name)()
            found[name] = "passed"
        except BaseException as error:  # pytest's own are no Exception
            found[name] = f"{type(error).__name__}: {error}"[:500]
    return found


def smollm2(options: argparse.Namespace) -> Row:
    """The real base on the real rows, its loss at the start and at the end."""
    pieces = sorted(PLACE.glob("*.gguf.piece-*"))
    if not pieces:
        return {"skipped": "no GGUF file was brought"}
    whole = PLACE / pieces[0].name.partition(".piece-")[0]
    whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    model = AutoModelForCausalLM.from_pretrained(
        PLACE,
        gguf_file=whole.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model = adapted(model.to(DEVICE).requires_grad_(False), 16, 0.1, fused=True)
    stream = batches(rows_of(model.config.vocab_size), 512 if options.tiny else 16_384)
    found = fit(model, ours, stream, seconds=options.seconds, rate=1e-3)
    return found | {"first": found["losses"][0], "last": found["losses"][-1]}


def race(options: argparse.Namespace) -> Row:
    """Contestants in turn, each built anew."""
    shape = TINY if options.tiny else LLAMA_8B
    tokens = 512 if options.tiny else MICRO_TOKENS
    plain = {"ours": (ours, True, False), "transformers + peft, recomputing": (usual, False, False)}
    packed = {"ours, 4-bit": (ours, True, True), "transformers, 4-bit": (usual, False, True)}
    if DEVICE == "cuda" and importlib.util.find_spec("bitsandbytes"):
        plain |= packed
    found: Row = {}
    for name, (loss, fused, four_bit) in plain.items():
        fresh()
        try:
            model = base(shape, four_bit=four_bit)
            if four_bit:
                model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            model = adapted(model, 4 if options.tiny else 64, 0.1, fused=fused)
            if not fused:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            stream = batches(rows_of(shape["vocab_size"]), tokens)
            found[name] = fit(model, loss, stream, seconds=options.seconds)
        except (RuntimeError, ImportError) as error:
            found[name] = {"failed": str(error)[:500]}
        model = None
        _say(f"{name}: {json.dumps({k: v for k, v in found[name].items() if k != 'losses'})}")
        write(options.out, "race", found)
    return found


def memory(options: argparse.Namespace) -> Row:
    """The peak of a step against the sum that `fintune plan` makes."""
    try:
        from fintune.training.memory import PROBE_TOKENS, model_size, peak, step_memory
    except ImportError as error:
        return {"skipped": str(error)}
    fresh()
    shape, tokens = (TINY, 512) if options.tiny else (LLAMA_8B, MICRO_TOKENS)
    model = adapted(base(shape), 4 if options.tiny else 64, 0.1, fused=True)
    probes = (
        send_to_device(padding_free_batch([{"input_ids": ids, "labels": ids}]), DEVICE)
        for ids in ([0] * PROBE_TOKENS, [0] * 2 * PROBE_TOKENS)
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        size = model_size(model, probes, 2)
    row = [1] * tokens
    parts = step_memory(size, "adamw_torch", tokens, tokens, checkpointing=False)
    stream = batches([{"input_ids": row, "labels": row}], tokens)
    measured = fit(model, ours, stream, steps=2)["peak_bytes"]
    return {"planned": peak(parts), "measured": measured, "parts": parts}


def spread(options: argparse.Namespace) -> Row:
    """Two runs of the same seeds: how far their losses are apart."""
    shape, tokens = (TINY, 512) if options.tiny else (LLAMA_8B, 4_096)
    shape = shape | {"num_hidden_layers": 2 if options.tiny else 8}
    runs = []
    for _ in range(2):
        fresh()
        model = adapted(base(shape), 8, 0.1, fused=True)
        stream = batches(rows_of(shape["vocab_size"]), tokens)
        runs.append(fit(model, ours, stream, steps=4 if options.tiny else 20)["losses"])
        model = None
    apart = [abs(a / b - 1) for a, b in zip(*runs, strict=True)]
    return {"runs": runs, "largest_relative_difference": max(apart)}


def long(options: argparse.Namespace) -> Row:
    """Rows of 16,384 tokens, one a micro-batch, recomputing."""
    fresh()
    shape, tokens = (TINY, 1_024) if options.tiny else (LLAMA_8B, 16_384)
    model = adapted(base(shape), 4 if options.tiny else 64, 0.1, fused=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    row = torch.randint(4_000, (tokens,)).tolist()
    stream = batches([{"input_ids": row, "labels": row}], tokens)
    return fit(model, ours, stream, steps=3)


STEPS = {step.__name__: step for step in (tests, smollm2, race, memory, spread, long)}


def unpack(part: Path) -> None:
    """Install a part's wheels and keep its other files."""
    PLACE.mkdir(exist_ok=True)
    for path in part.iterdir():
        if path.suffix == ".whl":
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            subprocess.run([*command, "--upgrade", "--target", str(SITE), str(path)], check=True)
        else:
            shutil.copy(path, PLACE / path.name)


def write(out: Path, name: str, found: Row) -> None:
    """A step's file, at once."""
    facts = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    facts["torch"] = torch.__version__
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(facts | {"found": found}, indent=1))


def main() -> None:
    """Unpack a part, or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--unpack", type=Path)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "cuda-results")))
    parser.add_argument("--only", choices=STEPS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each contestant")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it on a CPU")
    options = parser.parse_args()
    if options.unpack:
        unpack(options.unpack)
        return
    if DEVICE == "cpu" and not options.tiny:
        raise SystemExit("no CUDA device: nothing was measured (--tiny tries the script on a CPU)")
    for name, step in STEPS.items():
        if options.only in (None, name):
            begun = time.perf_counter()
            write(options.out, name, step(options))
            _say(f"{name}: {time.perf_counter() - begun:.0f} s, {options.out / name}.json")


_say = partial(print, flush=True)

if __name__ == "__main__":
    main()
