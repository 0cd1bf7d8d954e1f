"""Peak memory of a training step: one estimate, for a plan and for a run about to start.

What autograd keeps for the backward pass is counted while a forward pass runs: on the model of a
run, or on a model of the meta device, which has shapes and dtypes and no data. The rest follows
from counts of parameters. All sizes are bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fintune.collate import Batch
from fintune.loss import CHUNK_BYTES, causal_model, why_full_logits

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
