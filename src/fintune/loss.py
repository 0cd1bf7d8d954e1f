"""One loss for training and evaluation: label tokens only, summed, logits in chunks.

`sum_loss` returns a sum and a count; only the caller divides, by the label tokens of the
whole step (over micro-batches and processes). A mean of means would weigh a token by how many
others happened to share its micro-batch. Where a batch has `loss_weights`, an example counts as
much as another: its tokens are weighted by one over their number, and the count is of examples.

The hidden states of label tokens alone go through the output layer, a chunk at a time, so logits
never take more than `CHUNK_BYTES`. The gradient with respect to the hidden states is made together
with the loss while a chunk's logits exist (the output layer is frozen, so nothing else needs them),
as in Liger's fused linear cross-entropy (arXiv 2410.10989) and TRL's `loss_type="chunked_nll"`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from fintune.attention import traits
from fintune.collate import CPU_PAD_MULTIPLE, Batch
from fintune.example import IGNORE_INDEX

CHUNK_BYTES = 128 * 2**20
"""Most bytes of logits at a time, as they are and in fp32: 174 positions of Llama 3's 128,256."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum over rows of -log softmax(hidden @ weight.T)[target], without keeping logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        loss_weights: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        """hidden: (positions, width); weight: (vocabulary, width); targets and loss_weights:
        (positions,)."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            scores = torch.log_softmax(hidden[part] @ weight.T, dim=1, dtype=precise)
            total -= (scores.gather(1, target) * loss_weights[part, None]).sum()
            if gradient is not None:
                scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1.0))
                gradient[part] = scores.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient, loss_weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, loss_weights = ctx.saved_tensors
        # Here, not in the forward pass: in fp16 a weight of 1/1000 underflows without the scale.
        factor = (grad * loss_weights[:, None].to(grad.dtype)).to(gradient.dtype)
        return gradient * factor, None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of a frozen output layer.

    Args:
        hidden: shape (positions, width).
        weight: output layer, shape (vocabulary, width), frozen.
        targets: int64 token ids, shape (positions,).
        loss_weights: fp32, shape (positions,); None: 1 for each.

    Returns:
        fp32 scalar, differentiable with respect to `hidden` only.
    """
    rows = max(1, CHUNK_BYTES // ((4 + weight.element_size()) * weight.shape[0]))
    if loss_weights is None:
        loss_weights = torch.ones(targets.shape, device=targets.device)
    if hidden.device.type == "cpu":
        # Few different sizes, see CPU_PAD_MULTIPLE; padding counts for nothing.
        padding = -len(hidden) % CPU_PAD_MULTIPLE
        hidden = F.pad(hidden, (0, 0, 0, padding))
        targets, loss_weights = F.pad(targets, (0, padding)), F.pad(loss_weights, (0, padding))
    hidden = hidden.to(weight.dtype)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, loss_weights, rows)  # type: ignore[no-untyped-call, no-any-return]


def sum_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Forward pass and summed loss over the label tokens.

    Args:
        model: a causal language model, bare, with a peft adapter, or wrapped (DDP, FSDP): the
            wrapper's forward is called, so that its hooks run.
        batch: of `collate`, on the model's device; shifted labels.

    Returns:
        The fp32 sum of the cross-entropy, and the number of label tokens; of a batch with
        `loss_weights` the weighted sum, and the number of examples.
    """
    labels, loss_weights = batch["labels"], batch.get("loss_weights")
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
    counted = labels != IGNORE_INDEX
    targets = labels[counted]
    count = len(targets) if loss_weights is None else round(float(loss_weights.sum()))
    causal = causal_model(model)
    head, full = causal.get_output_embeddings(), why_full_logits(causal)
    whole, own = head.forward, vars(head).get("forward")

    def of_labels(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[counted][None]
        return whole(rows) if full else rows

    head.forward = of_labels
    try:
        hidden = model(**inputs, use_cache=False).logits[0]
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    if full:
        each = F.cross_entropy(hidden.to(torch.float32), targets, reduction="none")
        return (each if loss_weights is None else each * loss_weights).sum(), count
    weight = head.weight
    if isinstance(weight, DTensor):  # FSDP2 has taken its shards apart again after the forward pass
        weight = weight.full_tensor()
    return chunked_cross_entropy(hidden, weight, targets, loss_weights), count


def why_full_logits(causal: Any) -> str | None:
    """Why a model's loss needs full logits, or None where the chunked loss applies."""
    if traits(causal).rescales_logits:
        return "it rescales or caps its logits"
    head = causal.get_output_embeddings()
    # By its forward, not its class: FSDP2 gives it a subclass, and a quantised one differs.
    linear = getattr(type(head), "forward", None) is torch.nn.Linear.forward
    if not linear or head.bias is not None or head.weight.requires_grad:
        return "its output layer is not a frozen linear layer without bias"
    return None


def causal_model(model: Any) -> Any:
    """The transformers model inside DDP, FSDP and peft wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
