"""Does the largest micro-batch fit, with or without recomputing activations? Measured.

The bytes that autograd keeps are counted on one short example, forward only. They grow in
proportion to tokens (attention keeps no tokens x tokens matrix), so the largest micro-batch of the
whole plan follows from it; then that one is tried before step 0, not met at step 1,000.
"""

import ctypes
import gc
import mmap
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from fintune.batches import Ints
from fintune.collate import Batch, Collator
from fintune.loss import sum_loss
from fintune.model import DTYPES
from fintune.train import lora
from fintune.train.rows import Rows

HEADROOM = 0.7
"""Share of the free memory that activations may take; their gradients, the optimizer's states and
fragments of the allocator need the rest."""
SAMPLE_TOKENS = 256
"""Length of the example that is measured, about: long enough that fixed costs do not count."""


def activation_bytes_per_token(model: Any, rows: Rows, collator: Collator, precision: str) -> float:
    """Bytes that the forward pass keeps for the backward pass, a token, without recomputation."""
    index = int(np.argmin(np.abs(rows.lengths - SAMPLE_TOKENS)))
    batch = send_to_device(collator([rows[index]]), model.device)
    return kept_bytes(model, batch, precision) / int(batch["input_ids"].numel())


def kept_bytes(model: Any, batch: Batch, precision: str) -> int:
    """Bytes that the forward pass of a batch, on the model's device, keeps besides the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output packed as itself would hold its own node: the graph would never be freed.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with _same_masks(model), autocast(model, precision), hooks:
        # The loss is held until the count is read, so that no storage is freed and used again.
        loss = sum_loss(model.train(), batch)
        total = sum(kept.values())
        del loss
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**63 - 1  # unknown (not Linux): only the trial of the largest micro-batch decides


def in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, or what this process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * mmap.PAGESIZE if table.exists() else 0


def recompute(
    choice: str, model: Any, rows: Rows, collator: Collator, precision: str, largest: int
) -> tuple[bool, str]:
    """Resolve `train.activation_checkpointing` and say why.

    Args:
        largest: tokens of the largest micro-batch of the whole plan.
    """
    if choice != "auto":
        on = choice == "on"
        return on, f"activations are {'recomputed' if on else 'kept'}, as set"
    needed = activation_bytes_per_token(model, rows, collator, precision) * largest
    free = free_memory(model.device)
    on = needed > HEADROOM * free
    verdict = "recomputed" if on else "kept"
    return on, (
        f"activations are {verdict}: {needed / 1e9:.2f} GB for the largest micro-batch"
        f" ({largest:,} tokens), {free / 1e9:.1f} GB free"
    )


def try_largest(
    model: Any, rows: Rows, collator: Collator, precision: str, batch: Ints, *, recomputed: bool
) -> None:
    """Forward and backward of the most expensive micro-batch, once, as the run will do it; the
    gradients are thrown away. What the device raises when it does not fit is not caught."""
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        with _same_masks(model):
            with autocast(model, precision):
                inputs = send_to_device(collator([rows[i] for i in batch]), model.device)
                total, count = sum_loss(model.train(), inputs)
            (total / max(count, 1)).backward()
    finally:
        lora.forget(model)
        model.zero_grad(set_to_none=True)
        if recomputed:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def _same_masks(model: Any) -> AbstractContextManager[None]:
    """What is drawn inside leaves no trace; of all devices torch would warn at length."""
    used = [model.device] if model.device.type == "cuda" else []
    return torch.random.fork_rng(devices=used)


def autocast(model: Any, precision: str) -> torch.autocast:
    """The forward pass of a run in its precision."""
    return torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32")


def hold() -> None:
    """Let glibc keep what a step frees for the next one, instead of returning every large block.

    A page that is returned must be faulted in and zeroed again, 54,000 of them in 20,000 tokens of
    bench/throughput.py: 6 % of the time. 32 MiB is the most that mallopt takes for blocks.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back() -> None:
    """Return what is free to the system: a run's allocations come in many sizes, and glibc keeps
    the holes between them (a sixth of the process after a few steps of the nano run)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
