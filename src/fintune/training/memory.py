"""Peak memory of a training step, for a plan and for a run about to start, and the process's heap.

Whether the largest micro-batch fits, with or without gradient checkpointing, is estimated from
short forward passes, then tried: before step 0, not met at step 1,000.

What autograd keeps for the backward pass is counted while a forward pass runs: on the model of a
run, or on a model of the meta device, which has shapes and dtypes and no data. The rest follows
from counts of parameters. All sizes are bytes.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import send_to_device

from fintune.collate import Batch
from fintune.config import TrainConfig
from fintune.console import say
from fintune.loss import CHUNK_BYTES, causal_model, sum_loss, why_full_logits
from fintune.model import DTYPES
from fintune.training import lora
from fintune.training.distributed import any_rank, world_size
from fintune.training.rows import Order
from fintune.training.run_state import RunState, is_out_of_memory

HEADROOM = 0.7
"""Share of the free memory that a step may take: glibc needs up to 1.5 times the live bytes, as
tensors come in many sizes, and a CUDA allocator has its fragments."""
SPARED = 0.25
"""Share of the free memory below which a step on a CPU is not tried: there the trial costs as much
time as a micro-batch, and the count was never off by four times."""
PROBE_TOKENS = 256
"""Tokens of the first of the two forward passes that are counted; the second has twice as many."""
PACKED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a quantized weight; nf4 with its block constants quantized again (QLoRA, 2305.14314)."""
PACKED_STATES = 2 * (1 + 4 / 256)
"""Of the two states of an 8-bit AdamW, a parameter: blocks of 256 share an fp32 constant."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of a base with its adapter.

    Attributes:
        parameters, trainable: of the base, of the adapter.
        linear: weights of the base's layers that quantization packs.
        head: weights of the output layer.
        layers, hidden: decoder layers, width of the residual stream.
        widest: input width of the widest adapted projection.
        matrix: weights of the largest linear layer, unpacked at once where it is quantized.
        element: bytes of an activation.
        saved: bytes that the decoder keeps for the backward pass, a token.
        full_logits: whether the loss needs the logits of every position at once.
    """

    parameters: int
    trainable: int
    linear: int
    head: int
    layers: int
    hidden: int
    widest: int
    matrix: int
    element: int
    saved: float
    full_logits: bool


def model_size(model: Any, batches: Iterable[Batch], element: int) -> ModelSize:
    """Count a peft model.

    Args:
        batches: two batches on the model's device, of PROBE_TOKENS tokens and of twice as many:
            their difference leaves out what does not grow with the tokens.
        element: bytes of the precision that activations have.
    """
    causal = causal_model(model)
    config, head = causal.config.get_text_config(), causal.get_output_embeddings().weight
    trained = [each for each in model.parameters() if each.requires_grad]
    base = [each for name, each in model.named_parameters() if "lora_" not in name]
    ends = {id(head), id(causal.get_input_embeddings().weight)}
    matrices = [each.numel() for each in base if each.dim() > 1 and id(each) not in ends]
    short, long = (saved_bytes(model, batch) for batch in batches)
    return ModelSize(
        parameters=sum(each.numel() for each in base),
        trainable=sum(each.numel() for each in trained),
        linear=sum(matrices),
        head=head.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        widest=max(each.shape[-1] for each in trained if each.dim() > 1),
        matrix=max(matrices),
        element=element,
        saved=(long - short) / PROBE_TOKENS,
        full_logits=why_full_logits(causal) is not None,
    )


def saved_bytes(model: Any, batch: Batch) -> int:
    """Bytes that a forward pass of the decoder keeps for the backward pass besides the weights."""
    weights = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[id(storage)] = storage
        # An output packed as itself would hold its node: the graph would never be freed.
        return tensor.detach()

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = causal_model(model.train()).get_decoder()(**inputs, use_cache=False)
        total: int = sum(storage.nbytes() for storage in kept.values())
        del output  # until here, so that no storage was freed and its id used again
    return total


def step_memory(
    size: ModelSize,
    optimizer: str,
    tokens: int,
    label_tokens: int,
    quantization: str = "none",
    *,
    checkpointing: bool,
) -> dict[str, int]:
    """Bytes at the peak of a step, by what holds them; without the process itself.

    The peak is at the end of the forward pass (`logits`) or at the first layer of the backward pass
    (its temporaries), whichever is more: `working`.

    Args:
        tokens, label_tokens: of the largest micro-batch; those of them that the loss counts.
        checkpointing: whether a layer keeps its input alone and is computed again.
    """
    e = size.element
    packed = PACKED_BYTES.get(quantization, e)
    weights = size.linear * packed + (size.parameters - size.linear) * e
    layer = size.saved / size.layers
    # The adapter is kept in the base's precision until the backward pass.
    copies = e * size.trainable / (size.layers if checkpointing else 1)
    through = size.layers * e * size.hidden + layer if checkpointing else size.saved
    logits = (4 + e) * (size.head // size.hidden) * label_tokens
    if not size.full_logits:
        logits = min(CHUNK_BYTES, logits)
    # Of the widest projection: mask, its bytes, gradient and the adapter's part; where peft
    # computes, in fp32 and with the unpacked weight.
    temporary = tokens * size.widest * 4 * e
    if quantization != "none":
        temporary = tokens * size.widest * 10 + e * size.matrix
    return {
        "weights": int(weights),
        "adapter": 4 * size.trainable,
        "gradients": 4 * size.trainable,
        "optimizer": int((PACKED_STATES if "8bit" in optimizer else 8) * size.trainable),
        "activations": int(tokens * through + copies + 2 * e * size.hidden * label_tokens),
        "logits": logits,
        "working": max(logits, temporary),
    }


def peak(parts: dict[str, int]) -> int:
    """Sum of what is held at once: `logits` is part of `working`."""
    return sum(size for name, size in parts.items() if name != "logits")


def in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, or what this process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def needs_checkpointing(
    model: Any, order: Order, precision: str, train: TrainConfig
) -> tuple[bool, float]:
    """Whether the largest micro-batch is estimated not to fit without, and the share of the free
    memory that it takes. Collective."""
    if train.strategy == "fsdp":
        return True, 1.0  # a sharded base is one that hardly fits
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
    return on, needed / max(free, 1)


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


def decide_checkpointing(state: RunState, model: Any, name: str) -> bool:
    """Whether gradient checkpointing is on: as set, or as estimated; then tried. Collective."""
    train, order, key, fits = state.config.train, state.order, "gradient_checkpointing", True
    auto, on = train.gradient_checkpointing == "auto", train.gradient_checkpointing == "on"
    if auto and key not in state.resolved:
        needed, share = needs_checkpointing(model, order, name, train)
        on = bool(state.record(key, needed))
        alone = model.device.type == "cpu" and world_size() == 1
        if alone and share < SPARED and not state.resolved["out_of_memory"]:
            return on
    elif auto:
        on = state.resolved[key]
    try:
        try_largest(model, order, name, checkpointing=on)
    except (RuntimeError, MemoryError) as error:
        if on or not auto or not is_out_of_memory(error):
            raise
        fits = False
    if any_rank(not fits):
        say("gradient checkpointing is on: the largest micro-batch did not fit without")
        on = state.record(key, True)
        try_largest(model, order, name, checkpointing=True)
    return on


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
