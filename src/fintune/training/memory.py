"""Does the largest micro-batch fit, with or without gradient checkpointing?

Estimated from short forward passes (fintune.memory), then tried: before step 0, not met at step
1,000.
"""

import ctypes
import gc
import sys
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from accelerate.utils import send_to_device

from fintune.config import TrainConfig
from fintune.console import say
from fintune.loss import sum_loss
from fintune.memory import PROBE_TOKENS, model_size, peak, step_memory
from fintune.model import DTYPES
from fintune.training import lora
from fintune.training.distributed import any_rank
from fintune.training.rows import Order

HEADROOM = 0.7
"""Share of the free memory that a step may take: glibc needs up to 1.5 times the live bytes, as
tensors come in many sizes, and a CUDA allocator has its fragments."""


def in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, or what this process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def needs_checkpointing(model: Any, order: Order, precision: str, train: TrainConfig) -> bool:
    """Whether the largest micro-batch is estimated not to fit without. Collective."""
    if train.strategy == "fsdp":
        return True  # a sharded base is one that hardly fits
    batches = (
        send_to_device(order.collator([{"input_ids": ids, "labels": ids}]), model.device)
        for ids in ([0] * PROBE_TOKENS, [0] * 2 * PROBE_TOKENS)
    )
    with _same_masks(model), autocast(model, precision):
        size = model_size(model, batches, DTYPES[precision].itemsize)
    largest = order.most_tokens
    parts = step_memory(size, train.optim, largest, largest, checkpointing=False)
    needed = peak(parts) - parts["weights"] - parts["adapter"]  # those are there already
    free = int(psutil.virtual_memory().available)
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    on = any_rank(needed > HEADROOM * free)
    say(
        f"gradient checkpointing is {'on' if on else 'off'}: {needed / 1e9:.2f} GB for a step"
        f" with the largest micro-batch ({largest:,} tokens), {free / 1e9:.1f} GB free"
    )
    return on


def try_largest(model: Any, order: Order, precision: str, *, checkpointing: bool) -> None:
    """Forward and backward of the largest micro-batch, once, as the run will do it; the gradients
    are thrown away. What the device raises when it does not fit is not caught."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        with _same_masks(model):
            with autocast(model, precision):
                batch = order.collator([order.rows[index] for index in order.largest])
                total, count = sum_loss(model.train(), send_to_device(batch, model.device))
            (total / max(count, 1)).backward()
    finally:
        lora.forget(model)
        model.zero_grad(set_to_none=True)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an allocation failed on the device or the machine; only CUDA has a class for it."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in words)


def _same_masks(model: Any) -> AbstractContextManager[None]:
    """Restore the random state afterwards; of all devices torch would warn at length."""
    return torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])


def autocast(model: Any, precision: str) -> torch.autocast:
    """The forward pass of a run in its precision."""
    return torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32")


def retain_heap() -> None:
    """Let glibc keep what a step frees for the next one, instead of returning every large block.

    A page that is returned must be faulted in and zeroed again, 54,000 of them in 20,000 tokens of
    bench/throughput.py: 6 % of the time. 32 MiB is the most that mallopt takes for blocks.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def trim_heap() -> None:
    """Return free memory to the system: a run's allocations come in many sizes, and glibc keeps
    the holes between them (a sixth of the process after a few steps of a tiny base)."""
    gc.collect()
    # glibc has it, musl does not.
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
