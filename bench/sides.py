"""A contestant of throughput.py or gpu.py in a process of its own: built once, an epoch at a time.

    python bench/sides.py NAME FOLDER EPOCHS

Lines on stdin are orders ("check", "epoch"), lines on stdout are answers in JSON. Everything a
contestant does between them is what its own library does: its sampler, collator, loop, optimizer.
Every base is frozen, every adapter fp32 with dropout 0.1. FOLDER/setting.json has the rest:
`micro`, `accumulation`, `rank`, `cpu`, and the `dtype` of every base (on a CPU what `auto` is).
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if sys.argv[1:] and sys.argv[1].startswith("unsloth"):
    import unsloth  # noqa: F401  it wants to be the first, to patch what comes after

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))


from fintune.collate import CPU_PAD_MULTIPLE, Collator  # noqa: E402
from fintune.config import Config, load_config  # noqa: E402
from fintune.example import IGNORE_INDEX  # noqa: E402
from fintune.files import read_json  # noqa: E402
from fintune.loss import sum_loss  # noqa: E402
from fintune.model import DTYPES, Base, device, load_base  # noqa: E402
from fintune.training import memory, pointwise  # noqa: E402
from fintune.training import train as loop  # noqa: E402
from fintune.training.rows import Order, Rows  # noqa: E402
from fintune.training.run_state import RunState  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUT = 0.1
LONGEST = 2048
Answer = dict[str, Any]


def main(name: str, folder: Path, epochs: int) -> None:
    """Build a contestant, then do what stdin asks until it closes."""
    torch.manual_seed(0)
    # Where memory runs out, it is a contestant that is ended and no one else's work.
    Path("/proc/self/oom_score_adj").write_text("1000")
    rows = pq.read_table(folder / "data" / "train.parquet")
    if name.startswith("floor"):
        _frozen_base(folder, Rows(rows), ours_inside="norms" in name)
        return
    ours = name == "ours"
    run = _ours(folder, epochs) if ours else _peer(name, folder, rows, epochs)
    memory.trim_heap()  # what was tried before is not the model's
    base = _in_use()
    for order in _orders():
        if order == "check":
            total, count = _our_loss(run) if ours else _peer_loss(run, rows)
            _answer({"loss": total / count, "one_at_a_time": _one_at_a_time(run.model, rows)})
        elif ours:
            loop.step = partial(_gated, Gate(base), loop.step)
            loop.fit(run)
        else:
            run.add_callback(Gate(base))
            run.train()


class Gate(TrainerCallback):  # type: ignore[misc]
    """Holds a contestant at the start of every epoch until stdin says "epoch"; then times it.

    The "epoch" that started it opens the first one.
    """

    def __init__(self, base: int) -> None:
        self._base, self._open = base, True
        self._start = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """A callback of transformers' Trainer."""
        if not self._open and next(_orders(), None) != "epoch":
            os._exit(0)
        self._open = False
        _forget_peak()
        self._start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """A callback of transformers' Trainer."""
        _wait_for_device()
        seconds = time.perf_counter() - self._start
        peak = _peak() - self._base
        memory.trim_heap()  # another contestant needs it next
        _answer({"seconds": seconds, "peak": peak})


def _gated(gate: Gate, step: Callable[[RunState], float], run: RunState) -> float:
    """Our step, at the gate where an epoch begins and ends."""
    if run.at.step % run.order.steps_per_epoch == 0:
        gate.on_epoch_begin()
    norm = step(run)
    if run.at.step % run.order.steps_per_epoch == 0:
        gate.on_epoch_end()
    return norm


def _ours(folder: Path, epochs: int) -> RunState:
    """What `fintune train` builds, by the function that it builds it with."""
    config = config_of(folder, epochs)
    rows = Rows(pq.read_table(folder / "data" / "train.parquet"))
    base = Base("bench/model", "", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    state = RunState(config, {})
    state.folder.mkdir(parents=True, exist_ok=True)
    loop.build(base, tokenizer, rows, state)
    return state


def config_of(folder: Path, epochs: int, **changes: Any) -> Config:
    """The product's configuration of the comparison."""
    setting = read_json(folder / "setting.json")
    values = {
        "out": folder / "run",
        "data.out": folder / "data",
        "model.path": folder / "model",
        "model.id": "bench/model",
        "train.per_device_train_batch_size": setting["micro"],
        "train.gradient_accumulation_steps": setting["accumulation"],
        "train.num_train_epochs": epochs,
        "train.lora.r": setting["rank"],
        "train.lora.lora_alpha": 2 * setting["rank"],
        "train.lora.lora_dropout": DROPOUT,
        "train.precision": setting["dtype"],
        "train.learning_rate": 1e-4,
        "train.optim": "adamw_torch",
        "train.eval_steps": 10**6,
        "train.save_steps": 10**6,
        **changes,
    }
    return load_config("demo", [f"{key}={value}" for key, value in values.items()])


def _peer(name: str, folder: Path, rows: Any, epochs: int) -> Any:
    """transformers' Trainer, TRL's SFTTrainer, or the latter on Unsloth's model, with peft."""
    setting = read_json(folder / "setting.json")
    micro, accumulation = setting["micro"], setting["accumulation"]
    if "in fours" in name:
        micro, accumulation = 4, micro * accumulation // 4
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lora: dict[str, Any] = {
        "r": setting["rank"],
        "lora_alpha": 2 * setting["rank"],
        "lora_dropout": DROPOUT,
        "target_modules": TARGETS,
    }
    common: dict[str, Any] = {
        "output_dir": str(folder / name),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": "checkpointing" in name,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1e-4,
        "optim": "adamw_torch",
        "bf16": setting["dtype"] == "bf16",
        "use_cpu": setting["cpu"],
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    table = Dataset(rows.select(["input_ids", "labels"]))
    if name.startswith("unsloth"):
        common |= _packed(micro, accumulation, rows)
        return _unsloth(folder, lora, common, table, tokenizer)
    # TRL asks for flash attention where batches are padding-free.
    flash = "padding-free" in name and importlib.util.find_spec("flash_attn") is not None
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=DTYPES[setting["dtype"]],
        attn_implementation="flash_attention_2" if flash else None,
    )
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    if name.startswith("transformers"):
        return Trainer(
            model=get_peft_model(model, config),
            args=TrainingArguments(**common, train_sampling_strategy="group_by_length"),
            train_dataset=table,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX),
        )
    from trl import SFTConfig, SFTTrainer

    if "grouped" in name:
        common |= {"max_length": LONGEST, "train_sampling_strategy": "group_by_length"}
    elif "packed" in name:
        common |= _packed(micro, accumulation, rows)
    else:
        common |= {"max_length": None, "padding_free": True}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common, use_liger_kernel="liger" in name),
        train_dataset=table,
        processing_class=tokenizer,
        peft_config=config,
    )


def _packed(micro: int, accumulation: int, rows: Any) -> dict[str, Any]:
    """A packed row holds as many tokens as several; the step keeps about as many rows."""
    mean = float(np.mean(rows["length"].to_numpy()))
    size = max(1, round(micro * mean / LONGEST))
    return {
        "max_length": LONGEST,
        "packing": True,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": max(1, round(micro * accumulation * mean / LONGEST / size)),
    }


def _unsloth(folder: Path, lora: Any, common: Any, table: Dataset, tokenizer: Any) -> Any:
    """Unsloth's patched model with TRL's trainer, as its documentation shows. Needs CUDA."""
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth", **lora)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common),
        train_dataset=table,
        processing_class=tokenizer,
    )


def _our_loss(run: RunState) -> tuple[float, int]:
    """Summed loss of an epoch by our batches, and its label tokens."""
    total, counted, order = 0.0, 0, run.order
    run.model.eval()
    with torch.no_grad():
        for micro in (micro for step in order.epoch(0) for micro in step):
            batch = order.collator([order.rows[index] for index in micro])
            part, count = sum_loss(run.model, send_to_device(batch, device()))
            total, counted = total + float(part), counted + count
    run.model.train()
    return total, counted


def _peer_loss(trainer: Any, rows: Any) -> tuple[float, int]:
    """The same by the batches and the loss of a Trainer."""
    model = trainer.model.eval()
    count = sum(
        sum(label != IGNORE_INDEX for label in row[1:]) for row in rows["labels"].to_pylist()
    )
    with torch.no_grad():
        total = sum(
            float(trainer.compute_loss(model, trainer._prepare_inputs(b), num_items_in_batch=1))
            for b in trainer.get_train_dataloader()
        )
    model.train()
    return total, count


@torch.no_grad()
def _one_at_a_time(model: Any, rows: Any) -> float:
    """Mean loss of single rows by transformers' own model and torch's cross-entropy."""
    name = model.get_base_model().name_or_path
    bare = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype).to(model.device)
    total = counted = 0.0
    for row in rows.to_pylist():
        logits = bare(torch.tensor([row["input_ids"]]).to(bare.device)).logits[0, :-1].float()
        targets = torch.tensor(row["labels"][1:]).to(bare.device)
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        total, counted = total + float(loss), counted + int((targets != IGNORE_INDEX).sum())
    return total / counted


def _frozen_base(folder: Path, rows: Rows, ours_inside: bool) -> None:
    """The floor: our batches and attention through the frozen base of transformers and back to its
    inputs; nothing else. `ours_inside`: with the norms and the rotation that training puts in."""
    base = Base("bench/model", "", folder / "model")
    model = load_base(base, "none", read_json(folder / "setting.json")["dtype"])
    if ours_inside:
        pointwise.fuse(model)
    memory.retain_heap()
    multiple = CPU_PAD_MULTIPLE if model.device.type == "cpu" else 1
    collator = Collator(padding_free=True, pad_token_id=0, pad_to_multiple_of=multiple)
    order = Order(config_of(folder, 1), rows, collator)
    memory.trim_heap()
    base_bytes = _in_use()
    for number, _ in enumerate(_orders()):
        _forget_peak()
        start = time.perf_counter()
        for step in order.epoch(number):
            for micro in step:
                batch = send_to_device(collator([rows[index] for index in micro]), model.device)
                del batch["labels"]
                ids = batch.pop("input_ids")
                inputs = model.get_input_embeddings()(ids).requires_grad_()
                hidden = model.model(inputs_embeds=inputs, use_cache=False, **batch)[0]
                hidden.backward(torch.ones_like(hidden))
        _wait_for_device()
        seconds = time.perf_counter() - start
        _answer({"seconds": seconds, "peak": _peak() - base_bytes})


def matrix_rate(size: int = 4096, rounds: int = 5) -> float:
    """bf16 multiply-adds a second of this machine, x 2: the best of `rounds` square products."""
    on = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, dtype=torch.bfloat16, device=on)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        _wait_for_device()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _orders() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line.strip()


def _answer(facts: Answer) -> None:
    sys.stdout.write("@" + json.dumps(facts) + "\n")
    sys.stdout.flush()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Count the peak of memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _in_use() -> int:
    """Bytes in use: of the GPU where there is one, else of this process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> int:
    """Most bytes in use since `_forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
