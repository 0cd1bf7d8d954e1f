"""The LoRA forward and backward, fused. peft keeps configuration, initialisation and files.

For projections that read the same input x (q, k, v; gate, up) with frozen weights W_i, adapters
A_i (r x in), B_i (out x r) and one dropout mask M:

    y_i = x W_i' + s (x M / (1 - p)) A_i' B_i'

peft computes each y_i apart: a copy of x in fp32, a mask and a sum for each. Here one autograd
function does the group: the base product and the low-rank product accumulate in place, the A_i
are one matrix, x is saved once, dropped out, in the base's precision, of the mask only its bits
(off the CPU its seed).

One mask for a group leaves the distribution of each projection's dropout as it is; only the noise
of its members is correlated. `shared_dropout: false` draws one for each member.

What this does not cover stays with peft, and `fuse` returns why: DoRA and other variants, biases,
quantised bases, several adapters at once.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch.autograd.function import once_differentiable

from fintune.kernels.dropout import apply_mask, draw_keep_bits, keep_mask

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one parent module that read the same input, in every Llama-shaped model."""


class _FusedLora(torch.autograd.Function):
    """All projections of a group; see the module's docstring for the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scaling: float,
        p: float,
        seeds: tuple[int, ...],
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: (tokens, in); matrices: W_1 A_1 B_1 W_2 ...; seeds: none without dropout, one for a
        shared mask, or one a member. Returns y_i: (tokens, out_i)."""
        weights, lora_A, lora_B = matrices[::3], matrices[1::3], matrices[2::3]
        ranks = [len(a) for a in lora_A]
        # Rows of the stacked A that see the same mask.
        mask_rows = ranks if len(seeds) > 1 else [sum(ranks)]
        factor = scaling / (1 - p) if seeds else scaling
        stacked_A = (torch.cat(lora_A) * factor).to(x.dtype)
        # Contiguous (r, out): the products with it take a tenth less time.
        lora_B_t = [b.to(x.dtype).T.contiguous() for b in lora_B]
        on_cpu = x.device.type == "cpu"
        masks = [draw_keep_bits(seed, x.numel(), p) if on_cpu else seed for seed in seeds]
        # The backward pass reads x only as the low-rank product did, so that is what is saved.
        dropped = [apply_mask(x, keep_mask(mask, p, x)) for mask in masks] or [x]
        parts = [each @ a.T for each, a in zip(dropped, stacked_A.split(mask_rows), strict=True)]
        after_A = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        outputs = [x @ weight.T for weight in weights]
        for output, b, part in zip(outputs, lora_B_t, after_A.split(ranks, dim=1), strict=True):
            output.addmm_(part, b)
        bits = [mask for mask in masks if isinstance(mask, torch.Tensor)]
        ctx.save_for_backward(stacked_A, after_A, *dropped, *weights, *lora_B_t, *bits)
        ctx.settings = p, seeds, ranks, mask_rows, factor, lora_A[0].dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        p, seeds, ranks, mask_rows, factor, adapter_dtype = ctx.settings
        stacked_A, after_A, *rest = ctx.saved_tensors
        dropped, rest = rest[: len(mask_rows)], rest[len(mask_rows) :]
        members = len(ranks)
        weights, lora_B_t, bits = rest[:members], rest[members : 2 * members], rest[2 * members :]
        masks = bits or seeds  # off the CPU they are drawn again
        parts = after_A.T.contiguous().split(ranks)
        grad_B = [(part @ g).T for part, g in zip(parts, grad_outputs, strict=True)]
        grad_after_A = torch.cat(
            [g @ b.T for g, b in zip(grad_outputs, lora_B_t, strict=True)], dim=1
        )
        grad_parts = grad_after_A.split(mask_rows, dim=1)
        grad_A = torch.cat([g.T @ x for g, x in zip(grad_parts, dropped, strict=True)])
        grad_input: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            through_A = [g @ a for g, a in zip(grad_parts, stacked_A.split(mask_rows), strict=True)]
            for each, source in zip(through_A, masks, strict=False):  # no masks without dropout
                mask = keep_mask(source, p, each)
                each.view(mask.dtype).bitwise_and_(mask)
            grad_input = sum(through_A[1:], start=through_A[0])
            for g, weight in zip(grad_outputs, weights, strict=True):
                grad_input.addmm_(g, weight)
        grads: list[torch.Tensor | None] = []
        split_A = (grad_A.to(adapter_dtype) * factor).split(ranks)
        for each_A, each_B in zip(split_A, grad_B, strict=True):
            grads += [None, each_A, each_B.to(adapter_dtype)]
        return grad_input, None, None, None, *grads


@dataclass
class _Group:
    """Projections that read one input: the first one called computes all, the others collect."""

    members: list[LoraLinear]
    shared_dropout: bool
    input: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `index` for x of shape (..., in)."""
        if self.input is not x or index not in self.outputs:
            self.outputs = dict(enumerate(self._compute(x)))
            self.input = x
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.members[0]
        name = first.active_adapters[0]
        matrices: list[torch.Tensor] = []
        for member in self.members:
            base = member.get_base_layer().weight
            matrices += [base, member.lora_A[name].weight, member.lora_B[name].weight]
        dropout = first.lora_dropout[name]
        p = dropout.p if first.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        count = 0 if p == 0 else 1 if self.shared_dropout else len(self.members)
        # Seeds come from torch's own generator, which checkpoints and recomputation restore.
        seeds = tuple(int(seed) for seed in torch.randint(2**62, (count,)))
        flat = x.reshape(-1, x.shape[-1]).to(matrices[0].dtype)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            outputs = _FusedLora.apply(flat, first.scaling[name], p, seeds, *matrices)  # type: ignore[no-untyped-call]
        return [output.view(*x.shape[:-1], -1) for output in outputs]


def fuse(model: Any, *, shared_dropout: bool = True) -> Counter[str]:
    """Replace the LoRA arithmetic of a peft model where the fused one applies.

    Args:
        shared_dropout: one mask for projections that read the same input.

    Returns:
        Layers left to peft, by reason; empty when all are fused.
    """
    left: Counter[str] = Counter()
    for parent in model.modules():
        children = {n: c for n, c in parent.named_children() if isinstance(c, LoraLayer)}
        reasons = {name: why_not(child) for name, child in children.items()}
        left.update(reason for reason in reasons.values() if reason)
        fusable = {name: children[name] for name, reason in reasons.items() if reason is None}
        for names in _grouped(fusable):
            group = _Group([fusable[name] for name in names], shared_dropout)
            for index, member in enumerate(group.members):
                member.forward = partial(_forward, group, index, member, member.forward)
    return left


def forget(model: Any) -> None:
    """Drop outputs that no member collected because a forward pass was aborted: their graph holds
    the activations of every earlier layer."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            group: _Group = forward.args[0]
            group.outputs, group.input = {}, None


def why_not(layer: LoraLayer) -> str | None:
    """Why a layer's arithmetic is left to peft, or None where the fused one is the same."""
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not torch.nn.Linear:
        return f"its base is {type(base).__name__}"
    if len(layer.active_adapters) != 1:
        return "several adapters are active"
    name = layer.active_adapters[0]
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    if base.bias is not None or layer.lora_bias[name]:
        return "it has a bias"
    if base.weight.requires_grad:
        return "its base weight is trained"
    return None


def _grouped(fusable: dict[str, LoraLinear]) -> list[list[str]]:
    """Names that share an input together, everything else alone."""
    groups: list[list[str]] = []
    for names in GROUPS:
        present = [name for name in names if name in fusable]
        name = fusable[present[0]].active_adapters[0] if present else ""
        alike = {(fusable[n].scaling[name], str(fusable[n].lora_dropout[name])) for n in present}
        if len(alike) == 1:
            groups.append(present)
    taken = {name for group in groups for name in group}
    return groups + [[name] for name in fusable if name not in taken]


def _forward(
    group: _Group,
    index: int,
    member: LoraLinear,
    peft_forward: Any,
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """peft's forward where it has more to do than add the adapter (disabled, merged, mixed)."""
    if member.disable_adapters or member.merged or args or kwargs:
        output: torch.Tensor = peft_forward(x, *args, **kwargs)
        return output
    return group.project(index, x)
