"""One loss for training and evaluation: supervised positions only, summed, logits in chunks.

`sum_loss` returns a sum and a count; only the caller divides, by the supervised tokens of the
whole step (over micro-batches and processes). A mean of means would weigh a token by how many
others happened to share its micro-batch.

The hidden states of supervised positions alone go through the output layer, a chunk at a time, so
logits never take more than `CHUNK_BYTES`. The gradient with respect to the hidden states is made
together with the loss while a chunk's logits exist (the output layer is frozen, so nothing else
needs them), the idea of Liger's fused linear cross-entropy (arXiv 2410.10989).
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from fintune.collate import CPU_MULTIPLE, Batch
from fintune.example import IGNORE

CHUNK_BYTES = 128 * 2**20
"""Most bytes of logits at a time, as they are and in fp32: 174 positions of Llama 3's 128,256."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum over rows of -log softmax(hidden @ weight.T)[target], without keeping logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """hidden: (positions, width); weight: (vocabulary, width); targets: (positions,), IGNORE
        where a position does not count (its hidden state gets a gradient that nothing reads)."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            counted = targets[part, None] != IGNORE
            target = targets[part, None].clamp_min(0)
            scores = torch.log_softmax(hidden[part] @ weight.T, dim=1, dtype=precise)
            total -= (scores.gather(1, target) * counted).sum()
            if gradient is not None:
                scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1.0))
                gradient[part] = scores.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Summed cross-entropy of a frozen output layer.

    Args:
        hidden: shape (positions, width).
        weight: output layer, shape (vocabulary, width), frozen.
        targets: int64 token ids, shape (positions,).

    Returns:
        fp32 scalar, differentiable with respect to `hidden` only.
    """
    rows = max(1, chunk_bytes // ((4 + weight.element_size()) * weight.shape[0]))
    if hidden.device.type == "cpu":
        # Few different sizes, see CPU_MULTIPLE; what is filled up counts for nothing.
        fill = -len(hidden) % CPU_MULTIPLE
        hidden, targets = F.pad(hidden, (0, 0, 0, fill)), F.pad(targets, (0, fill), value=IGNORE)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(weight.dtype), weight, targets, rows
    )
    return loss


def sum_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Forward pass and summed loss over the supervised positions.

    Args:
        model: a causal language model, bare, with a peft adapter, or wrapped (DDP, FSDP): the
            wrapper's own forward is called, so its hooks run.
        batch: of `collate`, on the model's device; shifted labels.

    Returns:
        The fp32 sum of the cross-entropy, and the number of supervised positions.
    """
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    supervised = labels != IGNORE
    targets = labels[supervised]
    causal = causal_model(model)
    if why_full_logits(causal):
        logits = model(**inputs, use_cache=False).logits[supervised].to(torch.float32)
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)
    head = causal.get_output_embeddings()
    flat = labels.shape[0] == 1
    # A flat batch can leave the other positions out before the final slice; a padded one after.
    keep = {"logits_to_keep": supervised[0].nonzero()[:, 0]} if flat else {}
    with _hidden_states_instead_of_logits(head):
        hidden = model(**inputs, **keep, use_cache=False).logits
    hidden = hidden[0] if flat else hidden[supervised]
    weight = head.weight
    if isinstance(weight, DTensor):  # FSDP2 has taken its shards apart again after the forward pass
        weight = weight.full_tensor()
    return chunked_cross_entropy(hidden, weight, targets), len(targets)


def why_full_logits(causal: Any) -> str | None:
    """Why a model's loss needs its own full logits, or None where the chunked loss applies."""
    config = causal.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"it rescales its logits ({name})"
    head = causal.get_output_embeddings()
    # By its forward, not its class: FSDP2 gives it a subclass, and a quantised one differs.
    linear = getattr(type(head), "forward", None) is torch.nn.Linear.forward
    if not linear or head.bias is not None or head.weight.requires_grad:
        return "its output layer is not a frozen linear layer without bias"
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return "its forward has no logits_to_keep"
    return None


def causal_model(model: Any) -> Any:
    """The transformers model inside DDP, FSDP and peft wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _hidden_states_instead_of_logits(head: torch.nn.Linear) -> Iterator[None]:
    """While the model runs, its output layer hands the hidden states through."""
    head.forward = lambda input: input  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
