"""Memory and work of a run, from the base's shape, the adapter and the batch plan.

Memory follows what autograd keeps for a block of the Llama family (`kept_per_token`), counted by
reading the forward pass; `tests/test_plan.py` holds it against `memory.activation_bytes_per_token`.
Work is counted in floating-point operations: 2 for each weight and token forward, 2 more for the
gradient of the activations; the frozen base has no gradient of its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fintune.config import LoraConfig
from fintune.loss import CHUNK_BYTES
from fintune.planning.shapes import Shape

QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a packed weight; nf4 with its block constants quantised again (QLoRA, 2305.14314)."""

PACKED_STATES = 2 * (1 + 4 / 256)
"""Bytes of an 8-bit AdamW's two states a parameter: blocks of 256 share an fp32 constant."""
QKV = ("q_proj", "k_proj", "v_proj")
"""They read one input; in Qwen2 they have a bias, so that fusing leaves them to peft."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be chosen to make a run fit.

    Attributes:
        micro_batch: examples of a forward pass.
        largest: tokens of the largest micro-batch.
        supervised: those of them that the loss counts.
        element: bytes of the base's and the activations' precision.
        cuda: laid out for CUDA (flash attention on strided heads, one-byte dropout masks).
    """

    quantization: str
    checkpointing: bool
    micro_batch: int
    largest: int
    supervised: int
    element: int = 2
    cuda: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """What the rows ask for, over the whole run.

    Attributes:
        tokens, squares, supervised: sums over training rows and epochs of length, length squared,
            supervised positions.
        updates, passes: optimiser steps, micro-batches.
        eval_tokens, eval_squares, eval_supervised: the same sums over all evaluations.
    """

    tokens: float
    squares: float
    supervised: float
    updates: int
    passes: int
    evaluations: int
    eval_tokens: float
    eval_squares: float
    eval_supervised: float


def fuses(shape: Shape, projection: str, quantization: str) -> bool:
    """Whether the fused LoRA arithmetic takes this projection, see `train/lora.py::why_not`."""
    return quantization == "none" and not (shape.qkv_bias and projection in QKV)


def kept_per_token(shape: Shape, lora: LoraConfig, setting: Setting) -> float:
    """Bytes that one block keeps for the backward pass, a token.

    Norms keep their input and one scale; attention its queries, keys, values, output and
    log-sum; the gate its input, its output and the factor; a fused LoRA group its dropped-out input
    once a mask, every projection left to peft that and the mask; each its low-rank product.
    """
    e, h, q, kv = setting.element, shape.hidden, shape.q, shape.kv
    norms = 2 * (e * h + 4) + (e * (q + kv) if shape.qk_norm else 0)
    # On a CPU attention runs in fp32 (attention.py), and dropout keeps a bit an element (lora.py).
    attention = (e if setting.cuda else 4) * 2 * (q + kv) + 4 * shape.heads
    bits = 0 if setting.cuda or lora.dropout == 0 else 1 / 8
    gate = 3 * e * shape.intermediate
    inputs, shared = 0.0, set()
    mask = 0 if lora.dropout == 0 else 1 if setting.cuda else 4
    apart = lora.dropout > 0 and not lora.shared_dropout
    for name, (inner, _) in shape.adapted(lora).items():
        inputs += e * lora.r
        if not fuses(shape, name, setting.quantization):
            inputs += (e + mask) * inner
        elif name == "o_proj" and setting.cuda and lora.dropout == 0:
            continue  # the very tensor that attention kept as its output
        elif apart or (inner, group(name)) not in shared:
            shared.add((inner, group(name)))
            inputs += (e + bits) * inner
    return norms + attention + gate + inputs


def group(projection: str) -> str:
    """Projections that read one input together have the same group."""
    if projection in QKV:
        return "qkv"
    return "up" if projection in ("gate_proj", "up_proj") else projection


def memory(shape: Shape, lora: LoraConfig, optimizer: str, setting: Setting) -> dict[str, int]:
    """Bytes at the peak of a step, by what holds them; without the process itself.

    The peak is at the end of the forward pass (logits) or at the first block of the backward pass
    (its temporaries), whichever is more; `working` is that.
    """
    e, tokens, trained = setting.element, setting.largest, shape.trainable(lora)
    packed = QUANTISED_BYTES.get(setting.quantization, e)
    weights = shape.linear * packed + (shape.parameters - shape.linear) * e
    states = PACKED_STATES if "8bit" in optimizer else 8
    block = kept_per_token(shape, lora, setting)
    ends = 2 * shape.head_dim * e + 8
    through = shape.layers * (e * shape.hidden if setting.checkpointing else block)
    kept = tokens * (through + ends + (block if setting.checkpointing else 0))
    kept += 2 * e * shape.hidden * setting.supervised
    # The fused function keeps the adapter in the base's precision until the backward pass.
    fused = sum(fuses(shape, name, setting.quantization) for name in shape.adapted(lora))
    copies = e * trained * fused / max(len(shape.adapted(lora)), 1)
    kept += copies / shape.layers if setting.checkpointing else copies
    logits = min(CHUNK_BYTES, (4 + e) * shape.vocab * setting.supervised)
    # Backward of the widest projection: mask, its bytes, gradient and its adapter's part; where
    # peft computes, in fp32 and with the unpacked weight.
    widest = max(inner for inner, _ in shape.adapted(lora).values())
    temporary = tokens * widest * 4.0 * e
    if setting.quantization != "none":
        temporary = tokens * widest * 10.0 + e * max(a * b for a, b in shape.projections.values())
    return {
        "weights": int(weights),
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": int(states * trained),
        "activations": int(kept),
        "logits": int(logits),
        "working": int(max(logits, temporary)),
    }


def peak(parts: Mapping[str, int]) -> int:
    """Sum of what is held at once: `logits` is part of `working`."""
    return sum(size for name, size in parts.items() if name != "logits")


def train_flops(shape: Shape, lora: LoraConfig, work: Work, *, checkpointing: bool) -> float:
    """Operations of all updates."""
    block = 2 * shape.linear * work.tokens
    attention = 2 * shape.layers * shape.q * work.squares  # causal: half of 4 x q x length^2
    adapter = 2 * shape.trainable(lora) * work.tokens
    # flash attention's backward pass computes the scores again: 2.5 times the forward pass.
    total = 2 * block + 3.5 * attention + 3 * adapter + 4 * shape.head * work.supervised
    return total + (block + attention + adapter if checkpointing else 0)


def eval_flops(shape: Shape, lora: LoraConfig, work: Work) -> float:
    """Operations of all evaluations: forward only."""
    per_token = 2 * (shape.linear + shape.trainable(lora))
    attention = 2 * shape.layers * shape.q * work.eval_squares
    return per_token * work.eval_tokens + attention + 2 * shape.head * work.eval_supervised


def unpacking_bytes(shape: Shape, setting: Setting, work: Work) -> float:
    """Bytes moved to unpack quantised weights, once for each pass through the blocks."""
    if setting.quantization == "none":
        return 0.0
    passes = work.passes * (3 if setting.checkpointing else 2) + work.evaluations
    return passes * shape.linear * (QUANTISED_BYTES[setting.quantization] + 2 * setting.element)
