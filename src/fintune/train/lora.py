"""The LoRA forward and backward, fused. peft keeps configuration, initialisation and files.

For projections that read the same input x (q, k, v; gate, up) with frozen weights W_i, adapters
A_i (r x in), B_i (out x r) and one dropout mask M:

    y_i = x W_i' + s (x M / (1 - p)) A_i' B_i'

peft computes each y_i apart: a copy of x in fp32, a mask of its own (5 ns an element on a CPU,
more than the rest of the adapter), a separate sum. Here one autograd function does a whole group:
the base product and the low-rank product accumulate in place, the A_i are one matrix, x is saved
once in the base's precision, and the mask is not saved at all but drawn again from its seed.

One mask for a group leaves the distribution of each projection's dropout as it is; only the noise
of its members is correlated. `shared_dropout: false` draws one for each member.

What this does not cover stays with peft, and `fuse` returns why: DoRA and other variants, biases,
quantised bases, several adapters at once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch.autograd.function import once_differentiable

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one parent module that read the same input, in every Llama-shaped model."""

_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEVELS = 65_536
"""Dropout probabilities are multiples of 1/65,536: 16 random bits decide an element."""


def keep_mask(seed: int, shape: torch.Size, p: float, like: torch.Tensor) -> torch.Tensor:
    """Dropout mask as integers of `like`'s width: all ones where kept, zero where dropped.

    And-ing the bits of a tensor with it takes a fifth of a multiplication's time on a CPU, and
    random bits from SFC64 a tenth of torch's bernoulli_. The same seed gives the same mask.
    """
    dtype = _WIDTH[like.element_size()]
    if like.device.type != "cpu":
        generator = torch.Generator(like.device).manual_seed(seed)
        mask = torch.empty(shape, dtype=dtype, device=like.device)
        return mask.bernoulli_(1 - dropped_share(p), generator=generator).neg_()
    count = shape.numel()
    words: Any = np.random.SFC64(seed).random_raw(-(-count // 4))
    kept = torch.from_numpy(words.view(np.uint16)[:count] >= round(p * _LEVELS))
    return kept.view(shape).to(dtype).neg_()


def dropped_share(p: float) -> float:
    """The dropout probability as it is applied: p to the nearest 1/65,536."""
    return round(p * _LEVELS) / _LEVELS


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where kept, zero where dropped; no scaling."""
    return values.view(mask.dtype).bitwise_and(mask).view(values.dtype)


class _Fused(torch.autograd.Function):
    """All projections of a group; see the module's docstring for the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: float,
        p: float,
        seeds: tuple[int, ...],
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """x: (tokens, in); matrices: W_1 A_1 B_1 W_2 ...; seeds: none without dropout, one for a
        shared mask, or one a member. Returns y_i: (tokens, out_i)."""
        weights, downs, ups = matrices[::3], matrices[1::3], matrices[2::3]
        dtype = x.dtype
        boost = 1 / (1 - dropped_share(p)) if seeds else 1.0
        down = torch.cat([a.to(dtype) for a in downs]) * boost
        scaled = [(b * scale).to(dtype) for b in ups]
        sizes = [len(a) for a in downs]
        low = _down(x, down, sizes, p, seeds)
        outputs = []
        for weight, up, part in zip(weights, scaled, low.split(sizes, dim=1), strict=True):
            output = x @ weight.T
            outputs.append(output.addmm_(part, up.T))
        ctx.save_for_backward(x, down, low, *weights, *scaled)
        ctx.facts = scale, p, seeds, sizes, boost, downs[0].dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, p, seeds, sizes, boost, precise = ctx.facts
        x, down, low, *rest = ctx.saved_tensors
        weights, scaled = rest[: len(sizes)], rest[len(sizes) :]
        low_gradient = torch.cat([g @ up for g, up in zip(gradients, scaled, strict=True)], dim=1)
        members: list[torch.Tensor | None] = []
        for gradient, part in zip(gradients, low.split(sizes, dim=1), strict=True):
            members += [None, None, (gradient.T @ part).to(precise) * scale]
        base = None
        if ctx.needs_input_grad[0]:
            base = gradients[0] @ weights[0]
            for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
                base.addmm_(gradient, weight)
        # One pass for a shared mask; one a member (with its own rows of `down`) otherwise.
        spans = [sizes] if len(seeds) > 1 else [[sum(sizes)]]
        downs = []
        for number, (part, rows) in enumerate(
            zip(low_gradient.split(spans[0], dim=1), down.split(spans[0]), strict=True)
        ):
            mask = keep_mask(seeds[number], x.shape, p, x) if seeds else None
            downs.append(part.T @ (x if mask is None else masked(x, mask)))
            if base is None:
                continue
            if mask is None:
                base.addmm_(part, rows)
            else:
                base.add_(masked(part @ rows, mask))
        for number, gradient in enumerate(torch.cat(downs).split(sizes)):
            members[3 * number + 1] = gradient.to(precise) * boost
        return base, None, None, None, *members


def _down(
    x: torch.Tensor, down: torch.Tensor, sizes: list[int], p: float, seeds: tuple[int, ...]
) -> torch.Tensor:
    """x through all A_i, (tokens, sum of ranks), with the mask or masks of `seeds`."""
    if not seeds:
        return x @ down.T
    if len(seeds) == 1:
        return masked(x, keep_mask(seeds[0], x.shape, p, x)) @ down.T
    parts = [
        masked(x, keep_mask(seed, x.shape, p, x)) @ rows.T
        for seed, rows in zip(seeds, down.split(sizes), strict=True)
    ]
    return torch.cat(parts, dim=1)


@dataclass
class _Group:
    """Projections that read one input: the first one called computes all, the others collect."""

    members: list[LoraLinear]
    shared_dropout: bool
    _input: torch.Tensor | None = None
    _ready: dict[int, torch.Tensor] = field(default_factory=dict)

    def project(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `number` for x of shape (..., in)."""
        if self._input is not x or number not in self._ready:
            self._ready = dict(enumerate(self._compute(x)))
            self._input = x
        output = self._ready.pop(number)
        if not self._ready:
            self._input = None
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
        with torch.autocast(x.device.type, enabled=False):
            outputs = _Fused.apply(flat, first.scaling[name], p, seeds, *matrices)  # type: ignore[no-untyped-call]
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
        fusable: dict[str, LoraLinear] = {}
        for name, child in children.items():
            reason = why_not(child)
            if reason:
                left[reason] += 1
            else:
                fusable[name] = child
        for names in _grouped(fusable):
            _install([fusable[name] for name in names], shared_dropout)
    return left


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


def _install(members: Sequence[LoraLinear], shared_dropout: bool) -> None:
    group = _Group(list(members), shared_dropout)
    for number, member in enumerate(members):
        member.forward = partial(_forward, group, number, member, member.forward)


def _forward(
    group: _Group,
    number: int,
    member: LoraLinear,
    peft: Any,
    x: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> torch.Tensor:
    """peft's own forward where it has more to do than add the adapter (off, merged, mixed)."""
    if member.disable_adapters or member.merged or args or kw:
        output: torch.Tensor = peft(x, *args, **kw)
        return output
    return group.project(number, x)
